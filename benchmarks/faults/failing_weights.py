"""A vLLM worker extension that fails once if RCOT_FAULTS/weights exists, and removes that file."""

import os
from typing import Any

from rcot_rl.training.cpu.vllm_worker import CpuWorkerExtension


class FailingWeights(CpuWorkerExtension):
    """An engine that refuses its next weights."""

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError if the fault is armed, else load the weights."""
        try:
            os.unlink(os.path.join(os.environ["RCOT_FAULTS"], "weights"))
        except FileNotFoundError:
            return super().update_weights_from_ipc(*args, **kwargs)
        raise RuntimeError("planted fault: the engine refuses the weights")
