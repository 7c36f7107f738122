"""The recipe's schema: everything a run needs, in one typed tree.

This module combines the sections of `*_section.py`. Field defaults are the paper's values (Table 7,
section 4.2, A.3).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from rcot_rl.errors import InputError
from rcot_rl.prediction_layout import benchmark_name
from rcot_rl.recipe.base import Section
from rcot_rl.recipe.data_section import DataSection, Dataset
from rcot_rl.recipe.inference_section import (
    BUILT_IN_VARIANTS,
    FIRST_FRAME,
    ORACLES,
    EngineSection,
    PredictSection,
    SegmenterSection,
)
from rcot_rl.recipe.launch_section import LaunchSection
from rcot_rl.recipe.supervise_section import SuperviseSection
from rcot_rl.recipe.tracking_section import TrackingSection, WandbSection
from rcot_rl.recipe.training_section import BASE, ClusterSection, GrpoStage, SftStage, TrainStage
from rcot_rl.suggestions import did_you_mean
from rcot_rl.system.paths import HandedOnPath, PathText

RowTask = Literal["aks", "ktg"]
TASKS: tuple[RowTask, ...] = get_args(RowTask)
DATA_SOURCES: Mapping[RowTask, str] = {"aks": "rcot/aks", "ktg": "rcot/ktg"}
"""Task -> `data_source` of its rows."""

BEFORE_TRAINING = ("data",)
AFTER_TRAINING = ("predict", "eval", "report")
"""Stages that run after those of `train`, in order."""

RESERVED = frozenset(
    {
        *BEFORE_TRAINING,
        *AFTER_TRAINING,
        BASE,
        "corpora",
        "shards",
        "texts",
        "predictions",
        "tracking",
    }
)
"""Names that a training stage cannot have: other stages and folders of a run."""

STAGE_NAME = r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
"""Pattern of a training stage's name, which is also a folder's name and a part of override keys."""


class CanvasSection(Section):
    """Side length in pixels of the square images that the policy sees (A.3)."""

    image: int = Field(default=840, gt=0, multiple_of=28)
    """The keyframe in AKS and KTG."""

    video: int = Field(default=448, gt=0, multiple_of=28)
    """Each frame of the video in VDG and KFG."""


class ModelsSection(Section):
    """The models of a run."""

    policy: HandedOnPath = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The base policy: a folder, a hub id, or `tiny` for the shipped test model."""

    segmenter: PathText = "facebook/sam2.1-hiera-large"
    """SAM2: a folder of transformers, a `.pt` checkpoint of the original SAM2, a hub id, or `tiny`
    for the shipped test model. `flow`: optical flow, without weights."""

    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention implementation of the trainer: `sdpa` of torch, or flash-attn, which packs
    sequences without padding. flash-attn is not in the lock files; compile it on the machine (see
    docs/training.md)."""


class ToyCorpus(Section):
    """A procedurally generated corpus."""

    layout: Dataset
    """The public layout that it is written in."""

    split: str
    """Split of the layout, such as train or valid."""

    videos: int = Field(gt=0)
    """Number of clips."""

    absent_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of expressions whose target is not in the video."""


class ToySection(Section):
    """Procedurally generated corpora, written to RUN/corpora/<layout> before the data stage."""

    preset: Literal["lattice", "fleeting", "rich"] = "lattice"
    """Difficulty: `lattice` or `fleeting`, which a tiny policy can learn, or `rich`."""

    seed: int = Field(default=1, ge=0)
    """Seed of scenes and expressions."""

    corpora: list[ToyCorpus] = Field(min_length=1)
    """The corpora to generate."""


class Benchmark(Section):
    """A benchmark to predict and score."""

    dataset: Dataset
    """The corpus and its layout."""

    root: PathText | None = None
    """Folder of the corpus. None: the run's toy corpus of that layout."""

    split: str = "valid"
    """Split of the corpus, as its layout names it."""

    limit: int | None = Field(default=None, gt=0)
    """Maximum number of expressions, the first ones in the corpus' order. None: all."""


class EvalSection(Section):
    """Benchmarks, checkpoints and held-out rows that the predict and eval stages score."""

    benchmarks: list[Benchmark] = Field(default_factory=list)
    """Benchmarks, each split of a dataset at most once."""

    checkpoints: list[str] | None = Field(default=None, min_length=1)
    """Training stages whose models predict and are scored; `base` is the base policy. None: the
    last stage, preceded by its KL reference (GRPO) or the stage that it starts from (SFT)."""

    variant_checkpoints: list[str] | None = None
    """Those of `checkpoints` that also predict with `predict.variants`. None: all of them."""

    heldout_prompts: int = Field(default=256, ge=0)
    """Validation rows per task for comparing rewards before and after GRPO. 0: no comparison."""

    heldout_samples: int = Field(default=4, ge=1)
    """Sampled responses per held-out prompt, at the training temperature. One greedy response is
    generated in addition."""

    baselines: bool = True
    """Also score three baselines: the whole frame, a centred box, and the first frame as
    keyframe."""

    oracles: bool = False
    """Also score three upper bounds of the last checkpoint, on benchmarks with ground truth: the
    true keyframe; the true boxes and points in its own keyframe; both."""

    workers: int | None = Field(default=None, gt=0)
    """Processes that score expressions. None: all CPUs. Each holds the masks of one expression."""

    @field_validator("benchmarks")
    @classmethod
    def _once_each(cls, benchmarks: list[Benchmark]) -> list[Benchmark]:
        names = [benchmark_name(b.dataset, b.split) for b in benchmarks]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(
                f"{twice} is listed twice, and both would write eval/{twice}.json; remove one"
            )
        return benchmarks


class ReportSection(Section):
    """The report of a run."""

    paper_tables: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Tables of the paper to set the results beside: for each table, such as `table-3`, rows of the
    table and the scored checkpoint of this run that corresponds to each."""

    @field_validator("paper_tables")
    @classmethod
    def _in_the_paper(cls, given: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        from rcot_rl.stats.paper_tables import paper_tables

        known = paper_tables()
        for name, rows in given.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"no table '{name}' (known: {', '.join(known)}){hint}")
            for row in rows:
                if row not in known[name].rows:
                    all_rows = "; ".join(known[name].rows)
                    hint = did_you_mean(row, known[name].rows)
                    raise ValueError(f"{name} has no row '{row}' (its rows: {all_rows}){hint}")
        return given


class Recipe(Section):
    """A run, from corpora to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; `runs/<name>` is its default folder."""

    seed: int = Field(default=1, ge=0)
    """Seed of data, training and sampling."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device of training and inference."""

    train: dict[str, TrainStage] = Field(default_factory=dict)
    """Training stages by name, in the order in which they run. In a recipe that extends another,
    `NAME: null` removes a stage."""

    stages: list[str] = Field(default_factory=lambda known: all_stages(known), min_length=1)
    """Stages that `rcot run` runs, always in the order of the default: data, those of `train`,
    predict, eval, report."""

    prompts: HandedOnPath = "qwen"
    """Name of a shipped prompt set, or the path of your own."""

    canvas: CanvasSection = CanvasSection()
    models: ModelsSection = ModelsSection()
    toy: ToySection | None = None
    data: DataSection
    cluster: ClusterSection = ClusterSection()
    engine: EngineSection = EngineSection()
    segmenter: SegmenterSection = SegmenterSection()
    predict: PredictSection = PredictSection()
    eval: EvalSection = EvalSection()
    report: ReportSection = ReportSection()
    wandb: WandbSection = WandbSection()
    tracking: TrackingSection = TrackingSection()
    supervise: SuperviseSection = Field(default=SuperviseSection(), exclude=True)
    """Retries and timeouts. Not part of the recipe's hash."""

    launch: LaunchSection = Field(default=LaunchSection(), exclude=True)
    """How `rcot launch` submits the run. Not part of the recipe's hash."""

    @property
    def order(self) -> tuple[str, ...]:
        """All stages that the recipe can run, in order."""
        return (*BEFORE_TRAINING, *self.train, *AFTER_TRAINING)

    def in_order(self, stages: Collection[str]) -> tuple[str, ...]:
        """Return `stages` once each, in the order in which they run."""
        return tuple(name for name in self.order if name in stages)

    @property
    def data_seed(self) -> int:
        """Seed of rows and of texts that models write."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def sft_stages(self) -> dict[str, SftStage]:
        """The SFT stages of `train`."""
        return {k: stage for k, stage in self.train.items() if isinstance(stage, SftStage)}

    @property
    def grpo_stages(self) -> dict[str, GrpoStage]:
        """The GRPO stages of `train`."""
        return {k: stage for k, stage in self.train.items() if isinstance(stage, GrpoStage)}

    def stage(self, name: str) -> SftStage | GrpoStage:
        """Return the settings of a training stage. Raises InputError if the recipe has none."""
        if name not in self.train:
            raise InputError("is not a training stage of the recipe", key=f"train.{name}")
        return self.train[name]

    def sft(self, stage: str) -> SftStage:
        """Return the settings of an SFT stage. Raises InputError for another kind of stage."""
        settings = self.train.get(stage)
        if not isinstance(settings, SftStage):
            raise InputError("is not an SFT stage of the recipe", key=f"train.{stage}")
        return settings

    def grpo(self, stage: str) -> GrpoStage:
        """Return the settings of a GRPO stage. Raises InputError for another kind of stage."""
        settings = self.train.get(stage)
        if not isinstance(settings, GrpoStage):
            raise InputError("is not a GRPO stage of the recipe", key=f"train.{stage}")
        return settings

    def start_of(self, stage: str) -> str:
        """Return the stage whose policy `stage` starts from, or `base`."""
        names = [BASE, *self.train]
        return self.train[stage].after or names[names.index(stage) - 1]

    def reference_of(self, stage: str) -> str:
        """Return the stage whose model is the KL reference of `stage`, or `base`.

        An SFT stage has no reference; its start is returned.
        """
        settings = self.train[stage]
        if isinstance(settings, SftStage):
            return self.start_of(stage)
        if settings.reference is not None:
            return settings.reference
        ancestor = self.start_of(stage)
        while ancestor in self.grpo_stages:
            ancestor = self.start_of(ancestor)
        return ancestor

    @property
    def scored_checkpoints(self) -> list[str]:
        """Checkpoints to score; the masks of the last one are the run's predictions."""
        if self.eval.checkpoints is not None:
            return self.eval.checkpoints
        trained = self.in_order(set(self.stages) & set(self.train) or self.train)
        return [self.reference_of(trained[-1]), trained[-1]] if trained else [BASE]

    def predictions_of(self, checkpoint: str) -> dict[str, str | None]:
        """Return the predictions that a checkpoint makes: their names, and their variants.

        The checkpoint's own settings come first; the last checkpoint also makes the baselines and
        the upper bounds.
        """
        names: dict[str, str | None] = {checkpoint: None}
        if self.eval.variant_checkpoints is None or checkpoint in self.eval.variant_checkpoints:
            names |= {f"{checkpoint}@{variant}": variant for variant in self.predict.variants}
        if checkpoint == self.scored_checkpoints[-1]:
            built_in = [FIRST_FRAME] * self.eval.baselines + [*ORACLES] * self.eval.oracles
            names |= {name: name for name in built_in}
        return names

    def tasks_in(self, shard_set: str) -> tuple[RowTask, ...]:
        """Return the tasks of a shard set's rows; empty if `data.sets` does not have the set."""
        size = self.data.sets.get(shard_set)
        return () if size is None else tuple(t for t in TASKS if getattr(size, t) > 0)

    def rehearsed_by(self, stage: str) -> str | None:
        """Return the stage whose rows and reward a stage uses besides its own; None if none."""
        settings = self.train[stage]
        return settings.rehearse if isinstance(settings, GrpoStage) else None

    def shard_sets_of(self, stage: str) -> list[str]:
        """Return the shard sets that a stage trains on: its own, and the one that it rehearses."""
        sources = filter(None, (stage, self.rehearsed_by(stage)))
        return [self.train[source].shard_set for source in sources]

    @property
    def heldout_stages(self) -> dict[RowTask, str]:
        """The GRPO stage whose validation rows and reward measure each task.

        It is the last stage that trains on rows of the task, preferably one of `stages`.
        """
        stages = self.grpo_stages
        chosen = sorted(stages, key=lambda name: name in self.stages)  # stable: later ones win
        return {
            task: name
            for task in TASKS
            for name in chosen
            if task in self.tasks_in(stages[name].shard_set)
        }

    def faults(self) -> list[tuple[tuple[str, ...], str]]:
        """Return (key, message) for each fault that involves several sections."""
        faults: list[tuple[tuple[str, ...], str]] = []
        for name in self.train:
            faults += [(("train", name, *key), text) for key, text in self._stage_faults(name)]
        if faults:
            return faults
        for name in self.stages:
            if name not in self.order:
                hint = did_you_mean(name, self.order)
                text = f"'{name}' is not a stage of the recipe ({', '.join(self.order)}){hint}"
                faults.append((("stages",), text))
        known = (BASE, *self.train)
        for name in self.eval.checkpoints or ():
            if name not in known:
                text = f"'{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
                faults.append((("eval", "checkpoints"), text))
        for name in self.eval.variant_checkpoints or ():
            if name not in self.scored_checkpoints:
                scored = self.scored_checkpoints
                text = f"'{name}' is not scored ({', '.join(scored)}){did_you_mean(name, scored)}"
                faults.append((("eval", "variant_checkpoints"), text))
        scored = [
            name
            for checkpoint in self.scored_checkpoints
            for name in self.predictions_of(checkpoint)
            if name not in BUILT_IN_VARIANTS
        ]
        for table, rows in self.report.paper_tables.items():
            for row, name in rows.items():
                if name not in scored:
                    text = (
                        f"'{name}' is not scored ({', '.join(scored)}){did_you_mean(name, scored)}"
                    )
                    faults.append((("report", "paper_tables", table, row), text))
        return faults

    def _stage_faults(self, name: str) -> Iterator[tuple[tuple[str, ...], str]]:
        settings, earlier = self.train[name], [BASE]
        earlier += list(self.train)[: list(self.train).index(name)]
        if name in RESERVED or not re.fullmatch(STAGE_NAME, name):
            reason = "is reserved" if name in RESERVED else "is not lower-case words joined by '-'"
            yield (), f"invalid stage name: it {reason}"
        pairs = [("after", settings.after)]
        if isinstance(settings, GrpoStage):
            pairs.append(("reference", settings.reference))
        known = True
        for key, value in pairs:
            if value is not None and value not in earlier:
                known = False
                hint = did_you_mean(value, earlier)
                yield (
                    (key,),
                    f"'{value}' is not an earlier stage ({', '.join(earlier)}){hint}",
                )
        if isinstance(settings, SftStage):
            held = self.tasks_in(settings.shard_set)
            for task in settings.tasks or ():
                if held and task not in held:
                    yield ("tasks",), f"{settings.shard_set} has no rows of {task}"
        elif settings.rehearse is not None:
            yield from self._rehearsal_faults(settings, settings.rehearse, earlier)
        if not known or not isinstance(settings, GrpoStage):
            return
        if settings.packing and self.models.attention != "sdpa":
            yield ("packing",), f"needs models.attention: sdpa (is {self.models.attention})"
        if settings.rollout_threads is not None and self.device != "cpu":
            yield ("rollout_threads",), f"needs device: cpu (is {self.device})"
        if settings.agent == "agentic-aks" and self.data.response == "answer":
            yield ("agent",), "agentic-aks needs reasoning, and data.response is answer"
        start, reference = self.start_of(name), self.reference_of(name)
        if start not in self.grpo_stages and start != reference:
            yield (
                ("reference",),
                f"must be {start}, from which the stage starts (is {reference}): only a stage that "
                "starts from a GRPO stage can have another reference",
            )

    def _rehearsal_faults(
        self, settings: GrpoStage, name: str, earlier: Collection[str]
    ) -> Iterator[tuple[tuple[str, ...], str]]:
        known = [stage for stage in earlier if stage in self.grpo_stages]
        if name not in known:
            stages = ", ".join(known) or "there is none"
            hint = did_you_mean(name, known)
            yield ("rehearse",), f"'{name}' is not an earlier GRPO stage ({stages}){hint}"
            return
        other = self.grpo(name)
        same = set(self.tasks_in(settings.shard_set)) & set(self.tasks_in(other.shard_set))
        if same:
            yield ("rehearse",), f"{name} has the same task: {' and '.join(sorted(same))}"
        if other.agent != settings.agent:
            yield ("rehearse",), f"{name} has agent: {other.agent}, this stage {settings.agent}"

    def batch_faults(self, stages: Collection[str]) -> list[tuple[tuple[str, ...], str]]:
        """Return (key, message) for each batch of `stages` that its ranks cannot share equally."""
        here = self.cluster.gpus_per_node
        everywhere = self.cluster.nodes * here
        faults: list[tuple[tuple[str, ...], str]] = []
        for name, settings in self.train.items():
            if name not in stages:
                continue
            if isinstance(settings, SftStage):
                key, size, ranks = "batch_size", settings.batch_size, here
                text = f"{key} = {size}"
            else:
                key, size = "prompts_per_step", settings.prompts_per_step * settings.n
                ranks, text = everywhere, f"{key} x n = {size}"
            micro = settings.micro_batch_size
            if size % (ranks * micro):
                text += f" is not a multiple of ranks x micro_batch_size = {ranks} x {micro}"
                faults.append((("train", name, key), text))
        return faults


def all_stages(known: dict[str, Any]) -> list[str]:
    """Return the default of `stages`, given the validated fields before it."""
    return [*BEFORE_TRAINING, *known.get("train", ()), *AFTER_TRAINING]
