"""verl's GRPO task runner, in a process where our trainers are registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from verl.trainer import main_ppo

_verl_task_runner: Any = main_ppo.TaskRunnerV1
_VerlTaskRunner: Any = _verl_task_runner.__ray_metadata__.modified_class


@ray.remote
class TaskRunner(_VerlTaskRunner):
    """verl's task runner; importing our trainers registers them."""

    def run(self, config: Any) -> None:
        """Run the stage that `config` (verl's configuration) describes."""
        import rcot_rl.training.grpo_trainer  # noqa: F401  registers `rcot_sync`

        try:
            super().run(config)
        finally:
            targets = config.trainer.rcot.get("prometheus")
            if targets is not None:
                Path(targets).unlink(missing_ok=True)  # nothing answers there any more
