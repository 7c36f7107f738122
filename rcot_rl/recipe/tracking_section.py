"""The recipe's sections on trackers, which follow a run in a process of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rcot_rl.recipe.base import Section

TRACKING = "tracking"
"""Folder of a run for everything that trackers write."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """`offline` writes to the run's folder; `online` needs `wandb login` or WANDB_API_KEY."""

    project: str = "rcot-rl"
    """W&B project."""

    entity: str | None = None
    """W&B user or team. None: the account's default."""

    tags: list[str] = Field(default_factory=list)
    """Tags of all runs, beside those from the recipe (name, policy, seed, reward)."""

    notes: str = ""
    """Notes of all runs."""

    artifacts: Literal["references", "copies", "none"] = "references"
    """How shards, models and predictions become W&B artifacts: `references` records paths and
    checksums, and uploads only small files (manifests, scores, the report); `copies` uploads
    everything."""

    alerts: bool = True
    """Send alerts, such as a collapse of the reward or a hang."""


class TrackingSection(Section):
    """What trackers receive, and how often."""

    tensorboard: bool = False
    """Write TensorBoard files to RUN/tracking/tensorboard."""

    others: list[str] = Field(default_factory=list)
    """Trackers of your own, as `FILE.py:CLASS` (docs/monitoring.md)."""

    rollout_tables: int = Field(default=20, ge=0)
    """About how many steps of a GRPO stage get a table of rollouts, evenly spaced. 0: none."""

    rollout_prompts: int = Field(default=4, ge=0)
    """Prompts of a step whose best and worst responses its tables show, beside the step's best and
    worst groups. Four times as many held-out prompts are compared over the checkpoints."""

    picture_pixels: int = Field(default=448, ge=32)
    """Longest side of a picture; larger frames are scaled down."""

    picture_masks: int = Field(default=0, ge=0)
    """Pictures of a step that show the segmenter's mask of the predicted boxes. Each costs a pass
    of `models.segmenter` for every response that it shows, on the CPU and outside of training."""

    drain_s: float = Field(default=60.0, ge=0)
    """Seconds that the end of a command waits for trackers. What is left is sent by
    `rcot wandb sync RUN`."""
