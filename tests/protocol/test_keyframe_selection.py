"""The rules of keyframe selection, and that inference and the rollout follow the same ones."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.policy import PolicyResponse
from rcot_rl.inference.query_trace import VideoClip
from rcot_rl.protocol.keyframe_selection import (
    MAX_REASON,
    KeyframeSelection,
    farthest,
    reason_line,
)
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.protocol.row_clips import RowClip
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.training.agentic import play_episode, start_selection

VERDICTS = ("A", "B", "B", "B", "C", None)


def response(answer: object) -> str:
    return "" if answer is None else f"<think>so</think><answer>{answer}</answer>"


def test_a_selection_without_rounds_keeps_its_candidate() -> None:
    selection = KeyframeSelection(5, candidate=3, max_rounds=0)
    assert (selection.next_task, selection.candidate, selection.judged) == (None, 3, None)
    with pytest.raises(ValueError, match="has ended"):
        selection.advance(response("A"))


@pytest.mark.parametrize(("answer", "fault"), [("7", "refused_frame"), ("x", "no_keyframe")])
def test_a_reselection_without_a_new_frame_takes_the_farthest(answer: str, fault: str) -> None:
    selection = KeyframeSelection(10, candidate=7, max_rounds=2)
    selection.advance(response("B"))
    selection.advance(response(answer))
    assert (selection.candidate, selection.faults) == (0, [f"kfg_again:{fault}"])


def test_a_reselection_on_a_sample_of_the_clip_maps_positions_to_frames() -> None:
    selection = KeyframeSelection(100, candidate=24, max_rounds=3, shown=(12, 37, 62, 87))
    selection.advance(response("B"))
    assert selection.refused_positions() == [(0, "so")]  # 24 is nearest to 12, at position 0
    selection.advance(response("0"))
    assert selection.candidate == 12
    selection.advance(response("B"))
    assert selection.refused_positions() == [(0, "so")]
    selection.advance(response("2"))
    assert selection.candidate == 62


def test_the_likeliest_refused_frame_stands_and_ties_go_to_the_earliest() -> None:
    selection = KeyframeSelection(9, candidate=4, max_rounds=3, on_exhausted="likeliest")
    for choice, probability in (("7", 0.2), ("1", 0.3), (None, 0.3)):
        selection.advance(response("B"), probability)
        if choice is not None:
            selection.advance(response(choice))
    assert (selection.next_task, selection.candidate) == (None, 7)


def test_the_likeliest_frame_needs_probabilities() -> None:
    selection = KeyframeSelection(9, candidate=4, max_rounds=3, on_exhausted="likeliest")
    with pytest.raises(ValueError, match="probability"):
        selection.advance(response("B"))


@given(st.text(max_size=600))
def test_a_reason_is_one_short_line_that_keeps_the_end(thought: str) -> None:
    line = reason_line(thought)
    assert len(line) <= MAX_REASON + 2
    assert line == " ".join(line.split())
    flat = " ".join(thought.split())
    assert line == flat if len(flat) <= MAX_REASON else flat.endswith(line.removeprefix("… "))


@given(st.integers(1, 40), st.data())
def test_the_farthest_frame_is_new_and_no_other_is_farther(n_frames, data) -> None:
    refused = data.draw(
        st.lists(st.integers(0, n_frames - 1), min_size=1, max_size=n_frames - 1 or 1, unique=True)
    )
    chosen = farthest(n_frames, refused)
    distance = min(abs(chosen - r) for r in refused)
    for other in range(n_frames):
        away = min(abs(other - r) for r in refused)
        assert away <= distance
        assert away < distance or other >= chosen
    assert len(refused) == n_frames or chosen not in refused


class ScriptedPolicy:
    """Answer judgements and re-selections from two lists, and record each turn's prompt."""

    def __init__(self, start: int, verdicts: list[object], choices: list[object]) -> None:
        self.start = start
        self.answers = {"aks": deque(verdicts), "kfg_again": deque(choices)}
        self.turns: list[tuple[str, object]] = []
        """("aks", judged frame) or ("kfg_again", rejected positions)."""

    async def generate(self, request, sampling, started=None):
        return [PolicyResponse(self.respond(request))]

    def count_tokens(self, text):
        return 0

    def most_frames(self, side, text_tokens):
        return 1000

    def respond(self, request) -> str:
        task, _, rejected = request.text.partition("|")
        if task == "kfg":
            return response(self.start)
        if task == "aks":
            return self.take(task, int(request.image[0, 0, 0]))
        if task == "kfg_again":
            return self.take(task, [int(position) for position in rejected.split(", ")])
        return response("[]")

    def take(self, task: str, shown: object) -> str:
        self.turns.append((task, shown))
        return response(self.answers[task].popleft())


PROMPTS = Prompts(
    "scripted", {"kfg": "kfg", "aks": "aks", "kfg_again": "kfg_again|$rejected", "ktg": "ktg"}
)


def infer(policy: ScriptedPolicy, n_frames: int, rounds: int) -> tuple[int, int]:
    """Return the keyframe and the number of judgements of the pipeline."""
    settings = PredictSection(vdg=False, rounds=rounds).reasoning()
    clip = VideoClip("v", n_frames, lambda i: np.full((28, 28, 3), i, np.uint8))

    async def one():
        canvas = CanvasSection(image=28, video=28)
        return await VideoReasoner(clip, policy, PROMPTS, canvas).trace("the cat", settings)

    trace = asyncio.run(one())
    return trace.keyframe, trace.rounds


def roll_out(policy: ScriptedPolicy, n_frames: int, rounds: int) -> tuple[int, int, list[str]]:
    """Return chosen frame, number of judgements and the turns' tasks of the agentic rollout."""
    clip = RowClip([f"{i}.png" for i in range(n_frames)], policy.start)
    selection = start_selection(clip, rounds)

    async def take_turn(selection: KeyframeSelection) -> tuple[str, str]:
        task = selection.next_task
        assert task is not None
        await asyncio.sleep(0)
        shown: object = selection.candidate
        if task == "kfg_again":
            shown = [position for position, _ in selection.refused_positions()]
        return task, policy.take(task, shown)

    turns = asyncio.run(play_episode(selection, take_turn))
    return selection.candidate, selection.rounds, turns


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 7),
    st.lists(st.sampled_from(VERDICTS), min_size=7, max_size=7),
    st.lists(st.sampled_from([*range(10), "no", None]), min_size=7, max_size=7),
    st.data(),
)
def test_inference_and_rollout_visit_the_same_frames_in_the_same_order(
    n_frames, rounds, verdicts, choices, data
) -> None:
    start = data.draw(st.integers(0, n_frames - 1))
    inference, rollout = (ScriptedPolicy(start, verdicts, choices) for _ in range(2))
    keyframe, judgements = infer(inference, n_frames, rounds)
    chosen, rollout_judgements, turns = roll_out(rollout, n_frames, rounds)
    assert inference.turns == rollout.turns
    assert (keyframe, judgements) == (chosen, rollout_judgements)
    assert turns[-1] == "aks" and turns.count("aks") == judgements
    judged = [shown for task, shown in rollout.turns if task == "aks"]
    assert len(judged) == len(set(judged)) <= rounds
