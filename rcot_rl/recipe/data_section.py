"""The data section of a recipe: corpora, shard sets, ratios, descriptions and traces.

Defaults are the paper's (section 3.4): SFT-28k has 20,000 samples of keyframe target grounding
(KTG) and 8,000 of agentic keyframe selection (AKS), a 3:1 ratio of single to multiple targets, and
1:1 of option A to option B. The GRPO sets have 4,000 AKS and 6,000 KTG samples.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rcot_rl.protocol.parser import ResponseForm
from rcot_rl.recipe.base import Section
from rcot_rl.system.paths import HandedOnPath, PathText

Dataset = Literal["ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17"]
_SET_NAME = re.compile(r"(sft|grpo)(-[A-Za-z0-9._-]+)?")


class CorpusRef(Section):
    """A corpus that shards are built from."""

    dataset: Dataset
    """The corpus and its layout."""

    root: PathText | None = None
    """Folder of the corpus, in its public layout. None: the run's toy corpus of that layout."""

    split: str = "train"
    """Split of the corpus, as its layout names it."""

    weight: float | None = Field(default=None, gt=0.0)
    """Share of the rows, relative to the other corpora. Give it for all corpora or for none. None:
    in proportion to the rows that each corpus offers."""


class SetSize(Section):
    """Rows of one shard set."""

    aks: int = Field(default=0, ge=0)
    """Training rows of agentic keyframe selection: is this frame a valid keyframe?"""

    ktg: int = Field(default=0, ge=0)
    """Training rows of keyframe target grounding: boxes and points of the targets."""

    val: int = Field(default=0, ge=0)
    """Validation rows for each task of the set, from videos that have no training row."""


class DescriberSection(Section):
    """`rcot data describe`: one description per video, with the prompt of video description
    generation (VDG; eq. 1, A.1).

    The frames, their number and their rate come from the recipe's `predict` section, so that
    descriptions in shards match those at inference. Sampling defaults are Table 7's.
    """

    model: HandedOnPath | None = None
    """A folder, a hub id, or `tiny`. None: the recipe's base policy, as in the paper."""

    temperature: float = Field(default=0.95, ge=0, le=2)
    """Sampling temperature."""

    top_k: int = 50
    """Top-k sampling; -1 disables it."""

    top_p: float = Field(default=0.7, gt=0, le=1)
    """Nucleus sampling."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a response. None: `predict.vdg_tokens`."""

    engines: int = Field(default=1, ge=1)
    """Number of vLLM engines. Each one uses `engine.tensor_parallel_size` GPUs."""

    batch: int = Field(default=32, ge=1)
    """Requests in a Ray Data batch. Each engine works on two batches at once."""


class TracerSection(DescriberSection):
    """`rcot data trace`: reasoning for SFT rows, kept if its answer is correct (3.4, A.1)."""

    model: HandedOnPath | None = "Qwen/Qwen2.5-VL-7B-Instruct"
    """A folder, a hub id, or `tiny`. None: the recipe's base policy."""

    max_tokens: int | None = Field(default=1024, ge=1)
    """Maximum number of tokens of a response. None: `predict.vdg_tokens`."""

    tries: int = Field(default=4, ge=1)
    """Responses sampled for an instance, each with its own seed, before another instance replaces
    it."""

    replacements: int = Field(default=8, ge=0)
    """Maximum number of rounds that replace instances without a correct response."""

    min_accuracy: float = Field(default=1.0, ge=0, le=1)
    """KTG: minimum accuracy of the answer under the matcher of the reward `ktg`, as a share of the
    full accuracy. The row itself then gets the exact ground truth as its answer."""

    min_words: int = Field(default=8, ge=0)
    """Minimum number of words of reasoning."""

    max_words: int = Field(default=400, ge=1)
    """Maximum number of words of reasoning."""

    max_repeated: float = Field(default=0.2, ge=0, le=1)
    """Maximum share of 6-grams that repeat an earlier 6-gram of the reasoning."""

    forbid_coordinates: bool = True
    """Reject reasoning that quotes the coordinates of the annotation, since it leaks the answer.
    Set it to false for models that reason in boxes."""


class AlignmentSection(Section):
    """Checks for misaligned labels; each level includes the previous ones."""

    level: Literal["off", "frames", "sam2"] = "off"
    """`frames`: check that an object's masks fit their own frames better than other frames, and
    their own position better than a shifted one. `sam2`: also check that SAM2, prompted with the
    keyframe's box, reproduces the labels of other frames."""

    frames: int = Field(default=16, ge=4, le=64)
    """Number of evenly spaced frames checked per video."""

    gain: float = Field(default=0.15, gt=0)
    """Minimum relative gain in fit for another frame order to count as the right one."""

    agreement: float = Field(default=0.7, gt=0.5, le=1)
    """Minimum share of an object's masks that must fit the other order better, or be off by
    `drift`."""

    drift: float = Field(default=0.05, gt=0)
    """Minimum offset of masks from the object's edges, as a share of the frame's longer side."""

    min_iou: float = Field(default=0.3, gt=0, lt=1)
    """`sam2`: minimum mean IoU between SAM2's masks and the labels."""


def _paper_sets() -> dict[str, SetSize]:
    return {
        "sft-28k": SetSize(ktg=20000, aks=8000, val=200),
        "grpo-aks-4k": SetSize(aks=4000, val=200),
        "grpo-ktg-6k": SetSize(ktg=6000, val=200),
    }


class DataSection(Section):
    """Corpora, and the shard sets built from them: `rcot data build`."""

    corpora: list[CorpusRef] = Field(min_length=1)
    """Corpora that rows are drawn from."""

    sets: dict[str, SetSize] = Field(default_factory=_paper_sets, min_length=1)
    """Size of each shard set by name, which is also its folder. Sets called `sft…` have reasoning
    traces, sets called `grpo…` do not."""

    seed: int | None = Field(default=None, ge=0)
    """Seed of the rows, and of the texts that models write. None: `seed`."""

    keyframe: Literal["largest", "any_visible"] = "largest"
    """`largest`: KTG rows and AKS rows with answer A show the frame with the largest union of
    targets, as in the paper. `any_visible`: any frame in which all targets are visible, for corpora
    with few clips; this deviates from the paper."""

    single_multi: float | None = Field(default=3.0, gt=0.0)
    """Ratio of KTG rows with one target to rows with several. None: the ratio is not controlled."""

    a_to_b: float = Field(default=1.0, gt=0.0)
    """Ratio of AKS rows with answer A to rows with answer B."""

    zero_target_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of KTG rows without a visible target, whose answer is `[]`. If above 0, every KTG
    prompt allows an empty list."""

    zero_target_foreign: int = Field(default=0, ge=0)
    """Number of expressions that each video borrows from other videos as absent targets, in
    addition to those of the corpus (ReVOS type 2). A borrowed expression shares no content word
    with the expressions of the video."""

    describe: PathText = "template"
    """Source of video descriptions. `template`: built from toy.json (toy corpora only). A path:
    JSONL with `dataset`, `video` and `description`, as `rcot data describe` writes it. `model`: the
    data stage of `rcot run` generates them with `describer`."""

    trace: PathText = "template"
    """Source of reasoning for SFT rows. `template`: built from toy.json (toy corpora only). A path:
    JSONL with `task`, `dataset`, `video`, `expression_id`, `frame` and `response`, as `rcot data
    trace` writes it. `model`: the data stage of `rcot run` generates it with `tracer`."""

    response: ResponseForm = "think_answer"
    """What the policy writes: reasoning and then the answer, or only the answer (Table 15). Decides
    the responses of SFT rows and the prompts of rows, rollouts and inference; name rewards of the
    same form. With `answer`, no reasoning is generated or read; of a file under `trace`, only the
    refusals count, so that rows show the same instances as with reasoning."""

    describer: DescriberSection = DescriberSection()
    tracer: TracerSection = TracerSection()

    @property
    def generated(self) -> tuple[Literal["describe", "trace"], ...]:
        """The texts that the data stage generates with a model."""
        traced = self.trace == "model" and self.response == "think_answer"
        wanted: dict[Literal["describe", "trace"], bool] = {
            "describe": self.describe == "model",
            "trace": traced,
        }
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    max_per_video: int | None = Field(default=None, gt=0)
    """Maximum number of rows per video in one split of a set. None: no limit."""

    val_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of videos reserved for validation rows, if a set has any."""

    allow_smaller: bool = False
    """If the corpora cannot fill a set, build a smaller one with the same ratios instead of
    failing."""

    alignment: AlignmentSection = AlignmentSection()
    """Search for masks that belong to another frame; affected objects are quarantined."""

    max_fault_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Maximum share of defective expressions or frames; the build fails above it."""

    media: Literal["embedded", "referenced"] = "embedded"
    """`embedded`: rows contain the image bytes (and the path under media/). `referenced`: rows
    contain only the absolute path of the image."""

    image_format: Literal["png", "jpeg"] = "png"
    """Format of stored images: lossless `png`, or `jpeg` with quality 95, which takes a sixth of
    the space and a twentieth of the time (the source frames are JPEGs already)."""

    clip_frames: int = Field(default=0, ge=0)
    """Number of frames in a row's clip, with the targets' masks. Rewards that compute masks
    (`mask_iou`) and the agentic loop need clips. The frames stay in the corpus. 0: no clips."""

    clip_tasks: list[Literal["aks", "ktg"]] = Field(default=["ktg"])
    """Tasks whose rows have a clip."""

    rows_per_shard: int = Field(default=1000, gt=0)
    """Rows per Parquet file."""

    workers: int = Field(default=1, gt=0)
    """Processes that build shards. Rows do not depend on it."""

    store: HandedOnPath | None = None
    """Folder in which runs share toy corpora, texts and shards. The data stage links RUN/corpora,
    RUN/texts and RUN/shards to folders in it, named by a hash of the settings that they depend on,
    so that a further run with equal settings reuses them. Runs that differ only in `seed` share all
    of them if `data.seed` is set. None: they are in the run folder."""

    @field_validator("sets")
    @classmethod
    def _names(cls, sets: dict[str, SetSize]) -> dict[str, SetSize]:
        for name, size in sets.items():
            if not _SET_NAME.fullmatch(name):
                raise ValueError(
                    f"set '{name}' must start with sft or grpo and be a valid folder name"
                )
            if size.aks + size.ktg == 0:
                raise ValueError(f"set '{name}' has no rows; set aks or ktg")
        return sets

    @model_validator(mode="after")
    def _weights(self) -> Self:
        given = [c.weight is not None for c in self.corpora]
        if any(given) and not all(given):
            raise ValueError("give every corpus a weight, or none")
        return self


def has_traces(set_name: str) -> bool:
    """Return True if the rows of this set have reasoning traces, for SFT."""
    return set_name.startswith("sft")
