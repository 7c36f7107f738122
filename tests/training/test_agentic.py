"""Episodes of agentic AKS, played by policies of known behaviour."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.protocol.keyframe_selection import KeyframeSelection
from rcot_rl.protocol.row_clips import RowClip
from rcot_rl.training.agentic import EpisodeOutcome, episode_outcome, play_episode, start_selection

A = "<think>it is there</think><answer>A</answer>"
B = "<think>it is not</think><answer>B</answer>"


def picks(frame: object) -> str:
    return f"<think>that one</think><answer>{frame}</answer>"


def play(
    areas: list[int],
    rounds: int,
    judge: Callable[[KeyframeSelection], str],
    select: Callable[[KeyframeSelection], str],
    keyframe: int = 0,
) -> tuple[list[int], EpisodeOutcome]:
    """Play one episode; return its judged frames in order, and its outcome."""
    clip = RowClip([f"{i}.jpg" for i in range(len(areas))], keyframe, areas=areas)
    selection = start_selection(clip, rounds)
    judged = []

    async def take_turn(selection: KeyframeSelection) -> tuple[str | None, str]:
        task = selection.next_task
        if task == "aks":
            judged.append(selection.candidate)
        return task, judge(selection) if task == "aks" else select(selection)

    turns = asyncio.run(play_episode(selection, take_turn))
    assert turns[-1] == "aks", "the reward reads the last judgement, so it comes last"
    assert turns.count("aks") == len(judged)
    return judged, episode_outcome(selection, areas)


def test_an_accepted_first_frame_ends_the_episode() -> None:
    judged, outcome = play([5, 10], 5, lambda s: A, lambda s: picks(1))
    assert judged == [0]
    assert outcome == EpisodeOutcome(truth="A", area=0.5, judgements=1, judged=0, chosen=0)


def test_after_b_the_policys_own_choice_is_judged() -> None:
    areas = [0, 3, 12, 6]
    judged, outcome = play(areas, 5, lambda s: A if areas[s.candidate] else B, lambda s: picks(2))
    assert judged == [0, 2]
    assert (outcome["truth"], outcome["area"], outcome["judgements"]) == ("A", 1.0, 2)


@pytest.mark.parametrize("rounds", [0, 1])
def test_after_the_last_round_the_choice_stands_unjudged(rounds) -> None:
    judged, outcome = play([0, 0, 8], rounds, lambda s: B, lambda s: picks(2))
    assert judged == [0]
    assert (outcome["judged"], outcome["chosen"]) == (0, 2)
    assert (outcome["truth"], outcome["area"]) == ("B", 1.0)


def test_an_episode_without_a_judgement_has_no_outcome() -> None:
    with pytest.raises(ValueError, match="no judgement"):
        episode_outcome(KeyframeSelection(2, 0, max_rounds=3), [1, 2])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(1, 6),
    st.lists(st.sampled_from([A, B, "", "<answer>C</answer>"]), min_size=10, max_size=10),
    st.lists(st.sampled_from([*range(-1, 10), "no", ""]), min_size=10, max_size=10),
    st.data(),
)
def test_no_frame_is_judged_twice_whatever_the_policy_answers(
    areas, rounds, verdicts, choices, data
) -> None:
    judged, outcome = play(
        areas,
        rounds,
        lambda s: verdicts[s.rounds],
        lambda s: picks(choices[s.rounds]),
        keyframe=data.draw(st.integers(0, len(areas) - 1)),
    )
    assert len(judged) == len(set(judged))
    assert 1 <= outcome["judgements"] == len(judged) <= rounds
    assert 0 <= outcome["area"] <= 1 and outcome["judged"] == judged[-1]
    assert outcome["truth"] == ("A" if areas[judged[-1]] else "B")
    if not any(areas):
        assert outcome["area"] == 1
