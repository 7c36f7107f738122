"""The AKS reward: format at most 1, accuracy at most 2, and known ways to cheat."""

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.lab.exploits import well_formed

AKS = load_reward("aks")


@pytest.mark.parametrize(
    ("response", "fmt", "accuracy"),
    [
        (well_formed("A"), 1.0, 1.0),
        (well_formed(" A\n"), 1.0, 1.0),
        (well_formed("B"), 1.0, 0.0),
        (well_formed("C"), 0.0, 0.0),
        (well_formed("a"), 0.0, 0.0),
        (well_formed("A."), 0.0, 0.0),
        (well_formed("A or B"), 0.0, 0.0),
        (well_formed(""), 0.0, 0.0),
        ("<answer>A</answer>", 0.0, 1.0),
        ("A", 0.0, 0.0),
        (well_formed("A") + well_formed("B"), 0.0, 0.0),
        (well_formed("A") + "<answer>A</answer>", 0.0, 0.0),
        ("<think>x<answer>A</answer></think>", 0.0, 0.0),
        ("", 0.0, 0.0),
        (None, 0.0, 0.0),
        (5, 0.0, 0.0),
    ],
)
def test_components_equal_values_by_hand(response, fmt, accuracy):
    score = AKS.score(response, "A")
    assert score.components == {"format": fmt, "accuracy": accuracy}
    assert score.reward == fmt + 2 * accuracy
    assert bool(score.reasons) == (score.reward < 3.0)
    assert len(set(score.reasons)) == len(score.reasons)


def test_ground_truth_is_a_letter_or_its_json_text():
    assert AKS.max_reward == 3.0
    assert AKS.score(well_formed("B"), "B") == AKS.score(well_formed("B"), '"B"')
    for broken in ("C", "", None, 1, ["A"], "a", '"C"', "[" * 5000):
        with pytest.raises(InputError) as caught:
            AKS.score(well_formed("A"), broken)
        assert caught.value.key == "ground_truth"
