"""Definition of a reward module, and the registry of the modules that recipes may name.

A module is one pure function with typed, documented parameters. It turns a response and a checked
ground truth into one component of the reward (before its weight), with a reason for every
deduction. To add one, write a file like `components/option_accuracy.py`, decorate the function with
`register`, and add the file to `BUILTIN`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from rcot_rl.protocol.grounding import GroundingAnswer, parse_grounding
from rcot_rl.protocol.parser import ParsedResponse, parse_response
from rcot_rl.recipe.base import Section

BUILTIN = (
    "components.format",
    "components.answer_format",
    "components.option_accuracy",
    "components.hungarian_match",
    "components.reasoning",
    "components.keyframe_area",
    "components.chosen_area",
    "components.mask_iou",
    "baselines.veason",
    "baselines.visionreasoner",
)
"""Python modules of this package that register reward modules."""

Task = Literal["aks", "ktg", "kfg", "veason", "seg-zero"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

REFERENCE_CANVAS = 840
"""Side of the canvas, in pixels, that distance thresholds refer to."""


class Settings(Section):
    """Settings that all modules of one recipe share."""

    task: Task
    """Task of the rows; decides how the ground truth is read."""
    canvas: Annotated[int, Field(gt=0)] = REFERENCE_CANVAS
    """Side, in pixels, of the image that the policy sees. Answers and ground truths are in its
    coordinates; distance thresholds are scaled by canvas / 840."""
    zero_target: bool = False
    """ktg: an empty ground truth is a valid target, and `[]` is the right answer to it."""
    options: tuple[str, ...] = ("A", "B")
    """aks: letters of the options."""

    @property
    def scale(self) -> float:
        """Number of pixels of this canvas per pixel of the 840 canvas."""
        return self.canvas / REFERENCE_CANVAS


class NoParams(Section):
    """Parameters of a module that has none."""


class Response:
    """One response, parsed lazily and shared by the modules of a recipe."""

    __slots__ = ("_grounding", "_parsed", "row", "segmenter", "text")

    def __init__(self, text: str, row: Any = None, segmenter: Any = None) -> None:
        self.text = text
        self.row = row
        """Other keys of the row, for modules that need more than the ground truth."""
        self.segmenter = segmenter
        """Makes masks (`mask_iou.MaskSegmenter`), if the reward has one."""
        self._parsed: ParsedResponse | None = None
        self._grounding: GroundingAnswer | None = None

    @property
    def parsed(self) -> ParsedResponse:
        """Structure of the response."""
        if self._parsed is None:
            self._parsed = parse_response(self.text)
        return self._parsed

    @property
    def grounding(self) -> GroundingAnswer:
        """Objects of the answer."""
        if self._grounding is None:
            self._grounding = parse_grounding(self.parsed.answer)
        return self._grounding


class Term(msgspec.Struct):
    """One component of one sample: its value before the weight, and what lowered it."""

    value: float
    reasons: list[str] = []


@dataclass(frozen=True)
class RewardModule:
    """A registered reward module."""

    name: str
    params: type[Section]
    tasks: frozenset[str]
    """Tasks whose ground truth it can read."""
    maximum: Callable[[Any, Settings], float]
    """Greatest value of the component, from parameters and settings."""
    score: Callable[[Response, Any, Any, Settings], Term]


_MODULES: dict[str, RewardModule] = {}


def register(
    name: str,
    *,
    params: type[Section],
    tasks: Iterable[str],
    maximum: float | Callable[[Any, Settings], float],
) -> Callable[[Callable[[Response, Any, Any, Settings], Term]], Callable[..., Term]]:
    """Register `score(response, ground_truth, params, settings) -> Term` under `name`.

    Args:
        params: Class of its parameters.
        tasks: Tasks whose ground truth it can read.
        maximum: Greatest value of the component, or a function of parameters and settings.
    """

    def add(score: Callable[[Response, Any, Any, Settings], Term]) -> Callable[..., Term]:
        if name in _MODULES:
            raise ValueError(f"reward module {name!r} is registered twice")
        greatest = maximum if callable(maximum) else lambda params, settings: maximum
        _MODULES[name] = RewardModule(name, params, frozenset(tasks), greatest, score)
        return score

    return add


def modules() -> dict[str, RewardModule]:
    """Return all registered modules by name."""
    for file in BUILTIN:
        importlib.import_module(f"reward_fns.{file}")
    return _MODULES
