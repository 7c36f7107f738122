"""Agentic keyframe selection (AKS) as a state machine: judge a frame, select again on B (eqs. 2-4).

Inference and the agentic rollout drive the same machine, so a policy is trained under the rules
that it is evaluated under. The machine holds no model: the driver reads `next_task`, asks the
policy, and passes the response to `advance`, until `next_task` is None. A driver may batch many
selections, or give each one its own coroutine.

Where the paper is silent, or the response has no valid answer, one rule applies, and each use of
a rule is recorded in `faults`:

- A round is one judgement (eq. 2) and, after B, one re-selection (eq. 3). After λ rounds the last
  candidate stands: it was re-selected, but is not judged.
- `aks:no_option`: neither A nor B. The candidate stands, because it was not refused.
- `aks:all_frames_refused`: the last candidate stands.
- `kfg_again:no_keyframe`, `kfg_again:refused_frame`: the re-selection names no frame, or a refused
  one. The frame farthest in time from all refused frames is used, so that each judgement sees
  another frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rcot_rl.protocol.parser import parse_keyframe, parse_option, parse_response

SelectionTask = Literal["aks", "kfg_again"]
"""Prompt templates of a selection: judge the candidate, or select again."""


@dataclass
class KeyframeSelection:
    """The selection of one keyframe. Frames are 0-based indices into the clip."""

    n_frames: int
    candidate: int
    """The frame that stands: it is judged next, or is the result."""
    max_rounds: int
    """λ; 0: no frame is judged."""
    shown: Sequence[int] = ()
    """Frames that a re-selection shows, in order; empty: all frames of the clip."""
    next_task: SelectionTask | None = field(init=False)
    """The prompt that the policy answers next; None: the selection has ended."""
    rounds: int = field(default=0, init=False)
    """Number of judgements so far."""
    judged: int | None = field(default=None, init=False)
    """The frame that was judged last."""
    refused: list[int] = field(default_factory=list, init=False)
    """Refused frames, in order; all distinct."""
    faults: list[str] = field(default_factory=list, init=False)
    """`task:code` of each rule above that was applied, in order."""

    def __post_init__(self) -> None:
        self.shown = self.shown or range(self.n_frames)
        self.next_task = "aks" if self.max_rounds > 0 else None

    def advance(self, response: str) -> None:
        """Apply the policy's response to the prompt named by `next_task`."""
        if self.next_task is None:
            raise ValueError("the keyframe selection has ended")
        answer = parse_response(response).answer
        if self.next_task == "aks":
            self.next_task = self._judge(answer)
        else:
            self._select(answer)
            self.next_task = "aks" if self.rounds < self.max_rounds else None

    def rejected_positions(self) -> list[int]:
        """Return the refused frames as distinct positions in `shown`, for the re-selection prompt.

        A refused frame that is not shown is named by the nearest shown one; ties go to the earlier.
        """
        shown = self.shown
        nearest = (min(range(len(shown)), key=lambda i: abs(shown[i] - r)) for r in self.refused)
        return list(dict.fromkeys(nearest))

    def _judge(self, answer: str | None) -> SelectionTask | None:
        self.judged = self.candidate
        self.rounds += 1
        option = parse_option(answer)
        if option is None:
            self.faults.append("aks:no_option")
        if option != "B":
            return None
        self.refused.append(self.candidate)
        if len(self.refused) < self.n_frames:
            return "kfg_again"
        self.faults.append("aks:all_frames_refused")
        return None

    def _select(self, answer: str | None) -> None:
        position = parse_keyframe(answer, len(self.shown))
        if position is None:
            self.faults.append("kfg_again:no_keyframe")
        elif self.shown[position] in self.refused:
            self.faults.append("kfg_again:refused_frame")
        else:
            self.candidate = self.shown[position]
            return
        self.candidate = farthest(self.n_frames, self.refused)


def farthest(n_frames: int, refused: Sequence[int]) -> int:
    """Return the frame farthest in time from all `refused` (not empty); ties go to the earliest."""
    return max(range(n_frames), key=lambda t: (min(abs(t - r) for r in refused), -t))
