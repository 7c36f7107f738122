"""Join the Ray of a job as verl does, and print what a worker of it sees.

The output has the variables of the stage and of the job, and the origin of the worker's code.
"""

import os
import sys
from pathlib import Path

import ray

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import training_environment

recipe = load_recipe("laptop", ["cluster.ray_address=auto"])
environment = training_environment(recipe, Path(sys.argv[1]) / "stage" / "attempt-1")
ray.init(address="auto", runtime_env={"env_vars": environment}, log_to_driver=False)


@ray.remote
def describe_worker() -> str:
    import rcot_rl

    names = ("RCOT_RL_PLUGIN", "MY_SECRET", "VLLM_CPU_KVCACHE_SPACE")
    values = " ".join(os.environ[n] for n in names)
    return f"{values} and the code {'_ray_pkg_' in rcot_rl.__file__}"


print("a worker has", ray.get(describe_worker.remote(), timeout=60))
