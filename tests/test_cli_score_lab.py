"""`rcot score` and the commands beside it, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rcot_rl.cli.main import app
from rcot_rl.errors import InputError

GOOD = {"response": "<think>t</think><answer>B</answer>", "ground_truth": "A", "id": 7}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def rcot(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def test_a_reward_needs_no_commands_name(rows: Path) -> None:
    plain = rcot("score", "aks", "--in", rows)
    named = rcot("score", "responses", "aks", "--in", rows)
    assert plain.exit_code == 0 and plain.stdout == named.stdout
    assert json.loads(plain.stdout) == {
        "reward": 1.0,
        "components": {"format": 1.0, "accuracy": 0.0},
        "reasons": ["option_wrong"],
        "id": 7,
    }
    assert rcot("score", "--in", rows, "aks").stdout == plain.stdout


def test_overrides_reach_the_recipe(rows: Path) -> None:
    found = rcot("score", "aks", "components.format.weight=0.5", "--in", rows)
    assert json.loads(found.stdout)["reward"] == 0.5
    with pytest.raises(InputError, match="did you mean") as caught:
        raise rcot("score", "aks", "components.format.wieght=1", "--in", rows).exception
    assert caught.value.key == "components.format.wieght"
    with pytest.raises(InputError, match="is not a YAML value"):
        raise rcot("score", "aks", "canvas=2020-13-45", "--in", rows).exception


def test_explain_prints_the_loss_and_one_json_document(rows: Path) -> None:
    assert "-2.0000  accuracy: option_wrong" in rcot("score", "explain", "aks", "--in", rows).stdout
    found = json.loads(rcot("score", "explain", "aks", "--in", rows, "--json").stdout)
    assert found["losses"] == [
        {"component": "accuracy", "reason": "option_wrong", "points": 2.0, "where": ""}
    ]
    with pytest.raises(InputError, match="no such line") as caught:
        raise rcot("score", "explain", "aks", "--in", rows, "--line", 9).exception
    assert caught.value.line == 9


def test_probe_is_strict_on_demand() -> None:
    assert rcot("score", "probe", "ktg").exit_code == 0
    assert rcot("score", "probe", "ktg", "--strict").exit_code == 2
    assert rcot("score", "probe", "ktg-zero-target", "--strict").exit_code == 0


def test_check_holds_a_reward_to_its_contract(tmp_path: Path) -> None:
    good = rcot("score", "--check", "aks")
    assert good.exit_code == 0 and "0 errors" in good.stdout
    bad = tmp_path / "bad.py"
    bad.write_text("def score(response, ground_truth):\n    return 'much'\n")
    held = rcot("score", f"{bad}:score", "--check")
    assert held.exit_code == 2 and held.stderr.startswith(f"rcot: {bad}:score: result: ")
    assert all(line.startswith(f"rcot: {bad}:score: ") for line in held.stderr.splitlines())


def test_replay_wants_two_rewards_and_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two rewards"):
        raise rcot("score", "replay", tmp_path, "--reward", "ktg").exception
    with pytest.raises(InputError, match="no such run"):
        raise rcot("score", "replay", tmp_path, "--reward", "ktg", "--reward", "aks").exception
