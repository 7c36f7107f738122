"""What a reward module is, and the table of those that recipes may name.

A module is one pure function with a typed, documented set of parameters. It turns a response and a
checked ground truth into one component of the reward (before its weight), with the reasons for
every deduction. To add one: write a file like `option_accuracy.py`, decorate the function with
`register`, and name the file in `BUILTIN`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from rcot_rl.protocol.grounding import Grounding, parse_grounding
from rcot_rl.protocol.parser import ParsedResponse, parse_response
from rcot_rl.recipe.base import Section

BUILTIN = (
    "components.format",
    "components.option_accuracy",
    "components.hungarian_match",
    "components.reasoning",
    "components.keyframe_area",
    "components.chosen_area",
    "components.mask_iou",
    "baselines.veason",
    "baselines.visionreasoner",
)
"""The modules of this package that register reward modules."""

Task = Literal["aks", "ktg", "kfg", "veason", "seg-zero"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

REFERENCE_CANVAS = 840
"""Distance thresholds are given in pixels of a canvas of this size."""


class Settings(Section):
    """What all the modules of one recipe share."""

    task: Task
    """What the rows ask, which decides how the ground truth is read."""
    canvas: Annotated[int, Field(gt=0)] = REFERENCE_CANVAS
    """Side of the image that the policy sees, in pixels, in which answers and ground truths are
    given; distance thresholds are scaled by canvas / 840."""
    zero_target: bool = False
    """ktg: an empty ground truth is a valid target, and `[]` the right answer to it."""
    options: tuple[str, ...] = ("A", "B")
    """aks: the letters of the options."""

    @property
    def scale(self) -> float:
        """Pixels of this canvas per pixel of the 840 canvas."""
        return self.canvas / REFERENCE_CANVAS


class Response:
    """One response, parsed when first asked and then shared by the modules of a recipe."""

    __slots__ = ("_grounding", "_parsed", "row", "segmenter", "text")

    def __init__(self, text: str, row: Any = None, segmenter: Any = None) -> None:
        self.text = text
        self.row = row
        """The row's other keys, for modules that need more than the ground truth."""
        self.segmenter = segmenter
        """What makes masks (`mask_iou.Segmenter`), if the reward was given one."""
        self._parsed: ParsedResponse | None = None
        self._grounding: Grounding | None = None

    @property
    def parsed(self) -> ParsedResponse:
        """Its structure."""
        if self._parsed is None:
            self._parsed = parse_response(self.text)
        return self._parsed

    @property
    def grounding(self) -> Grounding:
        """Its answer, as objects."""
        if self._grounding is None:
            self._grounding = parse_grounding(self.parsed.answer)
        return self._grounding


class Term(msgspec.Struct):
    """One component of one sample: its value before the weight, and why it is not the maximum."""

    value: float
    reasons: list[str] = []


@dataclass(frozen=True)
class RewardModule:
    """A registered module."""

    name: str
    params: type[Section]
    tasks: frozenset[str]
    """The tasks whose ground truth it can read."""
    maximum: Callable[[Any, Settings], float]
    score: Callable[[Response, Any, Any, Settings], Term]


_MODULES: dict[str, RewardModule] = {}


def register(
    name: str,
    *,
    params: type[Section],
    tasks: Iterable[str],
    maximum: Callable[[Any, Settings], float],
) -> Callable[[Callable[[Response, Any, Any, Settings], Term]], Callable[..., Term]]:
    """Enter `score(response, ground_truth, params, settings) -> Term` under `name`.

    maximum(params, settings): the greatest value that it can return.
    """

    def enter(score: Callable[[Response, Any, Any, Settings], Term]) -> Callable[..., Term]:
        if name in _MODULES:
            raise ValueError(f"reward module {name!r} is registered twice")
        _MODULES[name] = RewardModule(name, params, frozenset(tasks), maximum, score)
        return score

    return enter


def modules() -> dict[str, RewardModule]:
    """All registered modules by name."""
    for file in BUILTIN:
        importlib.import_module(f"reward_fns.{file}")
    return _MODULES
