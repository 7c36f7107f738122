"""vLLM's worker extension, failing once: when RCOT_FAULTS/weights is there, which it removes."""

import os
from typing import Any

from rcot_rl.training.cpu.vllm_worker import CpuWorkerExtension


class FailingWeights(CpuWorkerExtension):
    """An engine that does not take its next weights."""

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> Any:
        try:
            os.unlink(os.path.join(os.environ["RCOT_FAULTS"], "weights"))
        except FileNotFoundError:
            return super().update_weights_from_ipc(*args, **kwargs)
        raise RuntimeError("planted: the engine does not take the weights")
