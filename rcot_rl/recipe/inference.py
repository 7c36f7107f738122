"""Recipe sections of inference: vLLM's engine, and the two-stage pipeline (A.3, Tables 3, 4, 10).

The canvases, the device, the models and the prompts are keys of the recipe itself, since training
needs them too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rcot_rl.recipe.base import Section


class EngineSection(Section):
    """The offline vLLM engine of `predict`, `segment` and the held-out rewards."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's own on a GPU, float32 on a CPU, where bf16 is slower and coarser."""

    max_model_len: int | None = Field(default=None, ge=64)
    """Tokens of prompt and response; a frame of 448 x 448 pixels costs 128. None: 32768, or the
    model's largest position if that is smaller."""

    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=8192, ge=64)
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    """Share of a GPU's memory for the engine; the rest is SAM2's."""

    kv_cache_bytes: int | None = Field(default=None, ge=2**20)
    """Size of the key-value cache. None: what `gpu_memory_utilization` leaves; on a CPU 256 MiB,
    or what one longest prompt needs."""

    enforce_eager: bool = False
    """Neither compile nor capture graphs: starts sooner, runs slower. A CPU always does so."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    enable_prefix_caching: bool = True
    """Prompts that begin with the same media share its keys and values."""

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`."""


class PredictSection(Section):
    """VDG, KFG, AKS and KTG."""

    rounds: int = Field(default=5, ge=0)
    """λ, the most times that AKS judges a candidate keyframe (Table 4). 0: AKS is not used."""

    vdg: bool = True
    """Describe the video first (Table 3). Without it, prompts say that there is no description."""

    kfg: bool = True
    """Ask for the first candidate. Without it, it is the first frame (Table 3)."""

    reevaluate_frames: int | None = Field(default=None, ge=1)
    """Re-select from so many uniformly sampled frames instead of the whole video; 16 is the
    paper's light re-evaluation (Table 10). None: the whole video."""

    max_frames: int | None = Field(default=None, ge=1)
    """A longer video is shown as so many uniformly sampled frames. None: always the whole video,
    as in the paper; one too long for the engine is then an error."""

    fps: float = Field(default=2.0, gt=0)
    """Frames a second that the policy is told; it places frames in time by it (Qwen's M-RoPE)."""

    zero_target: bool = False
    """Ask for boxes with the prompt that allows for an empty list."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    vdg_tokens: int = Field(default=512, ge=1)
    """Maximum number of tokens of a description."""

    kfg_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of a keyframe selection."""

    aks_tokens: int = Field(default=2000, ge=1)
    """Maximum number of tokens of a keyframe judgement."""

    ktg_tokens: int = Field(default=2000, ge=1)
    """Maximum number of tokens of a grounding response."""

    batch: int = Field(default=16, ge=1)
    """(video, query) pairs that are worked on together. Their videos are in memory at once."""
