"""Recipe sections of inference: the vLLM engine and the two-stage pipeline (A.3, Tables 3, 4, 10).

Canvases, device, models and prompts are top-level keys of the recipe, because training uses them
too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rcot_rl.recipe.base import Section


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


class PredictSection(Section):
    """The inference pipeline: video description generation (VDG), keyframe generation (KFG),
    agentic keyframe selection (AKS) and keyframe target grounding (KTG)."""

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
    (Table 10). None: the whole video."""

    max_frames: int | None = Field(default=None, ge=1)
    """Maximum number of frames shown to the policy, sampled uniformly from longer videos. None:
    always the whole video, as in the paper; a video too long for the engine is then an error."""

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

    batch: int = Field(default=16, ge=1)
    """Number of (video, query) pairs processed together; their videos are in memory at the same
    time."""
