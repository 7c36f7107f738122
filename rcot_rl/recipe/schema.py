"""The recipe's schema: everything a run needs, in one typed tree.

Sections of single rooms live beside this file (`data.py`, `inference.py`, `training.py`); this one
puts them together. Field defaults are the paper's values (Table 7, section 4.2, A.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import Field, field_validator

from rcot_rl.errors import InputError
from rcot_rl.paths import HandedOnPath, PathText
from rcot_rl.recipe.base import Section
from rcot_rl.recipe.data import DataSection
from rcot_rl.recipe.inference import EngineSection, PredictSection
from rcot_rl.recipe.launch import LaunchSection
from rcot_rl.recipe.supervise import SuperviseSection
from rcot_rl.recipe.training import ClusterSection, GrpoSection, SftSection

Stage = Literal["data", "sft", "grpo-aks", "grpo-ktg", "predict", "eval", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
GRPO_STAGES = ("grpo-aks", "grpo-ktg")


class CanvasSection(Section):
    """Side of the square images that the policy sees, in pixels (A.3)."""

    image: int = Field(default=840, gt=0, multiple_of=28)
    """AKS and KTG: the keyframe."""

    video: int = Field(default=448, gt=0, multiple_of=28)
    """VDG and KFG: every frame of the video."""


class ModelsSection(Section):
    """The networks of a run."""

    policy: HandedOnPath = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The base policy: a folder, a hub id, or `tiny` for the shipped one."""

    segmenter: PathText = "facebook/sam2.1-hiera-large"
    """SAM2: a folder, a hub id, `tiny` for the shipped one, or `flow` for the weight-free one."""

    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """The trainer's: torch's own, or flash-attn, which packs sequences without padding. The locks
    do not have flash-attn: it is compiled on the machine (see docs/training.md)."""


class ToyCorpus(Section):
    layout: Literal["ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17"]
    split: str
    videos: int = Field(gt=0)
    absent_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of expressions whose target is not in the video."""


class ToySection(Section):
    """Procedurally generated corpora, written to RUN/corpora/<layout> before the data stage."""

    preset: str = "lattice"
    """Difficulty: `lattice`, which a tiny policy can learn, or `rich`."""

    seed: int = Field(default=1, ge=0)
    corpora: list[ToyCorpus] = Field(min_length=1)


class Benchmark(Section):
    dataset: Literal["ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17"]
    root: PathText | None = None
    """The corpus. None: the toy corpus of that layout."""

    split: str = "valid"
    limit: int | None = Field(default=None, gt=0)
    """At most this many expressions, the first in the corpus' order. None: all."""


class EvalSection(Section):
    """What the predict and eval stages score."""

    benchmarks: list[Benchmark] = Field(default_factory=list)
    checkpoints: list[Literal["base", "sft", "grpo-aks", "grpo-ktg"]] = Field(
        default=["sft", "grpo-ktg"], min_length=1
    )
    """The stages of training whose model is run through the pipeline and scored."""

    heldout_prompts: int = Field(default=256, ge=0)
    """Validation rows per task on which rewards are compared before and after GRPO. 0: none."""

    heldout_samples: int = Field(default=4, ge=1)
    """Responses a prompt, at the training temperature; one greedy response comes on top."""

    baselines: bool = True
    """Also score the whole frame, a centred box, and the first frame as keyframe."""

    @field_validator("benchmarks")
    @classmethod
    def _once_each(cls, benchmarks: list[Benchmark]) -> list[Benchmark]:
        names = [b.dataset for b in benchmarks]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice, and eval/{twice}.json would be of the last")
        return benchmarks


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """`online` needs `wandb login` or WANDB_API_KEY."""

    project: str = "rcot-rl"
    entity: str | None = None


class Recipe(Section):
    """One run, from corpora to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; `runs/<name>` is its default folder."""

    seed: int = Field(default=1, ge=0)
    """Seed of data, training and sampling."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Where training and inference run."""

    stages: list[Stage] = Field(default=list(STAGES), min_length=1)
    """Stages of `rcot run`; their order is fixed."""

    prompts: HandedOnPath = "qwen"
    """A shipped prompt set, or the path of one's own."""

    canvas: CanvasSection = CanvasSection()
    models: ModelsSection = ModelsSection()
    toy: ToySection | None = None
    data: DataSection
    sft: SftSection = SftSection()
    grpo_aks: GrpoSection | None = None
    """None: no command that is given uses it (`lacks` says which do)."""

    grpo_ktg: GrpoSection | None = None
    cluster: ClusterSection = ClusterSection()
    engine: EngineSection = EngineSection()
    predict: PredictSection = PredictSection()
    eval: EvalSection = EvalSection()
    wandb: WandbSection = WandbSection()
    supervise: SuperviseSection = Field(default=SuperviseSection(), exclude=True)
    """What is done about failures; no part of the run's identity either."""

    launch: LaunchSection = Field(default=LaunchSection(), exclude=True)
    """How `rcot launch` submits it; no part of the run's identity, so not in its hash."""

    def batch_fault(self, stages: Sequence[str]) -> str | None:
        """What is wrong with the batches of those training stages."""
        here = self.cluster.gpus_per_node
        everywhere = self.cluster.nodes * here
        sizes = {"sft": ("sft.batch_size", self.sft.batch_size, self.sft.micro_batch_size, here)}
        for stage in GRPO_STAGES:
            if stage not in stages:
                continue
            g, key = self.grpo(stage), stage.replace("-", "_")
            each = g.prompts_per_step * g.n
            sizes[stage] = (f"{key}.prompts_per_step x n", each, g.micro_batch_size, everywhere)
        for stage, (name, size, micro, ranks) in sizes.items():
            if stage in stages and size % (ranks * micro):
                return (
                    f"{name} = {size} is no multiple of ranks x micro_batch_size = "
                    f"{ranks} x {micro}"
                )
        return None

    def lacks(self, stages: Sequence[str]) -> dict[str, str]:
        """Sections that those stages read and the recipe does not have, each with the reason."""
        missing = {
            section_key(stage): f"missing, and the stage {stage} reads it"
            for stage in GRPO_STAGES
            if stage in stages and getattr(self, section_key(stage)) is None
        }
        if "predict" in stages and self.eval.heldout_prompts:
            for stage in GRPO_STAGES:
                if getattr(self, section_key(stage)) is None:
                    missing.setdefault(
                        section_key(stage),
                        "missing, and predict reads held-out rows by it; add it, or set "
                        "eval.heldout_prompts=0",
                    )
        return missing

    @property
    def grpo_stages(self) -> list[str]:
        """The GRPO stages among the recipe's that it has a section for."""
        return [s for s in GRPO_STAGES if s in self.stages and getattr(self, section_key(s))]

    def grpo(self, stage: str) -> GrpoSection:
        """The section of stage `grpo-aks` or `grpo-ktg`. Raises InputError without one."""
        section: GrpoSection | None = getattr(self, section_key(stage))
        if section is None:
            raise InputError(f"missing, and the stage {stage} reads it", key=section_key(stage))
        return section


def section_key(stage: str) -> str:
    """The recipe's key of a stage's section."""
    return stage.replace("-", "_")
