"""Agentic keyframe selection (AKS) as a state machine: judge a frame, select again on B (eqs. 2-4).

Inference and the agentic rollout drive the same machine, so a policy is trained under the rules
that it is evaluated under. The machine holds no model: the driver reads `next_task`, asks the
policy, and passes the response to `advance`, until `next_task` is None. A driver may batch many
selections, or give each one its own coroutine.

Where the paper is silent, or the response has no valid answer, one rule applies, and each use of
a rule is recorded in `faults`:

- A round is one judgement (eq. 2) and, after B, one re-selection (eq. 3). After λ rounds the last
  candidate stands: it was re-selected, but is not judged. With `on_exhausted="likeliest"`, the
  judged frame with the highest probability of A stands instead, and the last re-selection is
  skipped; ties go to the earliest judgement.
- A re-selection is told which frames were refused and why: the reasoning of each refusal, in one
  line of at most `MAX_REASON` characters.
- `aks:no_option`: neither A nor B. The candidate stands, because it was not refused.
- `aks:all_frames_refused`: as after λ rounds, without a further re-selection.
- `kfg_again:no_keyframe`, `kfg_again:refused_frame`: the re-selection names no frame, or a refused
  one. The frame farthest in time from all refused frames is used, so that each judgement sees
  another frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.protocol.parser import parse_option, parse_response

SelectionTask = Literal["aks", "kfg_again"]
"""Prompt templates of a selection: judge the candidate, or select again."""

Exhausted = Literal["last", "likeliest"]
"""The frame that stands after λ refusals."""

MAX_REASON = 240
"""Maximum number of characters of a refusal's reason in a prompt."""


@dataclass(frozen=True)
class RefusedFrame:
    """A refused frame."""

    frame: int
    reason: str
    """One line from the judgement's reasoning; empty if it has none."""


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
    names: FrameNames = field(default_factory=FrameNames)
    """How prompts and answers name the shown frames."""
    on_exhausted: Exhausted = "last"
    next_task: SelectionTask | None = field(init=False)
    """The prompt that the policy answers next; None: the selection has ended."""
    rounds: int = field(default=0, init=False)
    """Number of judgements so far."""
    judged: int | None = field(default=None, init=False)
    """The frame that was judged last."""
    refusals: list[RefusedFrame] = field(default_factory=list, init=False)
    """Refused frames, in order; all distinct."""
    probabilities: list[float] = field(default_factory=list, init=False)
    """Probability of A in the judgement of each refused frame."""
    faults: list[str] = field(default_factory=list, init=False)
    """`task:code` of each rule above that was applied, in order."""

    def __post_init__(self) -> None:
        self.shown = self.shown or range(self.n_frames)
        self.next_task = "aks" if self.max_rounds > 0 else None

    @property
    def refused(self) -> list[int]:
        """Refused frames, in order."""
        return [refusal.frame for refusal in self.refusals]

    def advance(self, response: str, probability: float | None = None) -> None:
        """Apply the policy's response to the prompt named by `next_task`.

        Args:
            probability: Probability of A in a judgement; needed for `on_exhausted="likeliest"`.
        """
        if self.next_task is None:
            raise ValueError("the keyframe selection has ended")
        parsed = parse_response(response)
        if self.next_task == "aks":
            self.next_task = self._judge(parsed.answer, parsed.thought, probability)
        else:
            self._select(parsed.answer)
            self.next_task = "aks" if self.rounds < self.max_rounds else None

    def refused_positions(self) -> list[tuple[int, str]]:
        """Return (position in `shown`, reason) of the refused frames, for the re-selection prompt.

        A refused frame that is not shown is named by the nearest shown one; ties go to the earlier.
        Of several refusals at one position, the first one's reason is given.
        """
        shown = self.shown
        positions: dict[int, str] = {}
        for frame, reason in ((refusal.frame, refusal.reason) for refusal in self.refusals):
            nearest = min(range(len(shown)), key=lambda i: abs(shown[i] - frame))
            positions.setdefault(nearest, reason)
        return list(positions.items())

    def _judge(
        self, answer: str | None, thought: str | None, probability: float | None
    ) -> SelectionTask | None:
        self.judged = self.candidate
        self.rounds += 1
        option = parse_option(answer)
        if option is None:
            self.faults.append("aks:no_option")
        if option != "B":
            return None
        self.refusals.append(RefusedFrame(self.candidate, reason_line(thought)))
        if self.on_exhausted == "likeliest":
            if probability is None:
                raise ValueError('on_exhausted="likeliest" needs the probability of A')
            self.probabilities.append(probability)
        all_refused = len(self.refusals) == self.n_frames
        if all_refused:
            self.faults.append("aks:all_frames_refused")
        if self.on_exhausted == "likeliest" and (all_refused or self.rounds >= self.max_rounds):
            best = max(range(len(self.refusals)), key=self.probabilities.__getitem__)
            self.candidate = self.refusals[best].frame
            return None
        return None if all_refused else "kfg_again"

    def _select(self, answer: str | None) -> None:
        position = self.names.parse(answer, len(self.shown))
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


def reason_line(thought: str | None) -> str:
    """Return a judgement's reasoning as one line, shortened from the front.

    The end is kept, because reasoning ends in its conclusion.
    """
    line = " ".join((thought or "").split())
    if len(line) <= MAX_REASON:
        return line
    _, _, whole_words = line[-MAX_REASON:].partition(" ")
    return f"… {whole_words}"
