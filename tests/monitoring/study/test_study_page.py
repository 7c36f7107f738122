"""The page of a study: its tables, and sentences that do not claim too much."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.study.study_effects import Effect
from rcot_rl.monitoring.study.study_page import study_page, write_page
from rcot_rl.monitoring.study.study_results import StudyResults, write_results
from rcot_rl.monitoring.study.study_sentences import effect_sentence, order_sentence
from rcot_rl.stats.intervals import Interval

Values = Callable[..., dict[str, Any]]


def page_of(values: dict[str, Any]) -> str:
    return study_page(StudyResults.model_validate(values))


def section(page: str, title: str) -> str:
    return re.split(r"\n#+ ", page.split(f" {title}\n", 1)[1])[0]


def interval(low: float | None, high: float | None) -> Interval:
    mean = 0.0 if low is None or high is None else (low + high) / 2
    return Interval(mean, low, high, 9)


def test_the_page_has_the_tables_that_were_measured(study_values: Values) -> None:
    page = page_of(study_values())
    assert re.findall(r"### Table (\d+)", page) == ["5", "13", "15"]
    table = section(page, "Table 5: Training strategies (A is AKS, G is KTG)")
    # the paper's levels are in parentheses in its own columns
    assert "(14.7)" in table and "(13.7)" in table and "| SFT(A,G) | training: sft |" in table
    assert re.search(r"\| SFT\(A,G\) \| all \| -\d\.\d\d \| \[-.*\] \| \[-.*\] \| -6\.1 \|", table)
    assert "Not measured: GRPO(A,G), SFT(A,G) + GRPO(G), SFT(G) + GRPO(A,G)." in table


def test_findings_say_what_is_shown_and_what_is_not(study_values: Values) -> None:
    page = page_of(study_values())
    findings = section(page, "What the study shows").splitlines()
    (grpo,) = (line for line in findings if line.startswith("- GRPO"))
    assert "interval excludes zero over clips and over seeds: shown." in grpo
    (base,) = (line for line in findings if line.startswith("- Table 5: base:"))
    assert base.endswith("shown; the paper has -47.0, the same sign.")
    (order,) = (line for line in findings if "order" in line and "base" in line)
    assert "holds in the means: base < SFT(A,G) < SFT(A,G) + GRPO(A,G); 3 of 3 pairs" in order
    (area,) = (line for line in findings if line.startswith("- Table 13: area ratio after AKS"))
    assert "+5.00 percentage points" in area
    rewards = [line for line in findings if line.startswith("- Held-out reward of KTG")]
    assert len(rewards) == 2 and all("after last against sft" in line for line in rewards)
    alone = section(page_of(study_values(seeds=(2,))), "What the study shows")
    assert "not shown: there is only one seed" in alone and ": shown" not in alone


def test_zero_target_training_is_compared_with_the_main_result(study_values: Values) -> None:
    values = study_values()
    for run in values["runs"]:
        cell = run["scores"]["revos-valid"]["last"]
        is_on = run["recipe"] == "zero_target"
        cell["empty"] = [int(is_on and s == "no_target") for s in
                         values["benchmarks"]["revos-valid"]["subset"]]  # fmt: skip
        cell["found"] = [1 - empty for empty in cell["empty"]]
    table = section(page_of(values), "Training with absent targets")
    assert "| zero\\_target: last | revos N-Acc | 0.0 | 100.0 | +100.00 |" in table
    assert "| zero\\_target: last | revos T-Acc | 100.0 | 100.0 | +0.00 |" in table
    for run in values["runs"]:
        run["zero_target"] = False
    assert "Training with absent targets" not in page_of(values)


def test_sentences_of_effects() -> None:
    both = Effect([1.0], interval(0.5, 1.5), interval(0.1, 1.9), False)
    assert effect_sentence("AKS", both, "none", paper=1.5) == (
        "AKS: +1.00 J&amp;F against none, interval excludes zero over clips and over seeds: shown; "
        "the paper has +1.5, the same sign."
    )
    assert "the opposite sign" in effect_sentence("AKS", both, "none", paper=-1.5)
    assert "sign" not in effect_sentence("AKS", both, "none", paper=0.04), "no sign to compare"
    clips = Effect([1.0], interval(0.5, 1.5), interval(-1.0, 3.0), False)
    text = effect_sentence("AKS", clips, "none", paper=1.5)
    assert "not shown: the interval over seeds [-1.00, +3.00] includes zero" in text
    assert "sign" not in text, "a sign that is not shown is not compared"
    equal = Effect([0.0], interval(0.0, 0.0), interval(0.0, 0.0), True)
    assert "all scores are equal" in effect_sentence("AKS", equal, "none")


def test_sentences_of_orders() -> None:
    paper = {"a": 1.0, "b": 2.0, "c": 3.0}
    holds = order_sentence({"a": 10, "b": 20, "c": 30}, paper, [("a", "b"), ("a", "c")])
    assert holds == (
        "The paper's order of rows holds in the means: a < b < c; 3 of 3 pairs are in the paper's "
        "order (2 shown)."
    )
    fails = order_sentence({"a": 10, "b": 30, "c": 20}, paper, [("a", "b"), ("c", "b")])
    assert fails == (
        "The paper's order of rows does not hold in the means: b is above c; 2 of 3 pairs are in "
        "the paper's order (1 shown), 1 in the opposite one (1 shown)."
    )
    equal = order_sentence({"a": 10, "b": 10, "c": 10}, paper, [])
    assert "a is equal to b" in equal and equal.endswith("order (0 shown), 3 equal.")
    assert order_sentence({"a": 1, "b": 2}, paper, [("a", "b")]) == ""


def test_texts_of_results_have_no_markup(study_values: Values) -> None:
    values = study_values()
    for run in values["runs"]:
        run["command"] = "rcot <script>alert(1)</script> | [x](javascript:y) `z`\n# title"
    page = page_of(values)
    assert "<script" not in page and "\n# title" not in page
    assert "(javascript" in page and not re.search(r"(?<!\\)\]\(javascript", page)


def test_the_page_is_written_from_results_alone(tmp_path: Path, study_values: Values) -> None:
    results = StudyResults.model_validate(study_values())
    write_results(results, tmp_path)
    assert write_page(tmp_path).read_text() == study_page(results)
    write_results(StudyResults(benchmarks=results.benchmarks, runs=[]), tmp_path)
    with pytest.raises(InputError, match="runs: has no run"):
        write_page(tmp_path)
