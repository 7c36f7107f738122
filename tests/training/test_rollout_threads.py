"""A rollout engine on a CPU uses as many threads as the recipe says."""

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch, verl
from types import SimpleNamespace
from rcot_rl.training.cpu.vllm_worker import CpuWorkerExtension
torch.set_num_threads(2)
counts = []
for options in ({}, {"rcot_threads": 1}):
    config = SimpleNamespace(additional_config=options)
    CpuWorkerExtension.__new__(CpuWorkerExtension, vllm_config=config)
    counts.append(torch.get_num_threads())
print(*counts)
"""


def test_the_engine_keeps_its_ranks_threads_unless_the_recipe_names_a_number(run_verl_python):
    assert run_verl_python(CODE).split()[-2:] == ["2", "1"]
