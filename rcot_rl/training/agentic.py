"""Agentic keyframe selection as an episode of the rollout, without verl, vLLM or torch.

An episode drives the state machine of inference (`rcot_rl.protocol.keyframe_selection`) on the
frames of its row's clip; `agentic_loop` generates the turns. The reward depends on where the
episode ended: the last verdict (right if A is given to a frame that shows a target, B to one that
shows none) and the area of the chosen frame relative to the largest area.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, TypedDict, TypeVar

from rcot_rl.protocol.keyframe_selection import KeyframeSelection
from rcot_rl.protocol.row_clips import RowClip

Turn = TypeVar("Turn")


class EpisodeOutcome(TypedDict):
    """Where an episode ended, as the reward reads it. Frames are positions in the row's clip."""

    truth: Literal["A", "B"]
    """The right verdict on the frame that was judged last."""
    area: float
    """Target area of the chosen frame over the largest one; 1 if no frame shows a target."""
    judgements: int
    judged: int
    """The frame that was judged last."""
    chosen: int
    """The frame that stands at the end."""


def start_selection(clip: RowClip, rounds: int) -> KeyframeSelection:
    """Return the selection of one episode, which judges the row's own frame first.

    Args:
        rounds: λ; an episode always has one judgement.
    """
    return KeyframeSelection(len(clip.frames), clip.keyframe, max(rounds, 1))


async def play_episode(
    selection: KeyframeSelection,
    take_turn: Callable[[KeyframeSelection], Awaitable[tuple[Turn, str]]],
) -> list[Turn]:
    """Drive a selection to its end and return its turns, the last judgement last.

    Args:
        take_turn: Return the turn that `selection.next_task` asks for, and its response text.
    """
    turns: list[Turn] = []
    last_judgement = 0
    while selection.next_task is not None:
        if selection.next_task == "aks":
            last_judgement = len(turns)
        turn, response = await take_turn(selection)
        turns.append(turn)
        selection.advance(response)
    turns.append(turns.pop(last_judgement))
    return turns


def episode_outcome(selection: KeyframeSelection, areas: list[int]) -> EpisodeOutcome:
    """Return the outcome of an episode.

    Args:
        areas: Target pixels in each frame of the clip.
    """
    if selection.judged is None:
        raise ValueError("the episode has no judgement")
    largest = max(areas)
    return EpisodeOutcome(
        truth="A" if areas[selection.judged] else "B",
        area=areas[selection.candidate] / largest if largest else 1.0,
        judgements=selection.rounds,
        judged=selection.judged,
        chosen=selection.candidate,
    )
