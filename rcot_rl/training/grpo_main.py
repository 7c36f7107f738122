"""The process of one GRPO stage: `python -m rcot_rl.training.grpo_main CONFIG.yaml`.

CONFIG.yaml is verl's complete configuration, as `verl_config.grpo_config` resolved it. What follows
is verl's own entry point (verl/trainer/main_ppo.py) with our task runner.
"""

from __future__ import annotations

import sys

import ray
from omegaconf import OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

_VerlTaskRunner = TaskRunnerV1.__ray_metadata__.modified_class


@ray.remote
class TaskRunner(_VerlTaskRunner):
    """verl's task runner, in a process where our trainer is registered."""

    def run(self, config: OmegaConf) -> None:
        import rcot_rl.training.trainer  # noqa: F401  registers `rcot_sync`

        super().run(config)


def main(path: str) -> None:
    """Run the stage to its last step, resuming from its newest checkpoint."""
    config = OmegaConf.load(path)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    try:
        run_ppo(config, task_runner_class=TaskRunner)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
