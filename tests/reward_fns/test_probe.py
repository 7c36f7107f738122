"""The library of exploits: it pays under public rewards and not under the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.lab import exploits
from reward_fns.lab.probe import ROWS, probe, table


def paying(name: str) -> set[tuple[str, str]]:
    return {(f.exploit, f.row) for f in probe(load_reward(name)) if f.pays}


@pytest.mark.parametrize(
    "name",
    ["aks", "aks-answer-only", "ktg-answer-only", "ktg-zero-target", "joint", "ktg-reasoned"],
)
def test_no_exploit_pays_under_the_shipped_rewards(name: str) -> None:
    exploits_that_pay = paying(name)
    # without zero_target an empty ground truth pays nobody; see the next test
    assert exploits_that_pay <= {("hallucination_on_nothing", "no object")}
    if name == "ktg-zero-target":
        assert not exploits_that_pay


def test_inventing_an_object_pays_without_zero_target() -> None:
    assert paying("ktg") == {("hallucination_on_nothing", "no object")}


def test_known_exploits_pay_under_the_public_reward() -> None:
    assert paying("visionreasoner") >= {
        ("overflowing_box", "one object"),
        ("two_answers", "one object"),
        ("answer_in_the_thought", "one object"),
        ("hallucination_on_nothing", "no object"),
    }


def test_no_exploit_is_slow_to_score() -> None:
    for name in ("ktg", "aks", "visionreasoner"):
        assert not [f.exploit for f in probe(load_reward(name)) if f.is_slow]


def test_exploits_pay_under_a_substring_reward(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(response, ground_truth):\n    return float(ground_truth in response)\n"
    )
    reward = load_reward(f"{file}:score")
    try:
        with pytest.raises(InputError, match="needs --task"):
            probe(reward)
        winners = {f.exploit for f in probe(reward, "aks") if f.earns >= f.best}
    finally:
        reward.close()  # type: ignore[attr-defined]
    assert {"list_of_options", "both_letters", "two_options"} <= winners


def test_every_exploit_has_a_description() -> None:
    for exploit in (*exploits.KTG, *exploits.AKS):
        assert exploit.__doc__ and len(exploit.__doc__) > 6
    for task, library in (("ktg", exploits.KTG), ("aks", exploits.AKS)):
        for truth in ROWS[task].values():
            assert all(isinstance(exploit(truth), str) for exploit in library)


def test_the_table_lists_paying_exploits_first() -> None:
    lines = table(probe(load_reward("visionreasoner"))).splitlines()
    assert lines[1].endswith("PAYS")
    assert "earn what an honest attempt earns" in "".join(lines)
