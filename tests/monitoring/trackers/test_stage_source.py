"""What trackers receive of each stage, on synthetic run folders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.stage_source import StageSource, chosen_steps, distribution_of
from rcot_rl.monitoring.trackers.tracker import DataTable, Distribution
from rcot_rl.recipe.loader import load_recipe

STAGE, STEPS, CANVAS = "grpo-ktg", 12, 112
BOX = {"bbox_2d": [28, 28, 56, 56], "point_2d": [42, 42]}
RIGHT = f"<think>It is the left one.</think><answer>{json.dumps([BOX])}</answer>"
WRONG = "<think>Nothing.</think><answer>[]</answer>"

MakeRun = Callable[..., Path]


def lines_of(step: int, prompts: list[int], tokens: int = 10) -> list[dict[str, Any]]:
    """Return the rollouts of a step: of each prompt one right and three wrong responses."""
    return [
        {
            "prompt_id": f"{step * 100 + place:09d}-x",
            "sample": sample,
            "data_source": "rcot/ktg",
            "prompt": "Query",
            "response": WRONG if sample else RIGHT,
            "ground_truth": json.dumps([BOX]),
            "reward": 1.0 if sample else 6.0,
            "components": {"format": 1.0 if sample else 3.0, "accuracy": 0.0 if sample else 3.0},
            "reasons": ["target_missed"] if sample else [],
            "index": index,
            "video": f"clip-{index}",
            "expression_id": "0",
            "advantage": -0.5 if sample else 1.5,
            "response_tokens": tokens + sample,
        }
        for place, index in enumerate(prompts)
        for sample in range(4)
    ]


def save_rollouts(run: Path, step: int, lines: list[dict[str, Any]], more: str = "") -> None:
    file = run / STAGE / "rollouts" / f"{step}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


@pytest.fixture
def make_training_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run whose KTG stage has trained all its steps."""

    def make(
        overrides: tuple[str, ...] = (), prompts: Callable[[int], list[int]] | None = None
    ) -> Path:
        run = tmp_path / "run"
        recipe = load_recipe("laptop", [f"train.{STAGE}.steps={STEPS}", *overrides])
        shards = run / "shards" / recipe.grpo(STAGE).shard_set
        (shards / "media").mkdir(parents=True)
        image = np.zeros((CANVAS, CANVAS, 3), np.uint8)
        image[28:56, 28:56] = 255
        cv2.imwrite(str(shards / "media" / "frame.png"), image)
        facts = [
            {"index": n, "media": "media/frame.png", "expression": f"shape {n}"} for n in range(99)
        ]
        table = pa.table({"extra_info": facts})
        pq.write_table(table, shards / "train-00000-of-00001.parquet")
        record = {"recipe": recipe.model_dump(mode="json")}
        (run / "recipe.yaml").write_text(yaml.safe_dump(record))
        lines = []
        for step in range(1, STEPS + 1):
            chosen = prompts(step) if prompts else [step * 5 + k for k in range(5)]
            save_rollouts(run, step, lines_of(step, chosen))
            line = {"step": step, "time": 1e9 + step, "reward/mean": 2.25, "actor/kl_loss": 0.1}
            line |= {"reason/target_missed": 0.75} if step > 3 else {}
            lines.append(line)
        metrics = run / STAGE / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def all_values(run: Path) -> list[dict[str, Any]]:
    reader = RunReader(run)
    source = StageSource(reader, STAGE)
    return [source.step(line) for line in reader.metrics(STAGE)]


def cells(table: DataTable, column: str) -> list[Any]:
    return [row[list(table.columns).index(column)] for row in table.rows]


@pytest.mark.parametrize(("total", "count"), [(1, 20), (12, 20), (100, 20), (1000, 20), (7, 2)])
def test_chosen_steps_are_spread_over_the_stage(total, count):
    steps = sorted(chosen_steps(total, count))
    assert steps[0] == 1 and steps[-1] == total
    assert len(steps) == min(total, count)
    gaps = np.diff(steps)
    assert not gaps.size or gaps.max() - gaps.min() <= 1


def test_values_do_not_depend_on_where_the_follower_began(make_training_run):
    run = make_training_run(("tracking.rollout_tables=4",))
    reader = RunReader(run)
    lines = reader.metrics(STAGE)
    whole = all_values(run)
    for start in (1, 5, STEPS - 1):
        later = StageSource(reader, STAGE)
        for line, before in zip(lines[start:], whole[start:], strict=True):
            after = later.step(line)
            assert after.keys() == before.keys()
            scalars = [k for k, v in before.items() if isinstance(v, float | int)]
            assert [after[k] for k in scalars] == [before[k] for k in scalars]
    with_tables = [n for n, v in enumerate(whole, 1) if "rollouts" in v]
    assert with_tables == [1, 5, 8, 12]


def test_reason_is_zero_at_each_step_that_did_not_give_it(make_training_run):
    # the follower sees the first steps before any later one is written
    run = make_training_run()
    metrics = run / STAGE / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("")
    source = StageSource(RunReader(run), STAGE)
    live = []
    for line in lines:
        metrics.write_text(metrics.read_text() + line)
        live.append(source.step(json.loads(line)))
    assert [v["reason/target_missed"] for v in live] == [0.0] * 3 + [0.75] * 9
    keys = [{k for k in v if k.startswith("reason")} for v in live]
    assert all(k == keys[0] for k in keys)


def test_reasons_with_numbers_do_not_create_thousands_of_keys(make_training_run):
    run = make_training_run((f"train.{STAGE}.reward=mine.py:score",))
    source = StageSource(RunReader(run), STAGE)
    keys, last = set(), {}
    for step in range(1, 200):
        last = source.step({"step": step} | {f"reason/x{step}-{k}": 0.25 for k in range(8)})
        keys |= last.keys()
    # 64 codes, those of failed calls, and the rest
    assert len([k for k in keys if k.startswith("reason/")]) == 64 + 5 + 1
    assert last["reason/other"] == 8 * 0.25


def test_rows_show_the_best_and_the_worst_response_with_their_pictures(make_training_run):
    run = make_training_run(("tracking.rollout_prompts=2",))
    table = all_values(run)[0]["rollouts"]
    assert cells(table, "prompt") == ["5", "5", "6", "6"]
    assert cells(table, "response") == ["best", "worst"] * 2
    assert cells(table, "reward") == [6.0, 1.0] * 2
    assert cells(table, "component/accuracy") == [3.0, 0.0] * 2
    assert cells(table, "expression") == ["shape 5"] * 2 + ["shape 6"] * 2
    assert cells(table, "reasoning")[0] == "It is the left one."
    assert cells(table, "reasons") == ["", "target_missed"] * 2
    assert cells(table, "advantage") == [1.5, -0.5] * 2
    picture = cells(table, "picture")[0]
    assert picture.boxes["ground truth"] == picture.boxes["predicted"]
    x1, y1, x2, y2 = (int(v) for v in picture.boxes["predicted"][0].corners)
    assert picture.image[y1:y2, x1:x2].min() > 200 and picture.image[:y1].max() < 50


def test_episode_shows_the_frame_that_it_judged_last(make_training_run):
    run = make_training_run()
    frames = [str(run / f"frame-{value}.png") for value in (40, 80, 120)]
    for path, value in zip(frames, (40, 80, 120), strict=True):
        cv2.imwrite(path, np.full((60, 90, 3), value, np.uint8))
    shard = next(run.glob("shards/*/train-*.parquet"))
    rows = pq.read_table(shard).to_pylist()
    for row in rows:
        row["extra_info"]["clip"] = json.dumps({"frames": frames, "masks": [None], "keyframe": 0})
    pq.write_table(pa.Table.from_pylist(rows), shard)
    lines = [
        line
        | {"data_source": "rcot/aks", "ground_truth": '"A"', "response": "<answer>A</answer>"}
        | {"extra_info": {"agentic": {"judged": sample, "judgements": sample + 1, "area": 0.5}}}
        for sample, line in enumerate(lines_of(1, [7])[:4])
    ]
    save_rollouts(run, 1, lines)
    table = all_values(run)[0]["rollouts"]
    best, worst = cells(table, "picture")
    assert (best.image == 40).all() and best.image.shape == (60, 90, 3)
    assert (worst.image == 80).all()
    save_rollouts(run, 1, [line | {"extra_info": {"agentic": {"judged": 99}}} for line in lines])
    assert cells(all_values(run)[0]["rollouts"], "picture") == [None] * 2


def test_sides_of_a_group_are_in_one_row(make_training_run):
    run = make_training_run()
    table = all_values(run)[0]["rollouts_best_and_worst"]
    assert cells(table, "group") == ["highest mean", "lowest mean", "widest spread"]
    assert cells(table, "best: reward") == [6.0] * 3 and cells(table, "worst: reward") == [1.0] * 3
    assert cells(table, "mean") == [2.25] * 3
    assert set(cells(table, "picture")[0].boxes) == {"ground truth", "best"}


def test_prompts_that_an_epoch_repeats_are_followed(make_training_run):
    # 20 rows of which each step sees 5: an epoch has 4 steps
    run = make_training_run(
        ("tracking.rollout_prompts=3",), lambda step: [(5 * (step - 1) + k) % 20 for k in range(5)]
    )
    followed = {
        step: values["rollouts_same_prompts"]
        for step, values in enumerate(all_values(run), 1)
        if "rollouts_same_prompts" in values
    }
    assert list(followed) == [5, 9]
    assert all(set(cells(table, "prompt")) == {"0", "1", "2"} for table in followed.values())


def test_masks_are_made_by_the_recipes_segmenter_up_to_the_limit(make_training_run):
    run = make_training_run(("tracking.picture_masks=2", "models.segmenter=flow"))
    values = all_values(run)[0]
    tables = values["rollouts"], values["rollouts_best_and_worst"]
    pictures = [p for table in tables for p in cells(table, "picture")]
    masks = [mask for picture in pictures for mask in picture.masks.values()]
    # a wrong response has no box to segment
    assert 1 <= len(masks) <= 2
    assert all(mask.shape == (CANVAS, CANVAS) for mask in masks)
    inside = masks[0][28:56, 28:56].mean()
    assert inside > 0.9 and masks[0].sum() < 1.5 * 28 * 28


def test_distributions_have_equal_edges_and_count_every_response(make_training_run):
    run = make_training_run()
    values = all_values(run)
    reward = [v["distribution/reward"] for v in values]
    assert all(sum(d.counts) == 20 for d in reward)
    assert all(d.edges == reward[0].edges for d in reward)
    assert (reward[0].edges[0], reward[0].edges[-1]) == (0.0, 6.0)
    keys = {k for k, v in values[0].items() if isinstance(v, Distribution)}
    names = ("advantage", "response_length", "reward", "reward/accuracy", "reward/format")
    assert keys == {f"distribution/{name}" for name in names}


def test_values_outside_the_range_count_at_its_ends():
    distribution = distribution_of([-9.0, 0.5, 9.0, float("nan")], 0.0, 1.0, bins=2)
    assert distribution is not None
    assert distribution.counts == [1, 2]
    assert distribution_of([float("inf")], 0.0, None) is None


def test_broken_rollouts_cost_their_own_rows_only(make_training_run):
    run = make_training_run()
    good = lines_of(1, [7])
    rows = [{"prompt_id": 1}, {"reward": "six"}, ["list"], {"reward": 2.0, "ground_truth": "[[["}]
    rows += [good[0] | {"sample": 9, "turn": "1"}, {"reward": 1.0, "sample": 0, "turn": 0}]
    rows += [good[0] | {"reward": float("nan")}, good[0] | {"components": {"format": float("inf")}}]
    save_rollouts(run, 1, [*good, *rows], more='{]\n{"reward": 6.0, "prompt_id": "cut of')
    values = all_values(run)[0]
    assert cells(values["rollouts"], "prompt")[:2] == ["7", "7"]
    assert sum(values["distribution/reward"].counts) == len(good) + 4
    (run / STAGE / "rollouts" / "1.jsonl").write_text("not json\n")
    assert "rollouts" not in all_values(run)[0]
    assert all_values(run)[0]["reward/mean"] == 2.25


def test_tables_can_be_switched_off(make_training_run):
    run = make_training_run(("tracking.rollout_tables=0",))
    values = all_values(run)
    assert not [v for v in values for x in v.values() if isinstance(x, DataTable)]
    assert "distribution/reward" in values[0]


def test_missing_frames_leave_rows_without_pictures(make_training_run):
    run = make_training_run()
    (run / "shards" / load_recipe("laptop").grpo(STAGE).shard_set / "media" / "frame.png").unlink()
    table = all_values(run)[0]["rollouts"]
    assert cells(table, "picture") == [None] * len(table.rows)
    assert cells(table, "reward")[0] == 6.0


def test_step_without_tables_costs_less_than_10_ms(make_training_run):
    run = make_training_run(("tracking.rollout_tables=1",))
    save_rollouts(
        run, 2, [line for k in range(8) for line in lines_of(2, [k * 4 + j for j in range(4)])]
    )
    reader = RunReader(run)
    source = StageSource(reader, STAGE)
    lines = reader.metrics(STAGE)
    source.step(lines[0])  # reads the reward recipe
    costs = []
    for _ in range(5):
        started = time.process_time()
        values = source.step(lines[1])
        costs.append(time.process_time() - started)
    assert sum(values["distribution/reward"].counts) == 128
    assert min(costs) < 0.010


@pytest.fixture
def finished_run(make_training_run: MakeRun, save_json: Callable[[Path, object], None]) -> Path:
    """A run whose later stages have results: held-out rewards, J&F, and their artifacts."""
    run = make_training_run()
    recipe = RunReader(run).recipe
    assert recipe is not None
    ways = {
        "grpo-aks": {"sampled": [1.0, 2.0, 3.0], "greedy": [2.0, 2.0, 2.0]},
        STAGE: {"sampled": [2.0, 3.5, 4.0], "greedy": [3.0, 3.0, 3.0]},
    }
    rewards = {
        name: {
            way: {"mean": float(np.mean(v)), "per_prompt": v, "components": {"format": 3.0}}
            for way, v in values.items()
        }
        for name, values in ways.items()
    }
    save_json(run / "predict" / "rewards.json", {"ktg": rewards})
    save_json(run / STAGE / "done.json", {"minutes": 5.5, "peak_gib": 6.5, "steps": STEPS})
    (run / STAGE / "attempt-1").mkdir()
    (run / STAGE / "attempt-2").mkdir()
    failure = {"cause": "memory", "step": 7, "text": "The kernel ended a process."}
    (run / STAGE / "attempts.jsonl").write_text(json.dumps(failure) + "\n")
    results = {}
    for name, shift in (("sft", 0.0), ("grpo-aks", 5.0), (STAGE, 15.0)):
        rows = [
            {"video": f"v{k}", "expression_id": "0", "subset": "single_target", "J": 40 + k + shift}
            for k in range(6)
        ]
        rows = [row | {"F": row["J"], "J&F": row["J"]} for row in rows]
        results[name] = {
            "benchmark": "mevis",
            "J&F": 42.5 + shift,
            "J": 42.5 + shift,
            "F": 42.5 + shift,
            "keyframe_area_ratio_initial": 50.0,
            "keyframe_area_ratio": 60.0 + shift,
            "aks_rounds": 1.5,
            "box_iou": 30.0,
            "per_subset": {"no_target": {"J&F": 1.0, "N-Acc": 80.0, "T-Acc": 90.0}},
            "pipeline_costs": {
                "keyframe_seconds": 2.0,
                "segmentation_seconds": 3.0,
                "aks_extra": 81.0,
                "n_queries": 6,
                "stages": {},
            },
            "aks_verdicts": {
                "accuracy": 75.0,
                "confusion": {
                    "A": {"visible": 3, "absent": 1},
                    "B": {"visible": 0, "absent": 2},
                    "none": {"visible": 0, "absent": 0},
                },
            },
            "per_expression": rows,
        }
    whole = results[STAGE] | {"checkpoints": results, "root": "/nowhere", "split": "valid_u"}
    save_json(run / "eval" / "mevis-valid_u.json", whole)
    return run


def test_summary_has_the_levels_and_changes_of_the_stages_checkpoint(finished_run):
    summary = StageSource(RunReader(finished_run), STAGE).summary()
    assert summary["heldout_ktg_sampled"] == pytest.approx(9.5 / 3)
    assert summary["heldout_ktg_sampled_before"] == 2.0
    assert summary["heldout_ktg_sampled_change"] == pytest.approx(3.5 / 3)
    low, high = (summary[f"heldout_ktg_sampled_change_{bound}"] for bound in ("low", "high"))
    assert low < 3.5 / 3 < high
    assert summary["JF_mevis_valid_u"] == 57.5
    assert summary["JF_mevis_valid_u_before"] == 47.5
    assert summary["JF_mevis_valid_u_change"] == pytest.approx(10.0)
    assert (summary["attempts"], summary["restarts"]) == (2, 1)
    assert summary["failure_causes"] == "memory"
    assert summary["failure_verdict_1"] == "step 7: The kernel ended a process."
    assert summary["minutes"] == 5.5 and summary["peak_memory_gib"] == 6.5
    assert all("&" not in key and "-" not in key for key in summary)
    assert "Held-out reward (KTG)" in str(summary["verdict"])
    assert StageSource(RunReader(finished_run), "report").summary()["verdict_level"] != "unknown"
    assert not [v for v in summary.values() if isinstance(v, DataTable)]


def test_results_of_predict_have_intervals_and_components(finished_run):
    results = StageSource(RunReader(finished_run), "predict").results()
    key = "heldout/ktg/grpo_ktg/sampled"
    assert results[key] == pytest.approx(9.5 / 3)
    assert results[f"{key}/low"] < results[key] < results[f"{key}/high"]
    assert results[f"{key}/format"] == 3.0
    table = results["heldout_rewards"]
    assert cells(table, "checkpoint") == ["grpo-aks"] * 2 + [STAGE] * 2
    assert cells(table, "change") == [None, None, pytest.approx(3.5 / 3), 1.0]


def test_held_out_prompts_are_set_side_by_side(finished_run):
    for name in ("grpo-aks", STAGE):
        for way in ("greedy", "sampled"):
            file = finished_run / "predict" / "heldout" / "ktg" / f"{name}-{way}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            line = lines_of(1, [3])[0] | {"prompt_id": "3", "reward": 6.0 if name == STAGE else 1.0}
            file.write_text(json.dumps(line) + "\n")
    table = StageSource(RunReader(finished_run), "predict").results()["heldout_responses_ktg"]
    assert cells(table, "prompt") == ["3"]
    assert cells(table, "grpo-aks: reward") == [1.0] and cells(table, f"{STAGE}: reward") == [6.0]


def test_results_of_eval_have_the_papers_tables(finished_run):
    results = StageSource(RunReader(finished_run), "eval").results()
    assert results["eval/mevis_valid_u/grpo_ktg/JF"] == 57.5
    assert results["eval/mevis_valid_u/grpo_ktg/no_target/N_Acc"] == 80.0
    assert cells(results["table_10_aks_overhead"], "AKS adds %") == [81.0] * 3
    assert cells(results["table_11_inference_time"], "segmentation s") == [3.0] * 3
    assert cells(results["table_12_total_time"], "total s") == [5.0] * 3
    assert cells(results["table_13_keyframes"], "gain") == [10.0, 15.0, 25.0]
    assert cells(results["table_14_box_iou"], "box IoU %") == [30.0] * 3
    assert "figure_10_step_times" not in results  # not measured
    confusion = results["aks_confusion"]
    assert [r[2:] for r in confusion.rows[:2]] == [["visible", 3, 0, 0], ["absent", 1, 2, 0]]


def test_lineage_links_each_stage_to_what_it_used(finished_run, save_json):
    reader = RunReader(finished_run)
    recipe = reader.recipe
    assert recipe is not None
    for name in recipe.data.sets:
        shards = finished_run / "shards" / name
        save_json(shards / "manifest.json", {"files": {"train-0.parquet": "ab"}, "rows": {"t": 1}})
    for stage in recipe.train:
        (finished_run / stage / "model").mkdir(parents=True)
        checkpoint = finished_run / stage / "checkpoints" / "global_step_9"
        save_json(
            checkpoint / "checkpoint.json", {"step": 9, "files": {"a": {"size": 5, "sha256": "c"}}}
        )
        (checkpoint.parent / "latest").write_text("global_step_9\n")
    for stage in recipe.order:
        save_json(finished_run / stage / "done.json", {"minutes": 1})
    made: set[str] = set()
    used: dict[str, set[str]] = {}
    for stage in recipe.order:
        artifacts = StageSource(reader, stage).artifacts()
        names = {role: {a.name for a in artifacts if a.role == role} for role in ("made", "used")}
        used[stage] = names["used"]
        # what a stage uses was made before, apart from corpora and the base policy
        assert {n for n in names["used"] if not n.startswith("corpus-")} - {"model-base"} <= made
        made |= names["made"]
        by_name = {a.name: a for a in artifacts}
        if stage in recipe.train:
            assert by_name[f"checkpoint-{stage}"].metadata["sha256"] == {"a": "c"}
            assert by_name[f"checkpoint-{stage}"].metadata["bytes"] == 5
    assert used[STAGE] >= {"model-grpo-aks", "shards-grpo-ktg-960"}
    assert "scores-mevis-valid_u" in used["report"]


def test_nothing_is_made_before_the_stage_is_done(finished_run):
    (finished_run / STAGE / "model").mkdir()
    (finished_run / STAGE / "done.json").unlink()
    artifacts = StageSource(RunReader(finished_run), STAGE).artifacts()
    assert {a.role for a in artifacts} == {"used"}


@pytest.mark.parametrize("stage", ["data", "sft", STAGE, "predict", "eval", "report", "unknown"])
def test_empty_folder_yields_empty_values(tmp_path, stage):
    source = StageSource(RunReader(tmp_path), stage)
    assert source.results() == {}
    assert source.artifacts() == []
    line = {"step": 1, "time": 2.0, "a": 1.0, "b": float("nan"), "c": "x", "d": True}
    assert source.step(line) == {"time": 2.0, "a": 1.0}
    assert source.summary()["attempts"] == 0


def test_results_of_data_say_what_was_dropped_and_show_rows(tmp_path, save_json):
    shards = tmp_path / "shards" / "grpo-ktg-6k"
    manifest = {
        "rows": {"train": 6000, "val": 200},
        "ratios": {"train": {"ktg single:multi": 3.0, "unknown": None}},
        "counts": {"train": {"ktg/multi": 1500}},
        "dropped": {"expressions": {"no target": 7}, "defects": [{"file": "a"}, {"file": "b"}]},
        "plan": [{"split": "train", "group": "ktg multi", "asked": 1500, "given": 1500}],
    }
    save_json(shards / "manifest.json", manifest)
    image = np.zeros((840, 840, 3), np.uint8)
    image[210:420, 420:630] = 255
    info = {"task": "ktg", "target": "single", "canvas": [840, 840], "object_ids": ["1"]}
    info |= {"dataset": "mevis", "video": "v", "frame": "0", "expression": "the left one"}
    info |= {"media": "media/none.png"}
    truth = [{"bbox_2d": [420, 210, 630, 420], "point_2d": [525, 315]}]
    row = {
        "images": [{"bytes": cv2.imencode(".png", image)[1].tobytes()}],
        "prompt": [{"role": "user", "content": "Query"}],
        "reward_model": {"ground_truth": json.dumps(truth)},
        "extra_info": info,
    }
    pq.write_table(pa.Table.from_pylist([row]), shards / "train-00000-of-00001.parquet")
    results = StageSource(RunReader(tmp_path), "data").results()
    assert results["data/grpo_ktg_6k/train_rows"] == 6000
    assert results["data/grpo_ktg_6k/train_ratio/ktg_single_multi"] == 3.0
    assert results["data/grpo_ktg_6k/defects"] == 2
    assert results["data_dropped"].rows == [["grpo-ktg-6k", "expressions", "no target", 7]]
    assert cells(results["data_plan"], "available") == [None]
    sample = results["data_samples"]
    assert cells(sample, "expression") == ["the left one"]
    picture = cells(sample, "picture")[0]
    x1, y1, x2, y2 = (round(v) for v in picture.boxes["ground truth"][0].corners)
    bright = picture.image[..., 0] > 127
    assert picture.image.shape[0] == 448 and bright[y1:y2, x1:x2].all()
    assert bright.sum() == (y2 - y1) * (x2 - x1)


def test_queries_show_the_keyframe_with_both_masks(make_run):
    run = make_run(n_videos=3, steps=2)
    table = StageSource(RunReader(run), "eval").results()["queries"]
    ranks = cells(table, "rank")
    assert ranks == [1, 2, 3] and cells(table, "problem") == [""] * 3
    assert cells(table, "J&F") == sorted(cells(table, "J&F"), reverse=True)
    for picture in cells(table, "picture"):
        assert set(picture.masks) == {"ground truth", "predicted mask"}
        # the trace has the tight box of the predicted mask
        ys, xs = np.nonzero(picture.masks["predicted mask"])
        box, _ = picture.boxes["predicted"]
        assert box.corners == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
