"""Count how often vLLM's vision tower runs: a worker extension for a benchmark and a test."""

from __future__ import annotations

from typing import Any

from rcot_rl.inference.engine import PolicyEngine

EXTENSION = f"{__name__}.VisionCounter"
"""Value of `engine.vllm.worker_extension_cls`."""


class VisionCounter:
    """Methods that vLLM adds to its worker."""

    model_runner: Any

    def vision_passes(self) -> dict[str, int]:
        """Return the number of images and videos encoded since the first call."""
        model = self.model_runner.model
        if not hasattr(model, "rcot_passes"):
            model.rcot_passes = {"image": 0, "video": 0}
            model._process_image_input = _counted(model, "image", model._process_image_input)
            model._process_video_input = _counted(model, "video", model._process_video_input)
        return dict(model.rcot_passes)


def _counted(model: Any, medium: str, process: Any) -> Any:
    def counted(inputs: Any) -> Any:
        model.rcot_passes[medium] += len(inputs[f"{medium}_grid_thw"])
        return process(inputs)

    return counted


async def vision_passes(engine: PolicyEngine) -> dict[str, int]:
    """Return the number of images and videos that an engine has encoded since the first call."""
    (passes,) = await engine._llm.collective_rpc("vision_passes")
    return passes
