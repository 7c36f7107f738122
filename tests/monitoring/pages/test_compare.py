"""`rcot compare`: pairing by name, both intervals, and runs that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.compare import compare, comparison_table, score_changes
from rcot_rl.monitoring.pages.compare_page import comparison_page
from rcot_rl.monitoring.terminal.run_summary import summary_table

T_OF_TWO_DEGREES = 4.302652729911275  # tables of Student's t, 97.5 %


def write_run(root: Path, gains: np.ndarray, jf: dict[str, list[float]], shuffle: int) -> Path:
    """Write rewards that rise by `gains` per prompt, with the prompts shuffled."""
    order = np.random.default_rng(shuffle).permutation(len(gains))
    names = [f"p{k}" for k in order]

    def way(values: np.ndarray) -> dict[str, object]:
        return {"mean": float(values.mean()), "per_prompt": values[order].tolist()}

    base = np.arange(len(gains)) / 10
    rewards = {
        "aks": {
            "sft": {"prompts": names, "sampled": way(base), "greedy": way(base)},
            "grpo-aks": {"prompts": names, "sampled": way(base + gains), "greedy": way(base)},
        }
    }
    (root / "predict").mkdir(parents=True)
    (root / "predict" / "rewards.json").write_text(json.dumps(rewards))
    (root / "eval").mkdir()
    rows = {
        stage: {
            "per_expression": [
                {"video": "v", "expression_id": str(k), "J&F": score}
                for k, score in enumerate(scores)
            ]
        }
        for stage, scores in jf.items()
    }
    (root / "eval" / "mevis.json").write_text(json.dumps({"checkpoints": rows}))
    return root


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    gains = np.array([[0.1, 0.3, 0.2, 0.2], [0.4, 0.2, 0.3, 0.3], [0.5, 0.7, 0.6, 0.6]])
    jf = {"sft": [50.0, 60.0, None], "grpo-aks": [55.0, 61.0, None]}
    return [write_run(tmp_path / f"seed{k}", gains[k], jf, k) for k in range(3)]


def test_intervals_are_students_over_prompts_and_over_runs(runs: list[Path]) -> None:
    sampled = next(c for c in compare(runs) if c.name == "aks sampled, grpo-aks")
    means = np.array([0.2, 0.3, 0.6])
    assert sampled.over_runs.mean == pytest.approx(means.mean())
    reach = T_OF_TWO_DEGREES * means.std(ddof=1) / np.sqrt(3)
    assert sampled.over_runs.high - sampled.over_runs.mean == pytest.approx(reach)
    per_prompt = np.array([1.0, 1.2, 1.1, 1.1]) / 3
    assert sampled.over_prompts.mean == pytest.approx(per_prompt.mean())
    assert sampled.over_prompts.n == 4
    assert sampled.before == pytest.approx([0.15] * 3)
    assert sampled.after == pytest.approx(0.15 + means)


def test_equal_rewards_have_a_change_of_zero(runs: list[Path]) -> None:
    greedy = next(c for c in compare(runs) if c.name == "aks greedy, grpo-aks")
    assert greedy.over_runs[:3] == (0.0, 0.0, 0.0)


def test_jf_is_paired_by_expression_without_unscored_ones(runs: list[Path]) -> None:
    jf = next(c for c in compare(runs) if c.name == "J&F mevis, grpo-aks")
    assert (jf.over_prompts.mean, jf.over_prompts.n) == (3.0, 1), "both expressions are of one clip"
    assert jf.over_prompts.low is None, "one clip has no variance"


def test_the_table_is_markdown_with_a_column_per_run(runs: list[Path]) -> None:
    lines = comparison_table(runs).splitlines()
    assert lines[0].split(" | ")[1:4] == ["seed0", "seed1", "seed2"]
    assert len({line.count("|") for line in lines}) == 1


def test_runs_with_other_prompts_are_refused(runs: list[Path]) -> None:
    path = runs[2] / "predict" / "rewards.json"
    path.write_text(path.read_text().replace("p3", "p9"))
    with pytest.raises(InputError, match="other prompts or expressions") as caught:
        compare(runs)
    assert caught.value.file == str(runs[2])


def test_a_run_without_results_is_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        compare([*runs, tmp_path / "none"])
    assert str(tmp_path / "none") in str(caught.value.file)


def write_metrics(runs: list[Path]) -> None:
    for run in runs:
        for stage in ("grpo-aks", "grpo-ktg"):
            (run / stage).mkdir()
            lines = [
                {
                    "step": k,
                    "reward/mean": k / 10,
                    "response_length/mean": 5.0,
                    "actor/kl_loss": 0.1,
                    "group/zero_variance_fraction": 0.2,
                    "actor/entropy": 0.3,
                    "timing_s/step": 9.0,
                }
                for k in range(1, 5)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run / stage / "metrics.jsonl").write_text(text)


def test_the_page_has_a_curve_per_run_and_refuses_runs_without_metrics(runs: list[Path]) -> None:
    write_metrics(runs)
    html = comparison_page(runs)
    assert html.count("<svg") == 12 and html.count("stroke: var(--s3)") == 12
    assert html.count("stroke: var(--ink)") == 12, "and a mean of the runs in each chart"
    (runs[1] / "grpo-ktg" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no metrics"):
        comparison_page(runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"aks": {"sft": {}, "grpo-aks": {}}}', "aks.sft.prompts: missing"),
        ('{"aks": {"sft": {"prompts": []}, "grpo-aks": {}}}', "aks.sft.sampled: missing"),
    ],
)
def test_a_malformed_file_is_named(runs: list[Path], text: str, message: str) -> None:
    path = runs[1] / "predict" / "rewards.json"
    for run in runs:
        (run / "predict" / "rewards.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        compare(runs[1:])
    assert caught.value.file == str(path)


def test_evaluations_without_checkpoints_are_named(runs: list[Path]) -> None:
    (runs[2] / "eval" / "mevis.json").write_text("{}")
    with pytest.raises(InputError, match="checkpoints: missing") as caught:
        compare(runs)
    assert caught.value.file == str(runs[2] / "eval" / "mevis.json")


def test_runs_without_a_finished_stage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predict").mkdir()
    (tmp_path / "predict" / "rewards.json").write_text('{"aks": {"sft": {}}}')
    with pytest.raises(InputError, match="no GRPO stage"):
        compare([tmp_path])


def revos(gains: dict[str, float]) -> dict:
    """Return a ReVOS result; its score does not count the no_target rows."""
    rows = [
        {"video": f"{subset}{k}", "expression_id": "0", "J&F": 50.0 + gain, "subset": subset}
        for subset, gain in gains.items()
        for k in range(5)
    ]
    return {"benchmark": "revos", "J&F": 50.0, "J": 50.0, "F": 50.0, "per_expression": rows}


def test_uncounted_subsets_do_not_enter_the_change(tmp_path: Path) -> None:
    """A loss on all counted subsets must not look like a gain because of an uncounted one."""
    before = revos({"referring": 0, "reasoning": 0, "no_target": -50})
    after = revos({"referring": -5, "reasoning": -5, "no_target": 50})
    (tmp_path / "eval").mkdir()
    text = json.dumps(after | {"checkpoints": {"sft": before, "grpo-ktg": after}})
    (tmp_path / "eval" / "revos.json").write_text(text)
    (change,) = score_changes([tmp_path])
    assert (change.over_prompts.mean, change.over_prompts.n) == (-5.0, 10)
    assert "-5.0 [-5.0, -5.0]" in " ".join(summary_table(tmp_path).split())


def test_unscored_benchmarks_are_skipped_and_nan_is_refused(runs: list[Path]) -> None:
    for run in runs:
        path = run / "eval" / "mevis.json"
        result = json.loads(path.read_text())
        for one in result["checkpoints"].values():
            for row in one["per_expression"]:
                row["J&F"] = None
        path.write_text(json.dumps(result))
    assert not any("mevis" in change.name for change in compare(runs))
    path = runs[1] / "predict" / "rewards.json"
    rewards = json.loads(path.read_text())
    rewards["aks"]["sft"]["greedy"]["per_prompt"][3] = float("nan")
    path.write_text(json.dumps(rewards))
    with pytest.raises(InputError, match="must be a finite number") as caught:
        compare(runs)
    assert caught.value.file == str(runs[1])


def test_the_page_names_missing_curves_and_broken_files(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="7 runs"):
        comparison_page([runs[0]] * 7)
    write_metrics(runs)
    for run in runs:
        path = run / "grpo-aks" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["response_length/mean"] = float("nan")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Response length, tokens (response_length/mean) of grpo-aks" in comparison_page(runs)
    path = runs[0] / "grpo-ktg" / "metrics.jsonl"
    path.write_text("{not json}\n" + path.read_text())
    with pytest.raises(InputError, match="not valid JSON") as caught:
        comparison_page(runs)
    assert caught.value.file == str(path)


def test_each_row_of_the_page_says_what_it_means(runs: list[Path]) -> None:
    write_metrics(runs)
    html = comparison_page(runs)
    changes = compare(runs)
    assert len(changes) == 3
    for change in changes:
        assert change.meaning and change.meaning.replace("&", "&amp;") in html
    assert "sampled responses (what training optimizes): reward after grpo-aks minus " in html
    # Sampled rewards rise in every run, but three runs vary: 0.37 +- 0.52 includes 0.
    assert '<b class="soft">No change shown</b>: aks sampled, grpo-aks' in html
    alone = comparison_page(runs[:1])
    assert "its prompts or clips are the sample" in alone
    assert '<b class="up">Rose</b>: aks sampled, grpo-aks' in alone, "0.2 +- 0.13 over prompts"
