"""The data section of a recipe: corpora, shard sets, ratios, descriptions and traces.

Defaults are the paper's (section 3.4): SFT-28k is 20,000 KTG and 8,000 AKS samples, single to
multiple targets 3:1, option A to B 1:1; the GRPO sets have 4,000 and 6,000.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rcot_rl.paths import HandedOnPath, PathText
from rcot_rl.recipe.alignment import AlignmentSection
from rcot_rl.recipe.base import Section

Dataset = Literal["ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17"]
_SET_NAME = re.compile(r"(sft|grpo)(-[A-Za-z0-9._-]+)?")


class CorpusRef(Section):
    dataset: Dataset
    root: PathText | None = None
    """The corpus' folder, in its public layout. None: the run's toy corpus of that layout."""

    split: str = "train"
    weight: float | None = Field(default=None, gt=0.0)
    """Share of the rows relative to the other corpora (all or none have one). None: as available.
    """


class SetSize(Section):
    """Rows of one shard set."""

    aks: int = Field(default=0, ge=0)
    """Training rows: is this frame a valid keyframe?"""

    ktg: int = Field(default=0, ge=0)
    """Training rows: boxes and points of the targets."""

    val: int = Field(default=0, ge=0)
    """Validation rows of each task that the set has, from videos no training row shows."""


class DescriberSection(Section):
    """`rcot data describe`: one description a video, by the prompt of VDG (eq. 1, A.1).

    Frames, their number and rate are those of the recipe's `predict` section, so that descriptions
    in shards are made as at inference. Sampling is Table 7's.
    """

    model: HandedOnPath | None = None
    """A folder, a hub id or `tiny`. None: the recipe's base policy (the paper's choice)."""

    temperature: float = Field(default=0.95, ge=0, le=2)
    top_k: int = 50
    top_p: float = Field(default=0.7, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    """None: `predict.vdg_tokens`."""

    engines: int = Field(default=1, ge=1)
    """vLLM engines side by side; on a GPU each holds `engine.tensor_parallel_size` of them."""

    batch: int = Field(default=32, ge=1)
    """Requests that Ray Data hands to an engine at a time; two such batches overlap."""


class TracerSection(DescriberSection):
    """`rcot data trace`: reasoning for SFT rows, kept when its answer is right (3.4, A.1)."""

    model: HandedOnPath | None = "Qwen/Qwen2.5-VL-7B-Instruct"
    max_tokens: int | None = Field(default=1024, ge=1)
    tries: int = Field(default=4, ge=1)
    """Times that an instance is asked, each with a seed of its own, before it is given up and
    another takes its place."""

    replacements: int = Field(default=8, ge=0)
    """Rounds in which instances that were given up are replaced, at most."""

    min_accuracy: float = Field(default=1.0, ge=0, le=1)
    """KTG: least share of the full accuracy that `ktg`'s matcher must give the answer. The row's
    answer is then the exact ground truth."""

    min_words: int = Field(default=8, ge=0)
    """Minimum number of words of reasoning."""

    max_words: int = Field(default=400, ge=1)
    """Maximum number of words of reasoning."""

    max_repeated: float = Field(default=0.2, ge=0, le=1)
    """Largest share of the reasoning's 6-grams that were there before."""

    forbid_coordinates: bool = True
    """Reasoning that recites the boxes of the annotation gives it away. Off for models whose
    reasoning is made of boxes."""


def _paper_sets() -> dict[str, SetSize]:
    return {
        "sft-28k": SetSize(ktg=20000, aks=8000, val=200),
        "grpo-aks-4k": SetSize(aks=4000, val=200),
        "grpo-ktg-6k": SetSize(ktg=6000, val=200),
    }


class DataSection(Section):
    """Corpora to shards: `rcot data build`."""

    corpora: list[CorpusRef] = Field(min_length=1)
    sets: dict[str, SetSize] = Field(default_factory=_paper_sets, min_length=1)
    """Name of a set (a folder; `sft…` has traces, `grpo…` has none) to its size."""

    canvas: int | None = Field(default=None, gt=0, multiple_of=28)
    """Side of the square that frames are resized to. None: the recipe's `canvas.image`."""

    seed: int | None = Field(default=None, ge=0)
    """None: the recipe's."""

    keyframe: Literal["largest", "any_visible"] = "largest"
    """`largest`: KTG and option A show the frame with the largest union of targets (the paper).
    `any_visible`: any frame in which all targets are visible, for corpora with few clips; such
    shards are not the paper's."""

    single_multi: float | None = Field(default=3.0, gt=0.0)
    """KTG rows with one target to those with several. None: as drawn."""

    a_to_b: float = Field(default=1.0, gt=0.0)
    """AKS rows whose answer is A to those whose answer is B."""

    zero_target_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the KTG rows whose target is not there, so that the answer is []. Above 0, every
    KTG prompt allows for it."""

    zero_target_foreign: int = Field(default=0, ge=0)
    """Absent expressions that each video borrows from others, beside those that the corpus has
    (ReVOS type 2): sentences none of whose content words is said of the video."""

    describe: PathText = "template"
    """Video descriptions: `template` (corpora with a toy.json), a JSONL file of
    {"dataset", "video", "description"} as `rcot data describe` writes it, or `model`: a run asks
    the describer itself."""

    trace: PathText = "template"
    """Reasoning for SFT rows: `template` (corpora with a toy.json), a JSONL file of
    {"task", "dataset", "video", "expression_id", "frame", "response"} as `rcot data trace` writes
    it, or `model`: a run asks the tracer itself."""

    describer: DescriberSection = DescriberSection()
    tracer: TracerSection = TracerSection()

    max_per_video: int | None = Field(default=None, gt=0)
    """At most this many rows of one video in a set's split."""

    val_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of the videos kept for validation rows, when a set asks for any."""

    allow_smaller: bool = False
    """Corpora that cannot fill a set: make it smaller, at the same ratios, instead of stopping."""

    alignment: AlignmentSection = AlignmentSection()
    """The search for masks that belong to another frame; what it finds is quarantined."""

    max_fault_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Stop when more than this share of expressions or frames is defective."""

    media: Literal["embedded", "referenced"] = "embedded"
    """Rows hold their image's bytes (and its path under media/), or its absolute path alone."""

    image_format: Literal["png", "jpeg"] = "png"
    """How frames on the canvas are kept: without loss, or as JPEG of quality 95: a sixth of the
    size and a twentieth of the time, from sources that are JPEGs themselves."""

    clip_frames: int = Field(default=0, ge=0)
    """Frames of a row's clip, with the targets' masks, for rewards that make masks (`mask_iou`) and
    for the agentic loop; the frames stay in the corpus. 0: none."""

    clip_tasks: list[Literal["aks", "ktg"]] = Field(default=["ktg"])
    """Tasks whose rows have a clip."""

    rows_per_shard: int = Field(default=1000, gt=0)
    workers: int = Field(default=1, gt=0)
    """Processes. Rows do not depend on it."""

    @field_validator("sets")
    @classmethod
    def _names(cls, sets: dict[str, SetSize]) -> dict[str, SetSize]:
        for name, size in sets.items():
            if not _SET_NAME.fullmatch(name):
                raise ValueError(f"set '{name}' must be called sft… or grpo… (a folder's name)")
            if size.aks + size.ktg == 0:
                raise ValueError(f"set '{name}' asks for no rows")
        return sets

    @model_validator(mode="after")
    def _weights(self) -> Self:
        given = [c.weight is not None for c in self.corpora]
        if any(given) and not all(given):
            raise ValueError("give every corpus a weight, or none")
        return self


def has_traces(set_name: str) -> bool:
    """Whether rows of this set are for SFT."""
    return set_name.startswith("sft")
