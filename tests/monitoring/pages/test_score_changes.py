"""Scores and changes of J&F agree wherever they are shown, with and without subsets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rcot_rl.evaluation.aggregate import aggregate
from rcot_rl.monitoring.pages.compare import comparison_table, score_changes
from rcot_rl.monitoring.pages.figures import scores_section
from rcot_rl.monitoring.terminal.run_summary import summary_table
from rcot_rl.stats.intervals import shown_change, stratified_interval

DATASETS = ("revos", "mevis", "reasonvos", "davis17", "ref-youtube-vos")
NUMBER = r"[-+]?\d+\.\d"


def evaluated(dataset: str, rng: np.random.Generator, clips: list[tuple[str, str, str]]) -> dict:
    """Return a result as the evaluation writes it, for expressions (video, id, subset)."""
    rows = [
        {
            "video": video,
            "expression_id": expression,
            "subset": subset,
            "J": float(rng.uniform()),
            "F": float(rng.uniform()),
            "n_unusable_frames": 0,
            "defective": False,
            "unexpected": False,
            "empty": False,
            "found": True,
        }
        for video, expression, subset in clips
    ]
    return {"benchmark": dataset, "split": "valid", **aggregate(dataset, rows)}


def questions(dataset: str, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return expressions in subsets of very unequal size; ReVOS gets one that is not counted."""
    names = ["referring"] * 9 + ["reasoning"] * 2 + ["no_target"] * 4
    if dataset != "revos":
        names = ["single_target", "multi_target"]
    return [(f"clip-{v}", str(e), str(rng.choice(names))) for v in range(8) for e in range(5)] + [
        (f"clip-{v}", "9", subset) for v in range(2) for subset in dict.fromkeys(names)
    ]


def write_run(root: Path, datasets: tuple[str, ...], seed: int) -> Path:
    rng, asked = np.random.default_rng(seed), np.random.default_rng(99)
    (root / "eval").mkdir(parents=True)
    (root / "predict").mkdir()
    rewards = {
        name: {
            way: {"mean": float(values.mean()), "per_prompt": values.tolist()}
            for way, values in (("sampled", rng.uniform(0, 3, 9)), ("greedy", rng.uniform(0, 3, 9)))
        }
        | {"prompts": [str(k) for k in range(9)]}
        for name in ("sft", "grpo-aks", "grpo-ktg")
    }
    (root / "predict" / "rewards.json").write_text(json.dumps({"aks": rewards, "ktg": rewards}))
    for dataset in datasets:
        clips = questions(dataset, asked)
        stages = {n: evaluated(dataset, rng, clips) for n in ("sft", "grpo-aks", "grpo-ktg")}
        baselines = {"whole-frame": evaluated(dataset, rng, clips)}
        whole = stages["grpo-ktg"] | {"checkpoints": stages, "baselines": baselines}
        (root / "eval" / f"{dataset}.json").write_text(json.dumps(whole))
    return root


def read(run: Path, dataset: str) -> dict:
    return json.loads((run / "eval" / f"{dataset}.json").read_text())


def decimal(text: str, digits: int = 1) -> float:
    return round(float(text), digits)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_report_shows_the_change_of_the_level_beside_it(dataset: str, seed: int, tmp_path):
    result = read(write_run(tmp_path, (dataset,), seed), dataset)
    page = scores_section({dataset: result})
    rows = re.findall(rf"<b>({NUMBER})</b></td>.*?</tr>", page)
    cells = re.findall(rf'<span class="(?:up|down|soft)">({NUMBER}) \[', page)
    levels = [decimal(r) for r in rows]
    assert levels == [round(r["J&F"], 1) for r in result["checkpoints"].values()] + [
        round(r["J&F"], 1) for r in result["baselines"].values()
    ]
    assert [decimal(c) for c in cells] == [round(x - levels[0], 1) + 0.0 for x in levels[1:]]


@pytest.mark.parametrize("datasets", [("revos",), ("mevis",), ("mevis", "revos"), DATASETS])
@pytest.mark.parametrize("seed", range(4))
def test_tables_show_the_change_of_the_levels_beside_it(datasets, seed: int, tmp_path):
    run = write_run(tmp_path, datasets, seed)
    shown = 0
    for text, digits in ((summary_table(run), 3), (comparison_table([run]), 3)):
        for line in text.splitlines():
            decimals = 1 if "clips" in line or "J&F" in line else digits
            match = re.search(r"(-?[\d.]+) → (-?[\d.]+)[ |]+([-+][\d.]+)", line)
            if match:
                before, after, change = (decimal(x, decimals) for x in match.groups())
                assert change == round(after - before, decimals) + 0.0, line
                shown += 1
    assert shown >= 8
    for change in score_changes([run]):
        name = change.name.removeprefix("J&F ").partition(",")[0]
        if name != "all expressions":
            level = read(run, name)["checkpoints"]["sft"]["J&F"]
            if "over" not in change.name:
                assert change.before == pytest.approx([level], abs=1e-9)
        mean = change.after[0] - change.before[0]
        assert change.over_prompts.mean == pytest.approx(mean, abs=1e-9)
        assert change.over_runs.mean == pytest.approx(mean, abs=1e-9)


def test_the_mean_change_of_several_runs_is_that_of_their_levels(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(k), ("mevis", "revos"), k) for k in range(3)]
    lines = [line for line in comparison_table(runs).splitlines() if "J&F" in line]
    assert len(lines) == 9
    for line in lines:
        pairs = re.findall(rf"({NUMBER}) → ({NUMBER})", line)
        mean = re.search(r"\| ([-+]\d+\.\d) \| \[", line)
        expected = np.mean([float(b) - float(a) for a, b in pairs])
        assert float(mean.group(1)) == pytest.approx(expected, abs=0.0501)


def test_training_that_raises_the_plain_mean_can_lower_the_figure() -> None:
    """Many referring expressions gain a little, few reasoning ones lose much."""

    def result(referring: float, reasoning: float) -> dict:
        rows = [
            {"video": f"v{k}", "expression_id": "0", "subset": subset, "J&F": score, "J": score}
            | {"F": score}
            for k, (subset, score) in enumerate(
                [("referring", referring)] * 20 + [("reasoning", reasoning)] * 2
            )
        ]
        level = (referring + reasoning) / 2
        return {"benchmark": "revos", "J&F": level, "J": level, "F": level, "per_expression": rows}

    stages = {"sft": result(50.0, 58.4), "grpo-ktg": result(54.2, 41.6)}
    page = scores_section({"revos": stages["grpo-ktg"] | {"checkpoints": stages}})
    assert "<b>54.2</b>" in page and "<b>47.9</b>" in page
    assert '<span class="down">-6.3 [' in page


def test_duplicated_ids_count_as_often_as_in_the_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = [("clip", "0", "single_target")] * 3 + [("other", "0", "single_target")]
    stages = {name: evaluated("reasonvos", rng, clips) for name in ("sft", "grpo-ktg")}
    (tmp_path / "eval").mkdir()
    whole = stages["grpo-ktg"] | {"checkpoints": stages}
    (tmp_path / "eval" / "reasonvos.json").write_text(json.dumps(whole))
    (change,) = score_changes([tmp_path])
    assert change.before + change.after == pytest.approx([s["J&F"] for s in stages.values()])


def test_results_of_other_expressions_have_no_change() -> None:
    rng = np.random.default_rng(1)
    some = [("a", "0", "single_target"), ("b", "0", "single_target")]
    stages = {"sft": evaluated("mevis", rng, some[:1]), "grpo-ktg": evaluated("mevis", rng, some)}
    page = scores_section({"mevis": stages["grpo-ktg"] | {"checkpoints": stages}})
    assert "different expressions" in page


def test_shown_changes_are_differences_of_shown_levels() -> None:
    assert shown_change(54.24, 47.86, 1) == -6.3 != round(47.86 - 54.24, 1)
    assert f"{shown_change(1.04, 1.0, 1):+.1f}" == "+0.0"


def bootstrap(values, clips, parts, rng: np.random.Generator, draws: int = 4000) -> np.ndarray:
    """Return the statistic of `draws` samples of whole clips with replacement."""
    names = sorted(set(clips))
    members = {name: [k for k, clip in enumerate(clips) if clip == name] for name in names}
    out = []
    for _ in range(draws):
        drawn = [k for name in rng.choice(names, len(names)) for k in members[name]]
        sets = {p: [values[k] for k in drawn if parts[k] == p] for p in set(parts)}
        if all(sets.values()):
            out.append(np.mean([np.mean(s) for s in sets.values()]))
    return np.array(out)


def test_the_interval_agrees_with_a_paired_bootstrap_over_clips() -> None:
    rng = np.random.default_rng(3)
    clips = [f"clip-{k:02d}" for k in np.repeat(np.arange(60), 4)]
    parts = [str(p) for p in rng.choice(["referring", "reasoning"], len(clips), p=[0.7, 0.3])]
    shared = dict(zip(sorted(set(clips)), rng.normal(0, 8, 60), strict=True))
    values = [
        shared[c] + rng.normal(2 if p == "referring" else -6, 10)
        for c, p in zip(clips, parts, strict=True)
    ]
    interval = stratified_interval(values, clips, parts)
    draws = bootstrap(values, clips, parts, rng)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert interval.mean == pytest.approx(draws.mean(), abs=0.2)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.12 * (high - low))
    assert abs(np.mean(values) - interval.mean) > 1


def test_intervals_of_subset_means_cover_the_truth_95_times_in_100() -> None:
    """Also if one subset has few clips."""
    rng, held = np.random.default_rng(4), 0
    for _ in range(1500):
        clips = np.repeat(np.arange(25), 3)
        parts = ["few" if clip < 6 and k % 3 == 0 else "many" for k, clip in enumerate(clips)]
        values = rng.normal(size=25)[clips] + rng.normal(size=len(clips))
        interval = stratified_interval(values, clips.tolist(), parts)
        held += interval.low <= 0 <= interval.high
    assert 0.93 <= held / 1500 <= 0.99
