"""Episodes of agentic AKS, played by policies of known behaviour."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from rcot_rl.training.agentic import Clip, Episode, read_clip

A = "<think>it is there</think><answer>A</answer>"
B = "<think>it is not</think><answer>B</answer>"


def picks(frame: object) -> str:
    return f"<think>that one</think><answer>{frame}</answer>"


def play(episode: Episode, judge, select) -> list[int]:
    """Candidates in the order in which they were judged."""
    seen = [episode.candidate]
    while episode.verdict(judge(episode)):
        if not episode.selection(select(episode)):
            break
        seen.append(episode.candidate)
    return seen


def clip_of(areas: list[int], keyframe: int = 0) -> Clip:
    return Clip([f"{i}.jpg" for i in range(len(areas))], keyframe, areas)


def test_a_first_frame_that_is_accepted_is_the_end() -> None:
    episode = Episode(clip_of([5, 10]), rounds=5)
    assert play(episode, lambda e: A, lambda e: picks(1)) == [0]
    assert episode.outcome() == {
        "truth": "A", "area": 0.5, "judgements": 1, "judged": 0, "chosen": 0,
    }  # fmt: skip


def test_on_b_the_policys_own_choice_is_judged() -> None:
    episode = Episode(clip_of([0, 3, 12, 6]), rounds=5)
    seen = play(
        episode, lambda e: A if e.clip.areas[e.candidate] else B, lambda e: picks(2)
    )  # fmt: skip
    assert seen == [0, 2]
    found = episode.outcome()
    assert (found["truth"], found["area"], found["judgements"]) == ("A", 1.0, 2)


def test_after_the_last_round_the_choice_stands_unjudged() -> None:
    episode = Episode(clip_of([0, 0, 8]), rounds=1)
    assert play(episode, lambda e: B, lambda e: picks(2)) == [0]
    found = episode.outcome()
    assert (found["judged"], found["chosen"]) == (0, 2)
    assert (found["truth"], found["area"]) == ("B", 1.0)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(1, 6),
    st.lists(st.sampled_from([A, B, "", "<answer>C</answer>"]), min_size=10, max_size=10),
    st.lists(st.sampled_from([*range(-1, 10), "no", ""]), min_size=10, max_size=10),
    st.data(),
)
def test_whatever_a_policy_says(areas, rounds, said, chosen, data) -> None:
    start = data.draw(st.integers(0, len(areas) - 1))
    episode = Episode(clip_of(areas, start), rounds)
    seen = play(
        episode,
        lambda e: said[e.judgements],
        lambda e: picks(chosen[e.judgements]),
    )
    assert len(seen) == len(set(seen)), "no frame is judged twice"
    assert 1 <= episode.judgements == len(seen) <= rounds
    found = episode.outcome()
    assert 0 <= found["area"] <= 1 and found["judged"] == seen[-1]
    assert found["truth"] == ("A" if areas[seen[-1]] else "B")
    if not any(areas):
        assert found["area"] == 1


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"clip": ""},
        {"clip": "[]"},
        {"clip": json.dumps({"frames": ["a"], "keyframe": 0})},
        {"clip": json.dumps({"frames": ["a"], "keyframe": 1, "areas": [1]})},
        {"clip": json.dumps({"frames": ["a"], "keyframe": 0, "areas": [1, 2]})},
    ],
)
def test_a_row_without_a_clip_is_refused(info) -> None:
    with pytest.raises(InputError, match=r"extra_info\.clip"):
        read_clip(info)
