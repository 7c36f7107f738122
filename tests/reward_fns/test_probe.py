"""The library of exploits: what it finds in public rewards, and what it does not find in ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.lab import exploits
from reward_fns.lab.probe import ROWS, probe, table


def paying(name: str) -> set[tuple[str, str]]:
    return {(f.exploit, f.row) for f in probe(load_reward(name)) if f.pays}


@pytest.mark.parametrize("name", ["aks", "ktg-zero-target", "joint", "ktg-reasoned"])
def test_no_exploit_pays_under_our_rewards(name: str) -> None:
    found = paying(name)
    # without zero_target, an empty ground truth pays nothing to anyone: the next test's
    assert found <= {("hallucination_on_nothing", "no object")}
    if name == "ktg-zero-target":
        assert not found


def test_without_zero_target_inventing_an_object_pays() -> None:
    assert paying("ktg") == {("hallucination_on_nothing", "no object")}


def test_the_public_reward_is_found_out() -> None:
    assert paying("visionreasoner") >= {
        ("overflowing_box", "one object"),
        ("two_answers", "one object"),
        ("answer_in_the_thought", "one object"),
        ("hallucination_on_nothing", "no object"),
    }


def test_nothing_is_slow() -> None:
    for name in ("ktg", "aks", "visionreasoner"):
        assert not [f.exploit for f in probe(load_reward(name)) if f.is_slow]


def test_a_users_substring_reward_is_found_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(response, ground_truth):\n    return float(ground_truth in response)\n"
    )
    reward = load_reward(f"{file}:score")
    try:
        with pytest.raises(InputError, match="needs --task"):
            probe(reward)
        found = {f.exploit for f in probe(reward, "aks") if f.earns >= f.best}
    finally:
        reward.close()  # type: ignore[attr-defined]
    assert {"list_of_options", "both_letters", "two_options"} <= found


def test_every_exploit_names_what_it_is() -> None:
    for exploit in (*exploits.KTG, *exploits.AKS):
        assert exploit.__doc__ and len(exploit.__doc__) > 6
    for task, library in (("ktg", exploits.KTG), ("aks", exploits.AKS)):
        for truth in ROWS[task].values():
            assert all(isinstance(exploit(truth), str) for exploit in library)


def test_the_table_lists_what_pays_first() -> None:
    lines = table(probe(load_reward("visionreasoner"))).splitlines()
    assert lines[1].endswith("PAYS")
    assert "earn what an honest attempt earns" in "".join(lines)
