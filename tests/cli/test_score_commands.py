"""`rcot score` and its subcommands, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rcot_rl.errors import InputError

GOOD = {"response": "<think>t</think><answer>B</answer>", "ground_truth": "A", "id": 7}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def test_the_command_name_is_optional_for_a_reward(
    rows: Path, invoke: Callable[..., Result]
) -> None:
    plain = invoke("score", "aks", "--in", rows)
    named = invoke("score", "responses", "aks", "--in", rows)
    assert plain.exit_code == 0 and plain.stdout == named.stdout
    assert json.loads(plain.stdout) == {
        "reward": 1.0,
        "components": {"format": 1.0, "accuracy": 0.0},
        "reasons": ["option_wrong"],
        "id": 7,
    }
    assert invoke("score", "--in", rows, "aks").stdout == plain.stdout


def test_overrides_reach_the_recipe(rows: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("score", "aks", "components.format.weight=0.5", "--in", rows)
    assert json.loads(result.stdout)["reward"] == 0.5
    with pytest.raises(InputError, match="did you mean") as caught:
        raise invoke("score", "aks", "components.format.wieght=1", "--in", rows).exception
    assert caught.value.key == "components.format.wieght"
    with pytest.raises(InputError, match="is not a YAML value"):
        raise invoke("score", "aks", "canvas=2020-13-45", "--in", rows).exception


def test_explain_prints_the_loss_and_one_json_document(
    rows: Path, invoke: Callable[..., Result]
) -> None:
    assert (
        "-2.0000  accuracy: option_wrong" in invoke("score", "explain", "aks", "--in", rows).stdout
    )
    document = json.loads(invoke("score", "explain", "aks", "--in", rows, "--json").stdout)
    assert document["losses"] == [
        {"component": "accuracy", "reason": "option_wrong", "points": 2.0, "where": ""}
    ]
    with pytest.raises(InputError, match="no such line") as caught:
        raise invoke("score", "explain", "aks", "--in", rows, "--line", 9).exception
    assert caught.value.line == 9


def test_probe_exits_with_2_only_if_strict(invoke: Callable[..., Result]) -> None:
    assert invoke("score", "probe", "ktg").exit_code == 0
    assert invoke("score", "probe", "ktg", "--strict").exit_code == 2
    assert invoke("score", "probe", "ktg-zero-target", "--strict").exit_code == 0


def test_check_exits_with_2_for_a_broken_contract(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    good = invoke("score", "--check", "aks")
    assert good.exit_code == 0 and "0 errors" in good.stdout
    bad = tmp_path / "bad.py"
    bad.write_text("def score(response, ground_truth):\n    return 'much'\n")
    result = invoke("score", f"{bad}:score", "--check")
    assert result.exit_code == 2 and result.stderr.startswith(f"rcot: {bad}:score: result: ")
    assert all(line.startswith(f"rcot: {bad}:score: ") for line in result.stderr.splitlines())


def test_replay_needs_two_rewards_and_a_run(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    with pytest.raises(InputError, match="two rewards"):
        raise invoke("score", "replay", tmp_path, "--reward", "ktg").exception
    with pytest.raises(InputError, match="name the folder of a run"):
        raise invoke("score", "replay", tmp_path, "--reward", "ktg", "--reward", "aks").exception
