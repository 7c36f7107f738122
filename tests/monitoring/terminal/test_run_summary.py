"""Text of run summaries and of `rcot eval`: scores, changes, and faults of the input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.terminal.run_summary import LISTED, fault_lines, score_text, summary_table
from rcot_rl.recipe.loader import load_recipe


def test_faults_are_counted_and_the_first_are_named() -> None:
    result = {
        "missing": [f"clip/{n}" for n in range(LISTED + 3)],
        "faults": [{"place": "clip/0/00000.png", "reason": "is 12 x 10, not 144 x 192"}],
        "defects": [
            {"file": "mask_dict.json", "key": "7", "reason": "mask_count", "effect": "counts 0"}
        ],
        "unexpected": [
            {"place": f"clip/{n}", "reason": "00005.png", "cause": "names are shifted by one"}
            for n in range(2)
        ]
        + [{"place": "clip/3", "reason": "1 folder", "cause": ""}],
    }
    missing, faults, defects, shifted, other = fault_lines(result)
    assert missing.startswith(f"{LISTED + 3} predictions are missing and count 0: clip/0; clip/1")
    assert missing.endswith(f"clip/{LISTED - 1}; …")
    assert faults.startswith("1 ") and "clip/0/00000.png is 12 x 10, not 144 x 192" in faults
    assert defects.startswith("1 ") and "mask_dict.json: 7: mask_count (counts 0)" in defects
    assert shifted.startswith("2 unexpected names or values: names are shifted by one: clip/0 (0")
    assert "cause unknown" in other


def test_counts_of_faults_follow_the_score() -> None:
    result = {"J": 1.0, "F": 2.0, "J&F": 1.5, "n_expressions": 120}
    assert score_text(result).split() == ["1.5", "(J", "1.0,", "F", "2.0)"]
    text = score_text(result | {"n_defective": 2, "n_unusable": 0, "n_unexpected": 7})
    assert text.endswith(
        "of 120 expressions: 2 with defective ground truth, 7 with unexpected names or values"
    )


def test_faultless_input_has_no_lines() -> None:
    assert fault_lines({"missing": [], "faults": [], "defects": [], "unexpected": []}) == []


def test_changes_of_jf_have_an_interval_over_clips(tmp_path: Path) -> None:
    def rows(*scores: float) -> dict[str, object]:
        listed = [
            {"video": f"clip{k // 2}", "expression_id": str(k), "J&F": score}
            for k, score in enumerate(scores)
        ]
        mean = sum(scores) / len(scores)
        return {"J": mean, "F": mean, "J&F": mean, "per_expression": listed}

    trained, start = rows(60.0, 70.0, 50.0, 40.0), rows(50.0, 60.0, 52.0, 42.0)
    result = {"checkpoints": {"sft": start, "grpo-ktg": trained}, "baselines": {}, "segmenter": "x"}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mevis.json").write_text(json.dumps(result))
    header, line = summary_table(tmp_path).split("J&F, mevis", 1)[1].splitlines()[:2]
    assert header.split() == ["before", "→", "after", "change", "95", "%", "interval", "clips"]
    # +10 and -2 per clip: mean 4, half width t(0.975, 1) = 12.706 times 6.
    shown = "grpo-ktg 51.0 → 55.0 +4.0 [-72.2, +80.2] 2"
    assert line.split() == shown.split()


def rewards_of(root: Path, **values: list[float]) -> None:
    def one(per_prompt: list[float]) -> dict:
        mean = sum(per_prompt) / len(per_prompt)
        return {way: {"mean": mean, "per_prompt": per_prompt} for way in ("sampled", "greedy")}

    (root / "predict").mkdir(parents=True, exist_ok=True)
    path = root / "predict" / "rewards.json"
    names = {name.replace("_", "-"): one(v) for name, v in values.items()}
    path.write_text(json.dumps({"aks": names}))


def test_the_last_checkpoint_stands_in_for_one_that_was_not_measured(tmp_path: Path) -> None:
    rewards_of(tmp_path, sft=[0.0, 1.0, 0.0], grpo_ktg=[1.0, 1.0, 1.0])
    table = summary_table(tmp_path)
    assert table.count("after grpo-ktg") == 2 and "0.333 → 1.000" in table
    rewards_of(tmp_path, sft=[0.0, 1.0], grpo_aks=[1.0, 1.0], grpo_ktg=[0.0, 0.0])
    assert summary_table(tmp_path).count("after grpo-ktg") == 2, "no record names AKS's stage"
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"recipe": load_recipe("laptop").model_dump(mode="json")})
    )
    table = summary_table(tmp_path)
    assert table.count("after grpo-aks") == 2 and "0.500 → 1.000" in table


def test_before_is_the_checkpoint_that_the_stage_started_from(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"recipe": load_recipe("laptop").model_dump(mode="json")})
    )
    rewards_of(tmp_path, sft=[0.0, 0.0], grpo_aks=[1.0, 0.0], grpo_ktg=[1.0, 1.0])
    path = tmp_path / "predict" / "rewards.json"
    path.write_text(path.read_text().replace('"aks": {', '"ktg": {'))
    assert summary_table(tmp_path).count("0.500 → 1.000") == 2
    rewards_of(tmp_path, sft=[0.0, 0.0], grpo_ktg=[1.0, 1.0])
    path.write_text(path.read_text().replace('"aks": {', '"ktg": {'))
    assert summary_table(tmp_path).count("0.000 → 1.000") == 2, "its start was not scored"


def test_one_prompt_has_no_interval_and_nan_no_change(tmp_path: Path) -> None:
    rewards_of(tmp_path, sft=[0.0], grpo_aks=[1.0])
    (row, _) = [r.split() for r in summary_table(tmp_path).splitlines() if "0.000 → 1.000" in r]
    assert row[-2:] == ["+1.000", "1"]
    rewards_of(tmp_path, sft=[0.0, 1.0], grpo_aks=[float("nan"), 1.0])
    assert " unknown  " in summary_table(tmp_path)


def test_a_run_is_summed_up_in_80_columns_with_the_verdict_first_and_the_report_last(
    make_run: Callable[..., Path],
) -> None:
    run = make_run()
    (run / "report.html").write_text("page")
    table = summary_table(run)
    lines = table.splitlines()
    assert max(len(line) for line in lines if str(run) not in line) <= 80
    headline = judge_run(RunReader(run)).headline
    assert " ".join(table.split()).startswith("─" * 80 + " " + " ".join(headline.split()))
    starts = [
        "held-out reward",
        "J&F, reasonvos-valid ",
        "J&F of reasonvos-valid",
        "minutes",
        "memory",
        "report",
    ]
    places = [next(n for n, row in enumerate(lines) if row.startswith(s)) for s in starts]
    assert places == sorted(places), "changes before levels, the report last"
    assert lines[-2] == f"report   {run / 'report.html'}"


@pytest.mark.parametrize("name", ["predict/rewards.json", "eval/mevis.json", "data/done.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text('{"aks"')
    with pytest.raises(InputError, match="not readable as JSON") as caught:
        summary_table(tmp_path)
    assert caught.value.file == str(path)
