"""Recipe sections of inference: the vLLM engine, SAM2 and the two-stage pipeline (A.3, Tables 3, 4,
10).

Canvases, device, models and prompts are top-level keys of the recipe, because training uses them
too.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from rcot_rl.recipe.base import Section
from rcot_rl.suggestions import did_you_mean


class EngineSection(Section):
    """The offline vLLM engine for predictions, `rcot segment`, annotation and held-out rewards."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. `auto`: the checkpoint's dtype on a GPU; float32 on a CPU, where
    bfloat16 is slower and less precise."""

    max_model_len: int | None = Field(default=None, ge=64)
    """Maximum number of tokens of prompt and response; a frame of 448 x 448 pixels has 128. None:
    32768, or the model's maximum position if that is smaller."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Maximum number of sequences per iteration."""

    max_num_batched_tokens: int = Field(default=8192, ge=64)
    """Maximum number of tokens per iteration."""

    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    """Share of a GPU's memory for the engine; SAM2 uses the rest."""

    kv_cache_bytes: int | None = Field(default=None, ge=2**20)
    """Size of the KV cache in bytes. None: on a GPU, derived from `gpu_memory_utilization`; on a
    CPU, 256 MiB, or more if a sequence of `max_model_len` tokens needs more."""

    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower decoding. Always on for a CPU."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""

    enable_prefix_caching: bool = True
    """Share the KV cache between prompts with the same prefix, such as the same video."""

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Additional arguments of vLLM's `LLM`."""


class SegmenterSection(Section):
    """How SAM2 runs, in predictions, rewards and label checks; `models.segmenter` names it. `flow`
    reads `mask_bytes` only."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""

    compile: bool = False
    """Compile the image encoder and the memory attention with torch.compile when SAM2 is loaded.
    It takes minutes on a CPU, where it is not faster."""

    feature_bytes: int = Field(default=2 << 30, ge=0)
    """Maximum bytes of image features kept on the device; all queries of a video share them.
    SAM2-large has 8 MiB per frame in bfloat16, so the default is enough for 256 frames."""

    mask_bytes: int = Field(default=1 << 30, ge=0)
    """Maximum bytes of masks kept in the run folder. Checkpoints, variants and held-out rewards
    that prompt SAM2 with the same boxes and points in the same frame share masks. 0: keep none."""

    frames_per_batch: int | None = Field(default=None, ge=1)
    """Maximum number of frames that the image encoder processes at once. None: 1 on a CPU, 4 on a
    GPU."""


PolicyTask = Literal["vdg", "kfg", "aks", "ktg"]
"""Tasks of the pipeline; re-selection is part of `kfg`."""

LIGHT_FRAMES = 16
"""Frames of the paper's light re-evaluation (Table 10)."""

FIRST_FRAME = "first-frame"
ORACLE_KEYFRAME, ORACLE_BOXES, ORACLE_BOTH = "oracle-keyframe", "oracle-boxes", "oracle-both"
ORACLES: dict[str, dict[str, Any]] = {
    ORACLE_KEYFRAME: {"kfg": False, "rounds": 0},
    ORACLE_BOXES: {},
    ORACLE_BOTH: {"vdg": False, "kfg": False, "rounds": 0},
}
"""Upper bounds of the last checkpoint: the ground truth takes the place of the keyframe, of the
boxes and points, or of both."""

BUILT_IN_VARIANTS: dict[str, dict[str, Any]] = {
    FIRST_FRAME: {"kfg": False, "rounds": 0},
    **ORACLES,
}
"""Predictions of the last checkpoint. `first-frame` has no keyframe selection (Table 3)."""

VARIANT_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


class ReasoningSection(Section):
    """Settings that a query's answer depends on; a variant can change each of them."""

    rounds: int = Field(default=5, ge=0)
    """Maximum number of AKS judgements per query (λ in Table 4). 0: no AKS."""

    vdg: bool = True
    """Generate a video description first (Table 3). If false, prompts state that no description is
    available."""

    kfg: bool = True
    """Let the policy select the first candidate. If false, the first frame is the candidate (Table
    3)."""

    reevaluate_frames: int | None = Field(default=None, ge=1)
    """Number of uniformly sampled frames for a re-selection; 16 is the paper's light re-evaluation
    (Table 10). None: the frames that the first selection showed."""

    on_exhausted: Literal["last", "likeliest"] = "last"
    """The keyframe after λ refusals: the frame that was selected last and is not judged, as in the
    paper, or the judged frame with the highest probability of A."""

    max_frames: int | None = Field(default=None, ge=1)
    """Maximum number of frames shown to the policy, sampled uniformly from longer videos. None: as
    many as `engine.max_model_len` holds. Masks are made for every frame in any case."""

    frame_names: Literal["index", "seconds"] = "index"
    """How prompts and answers name frames: by position, or by time in seconds at the rate `fps`.
    Qwen2.5-VL merges two neighbouring frames into the same tokens; it can tell such a pair's time,
    but not which of the two frames is meant."""

    fps: float = Field(default=2.0, gt=0)
    """Frame rate reported to the policy, which derives the temporal positions (M-RoPE) from it."""

    zero_target: bool = False
    """Use the KTG prompt that allows an empty list of boxes."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature. 0: greedy."""

    vdg_tokens: int = Field(default=512, ge=1)
    """Maximum number of tokens of a description."""

    kfg_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of a keyframe selection."""

    aks_tokens: int = Field(default=2000, ge=1)
    """Maximum number of tokens of a keyframe judgement."""

    ktg_tokens: int = Field(default=2000, ge=1)
    """Maximum number of tokens of a grounding response."""

    max_objects: int = Field(default=32, ge=1)
    """Maximum number of objects to segment; further boxes of a response are dropped and counted as
    a fault."""

    duplicate_iou: float = Field(default=0.9, gt=0, le=1)
    """An object whose box has at least this IoU with an earlier one's, and whose point is as close,
    is the same object and segmented once."""

    models: dict[PolicyTask, str] = Field(default_factory=dict)
    """Model of a task, if it is not the scored checkpoint: a training stage, `base`, a folder or a
    hub id. Table 6's separated architecture has one model per task; each needs its own share of
    the GPU."""


class PredictSection(ReasoningSection):
    """The inference pipeline: video description generation (VDG), keyframe generation (KFG),
    agentic keyframe selection (AKS) and keyframe target grounding (KTG)."""

    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further predictions of every checkpoint: a name, and the keys of `predict` that differ, such
    as `{no-aks: {rounds: 0}}`. Variants share equal requests, so that a description or a first
    candidate is generated once, and are scored as `<checkpoint>@<variant>`."""

    engines: int | None = Field(default=None, ge=1)
    """Number of policy engines. None: as many as the cluster's GPUs hold; 1 on a CPU."""

    segmenters: int | None = Field(default=None, ge=1)
    """Number of SAM2 processes, which work while the engines answer. None: as many as engines."""

    engine_gpus: float | None = Field(default=None, gt=0)
    """GPUs per engine, which may be a fraction. None: `engine.tensor_parallel_size`, or 0.75 if
    that is 1, so that a segmenter shares the GPU."""

    segmenter_gpus: float = Field(default=0.25, gt=0, le=1)
    """Share of a GPU per segmenter."""

    videos_per_engine: int = Field(default=16, ge=1)
    """Maximum number of videos that an engine works on at the same time. Fewer are admitted if
    their tokens would not fit into its caches."""

    @field_validator("variants")
    @classmethod
    def _known_keys(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, changes in variants.items():
            if not VARIANT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} must be lower-case words and digits joined by '-'")
            if name in BUILT_IN_VARIANTS:
                raise ValueError(f"{name!r} is built in (eval.baselines, eval.oracles)")
            for key in changes:
                if key not in ReasoningSection.model_fields:
                    hint = did_you_mean(key, ReasoningSection.model_fields)
                    raise ValueError(f"{name}.{key}: unknown or not a key of a variant{hint}")
            try:
                ReasoningSection.model_validate(changes)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, (name, *first["loc"])))
                raise ValueError(f"{where}: {first['msg']}") from error
        return variants

    def reasoning(self, variant: str | None = None) -> ReasoningSection:
        """Return the settings of a variant, built in or not; None: those of `predict` itself."""
        values = {name: getattr(self, name) for name in ReasoningSection.model_fields}
        if variant is not None:
            values |= {**BUILT_IN_VARIANTS, **self.variants}[variant]
        return ReasoningSection.model_validate(values)

    @property
    def other_models(self) -> list[str]:
        """Models that any setting names for a task, sorted."""
        settings = [self.reasoning(variant) for variant in (None, *self.variants)]
        return sorted({model for section in settings for model in section.models.values()})
