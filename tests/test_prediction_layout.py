"""Where predictions lie, and that no id of a corpus leads out of their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.prediction_layout import (
    benchmark_name,
    benchmark_predictions,
    expression_folder,
    heldout_rewards_file,
    mask_file,
)

RUN = Path("/run")


def test_splits_of_a_dataset_have_different_names() -> None:
    assert benchmark_name("mevis", "valid_u") == "mevis-valid_u"


def test_predictions_of_the_last_checkpoint_have_their_own_folder() -> None:
    assert benchmark_predictions(RUN, "mevis") == RUN / "predictions" / "mevis"
    assert benchmark_predictions(RUN, "mevis", "sft") == RUN / "predict" / "sft" / "mevis"
    assert heldout_rewards_file(RUN) == RUN / "predict" / "rewards.json"


def test_an_expressions_masks_lie_below_its_video() -> None:
    folder = expression_folder(RUN, "UVO/one", "3")
    assert mask_file(folder, "00005") == RUN / "UVO" / "one" / "3" / "00005.png"


@pytest.mark.parametrize("allow_hidden", [False, True])
@pytest.mark.parametrize("odd", ["../up", "/root", "a/../../b", "", ".", "a\\b", "a\0b"])
def test_ids_that_lead_elsewhere_are_refused(odd: str, allow_hidden: bool) -> None:
    for ids in ((odd, "0"), ("v", odd)):
        with pytest.raises(InputError, match="cannot name a folder"):
            expression_folder(RUN, *ids, allow_hidden=allow_hidden)


def test_hidden_ids_are_refused_unless_allowed() -> None:
    with pytest.raises(InputError, match="cannot name a folder"):
        expression_folder(RUN, "a/.hidden", "0")
    assert expression_folder(RUN, ".a", "0", allow_hidden=True) == RUN / ".a" / "0"
