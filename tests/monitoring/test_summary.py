"""What `rcot eval` says of predictions that it could not use."""

from __future__ import annotations

from rcot_rl.monitoring.summary import LISTED, fault_lines


def test_faults_are_counted_and_the_first_are_named() -> None:
    result = {
        "missing": [f"clip/{n}" for n in range(LISTED + 3)],
        "faults": [{"place": "clip/0/00000.png", "reason": "is 12 x 10, not 144 x 192"}],
        "unscorable": [{"place": "clip/9", "reason": "no_annotation"}],
    }
    missing, faults, unscorable = fault_lines(result)
    assert missing.startswith(f"{LISTED + 3} predictions are missing and count 0: clip/0; clip/1")
    assert missing.endswith(f"clip/{LISTED - 1}; …")
    assert faults.startswith("1 ") and "clip/0/00000.png is 12 x 10, not 144 x 192" in faults
    assert unscorable.startswith("1 ") and unscorable.endswith("clip/9 no_annotation")


def test_nothing_is_said_of_whole_predictions() -> None:
    assert fault_lines({"missing": [], "faults": [], "unscorable": []}) == []
