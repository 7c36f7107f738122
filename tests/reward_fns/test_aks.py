"""The AKS reward: format 1, accuracy 2, and the public ways to cheat it."""

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward

AKS = load_reward("aks")


def say(answer):
    return f"<think>The cat leaves.</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("response", "fmt", "accuracy"),
    [
        (say("A"), 1.0, 1.0),
        (say(" A\n"), 1.0, 1.0),
        (say("B"), 1.0, 0.0),
        (say("C"), 0.0, 0.0),
        (say("a"), 0.0, 0.0),
        (say("A."), 0.0, 0.0),
        (say("A or B"), 0.0, 0.0),
        (say(""), 0.0, 0.0),
        ("<answer>A</answer>", 0.0, 1.0),
        ("A", 0.0, 0.0),
        (say("A") + say("B"), 0.0, 0.0),
        (say("A") + "<answer>A</answer>", 0.0, 0.0),
        ("<think>x<answer>A</answer></think>", 0.0, 0.0),
        ("", 0.0, 0.0),
        (None, 0.0, 0.0),
        (5, 0.0, 0.0),
    ],
)
def test_aks(response, fmt, accuracy):
    score = AKS.score(response, "A")
    assert score.components == {"format": fmt, "accuracy": accuracy}
    assert score.reward == fmt + 2 * accuracy
    assert bool(score.reasons) == (score.reward < 3.0)
    assert len(set(score.reasons)) == len(score.reasons)


def test_ground_truth_as_letter_or_json_text():
    assert AKS.max_reward == 3.0
    assert AKS.score(say("B"), "B") == AKS.score(say("B"), '"B"')
    for broken in ("C", "", None, 1, ["A"], "a", '"C"', "[" * 5000):
        with pytest.raises(InputError) as caught:
            AKS.score(say("A"), broken)
        assert caught.value.key == "ground_truth"
