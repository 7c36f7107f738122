"""Each patched name of verl still exists, and does what the patch says that it repairs."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_equally_long_samples_keep_their_positions():
    out = run(
        """
import torch, verl
from tensordict import TensorDict
import verl.utils.tensordict_utils as tu
samples = [torch.arange(12).view(4, 3) + 100 * k for k in range(5)]
ragged = torch.nested.as_nested_tensor(samples, layout=torch.jagged)
data = {"position_ids": ragged}
tu.maybe_fix_3d_position_ids(data)
parts = data["position_ids"].unbind()
print(all(torch.equal(a, b) for a, b in zip(parts, samples)))
""",
        RCOT_RL_PLUGIN="required",
    )
    assert out.strip().endswith("True")


def test_verl_finds_the_cpu_platform_and_engine_and_vllm():
    out = run(
        """
import verl
from verl.plugin.platform import get_platform
from verl.third_party.vllm import vllm_version
import rcot_rl.training.cpu.engine_cpu
from verl.workers.engine import EngineRegistry
print(get_platform().device_name, get_platform().communication_backend_name(), vllm_version)
""",
        RCOT_RL_PLUGIN="required",
        VERL_PLATFORM="cpu",
    )
    assert out.split()[-3:-1] == ["cpu", "gloo"]
    assert out.split()[-1].startswith("0.24.0")


LOG_PROBS = """
import torch, verl
from verl.utils.torch_functional import logprobs_from_logits
from rcot_rl.training import engine_sdpa
engine_sdpa.CHUNK_TOKENS = 128
torch.manual_seed(0)
labels = torch.randint(0, 563, (300,))
found = []
for function, dtype in FUNCTIONS:
    torch.manual_seed(1)
    logits = (torch.randn(300, 563) * 4).to(torch.DTYPE).to(dtype).requires_grad_()
    value = function(logits, labels)
    assert value.dtype == torch.float32 and value.shape == labels.shape
    (value * torch.linspace(-1, 1, 300)).sum().backward()
    found.append((value.detach(), logits.grad.float()))
(a, da), (b, db) = found
print(float((a - b).abs().max()), float((da - db).abs().max()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_and_gradients_of_our_engines_are_verls_own(dtype: str):
    """Of 16-bit logits: those that verl has when the same numbers come in fp32."""
    ours = f"(engine_sdpa.log_probs_of_labels, torch.{dtype})"
    functions = f"[(logprobs_from_logits, torch.float32), {ours}]"
    out = run(
        LOG_PROBS.replace("FUNCTIONS", functions).replace("DTYPE", dtype),
        RCOT_RL_PLUGIN="required",
        VERL_PLATFORM="cpu",
    )
    values, gradients = map(float, out.split()[-2:])
    assert values < 1e-5
    # a gradient of 16 bits is rounded: at most 2**-9 of a number below 1
    assert gradients < {"float32": 1e-6, "bfloat16": 2**-9}[dtype]


def test_windows_attended_together_are_windows_attended_one_by_one():
    """Outputs and gradients of a tower, on images whose sides are no multiple of a window's."""
    out = run(
        """
import torch, verl
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from rcot_rl.training.engine_sdpa import windows_together
torch.manual_seed(0)
config = Qwen2_5_VLVisionConfig(depth=3, hidden_size=32, intermediate_size=48, num_heads=2,
    out_hidden_size=16, fullatt_block_indexes=[1], window_size=56, patch_size=14)
config._attn_implementation = "sdpa"
tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)
grid = torch.tensor([[1, 10, 6], [1, 4, 14], [2, 6, 6]])
pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
found = []
for together in (False, True):
    if together:
        windows_together(tower)
    tower.zero_grad()
    made = tower(pixels, grid_thw=grid)
    made = made.pooler_output if hasattr(made, "pooler_output") else made
    (made * torch.linspace(-1, 1, made.shape[-1])).sum().backward()
    found.append((made.detach(), torch.cat([p.grad.flatten() for p in tower.parameters()])))
assert tower.config._attn_implementation == "sdpa", "another model can be made of it"
(a, da), (b, db) = found
print(len(a), float((a - b).abs().max()), float((da - db).abs().max() / da.abs().max()))
""",
        RCOT_RL_PLUGIN="required",
        VERL_PLATFORM="cpu",
    )
    tokens, values, gradients = map(float, out.split()[-3:])
    assert tokens == (60 + 56 + 72) / 4
    assert values < 1e-5
    assert gradients < 1e-5


def test_the_gpu_engine_is_the_one_that_verl_takes_on_an_nvidia_gpu():
    out = run(
        """
import verl
import rcot_rl.training.engine_cuda
from verl.workers.engine import EngineRegistry
print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__)
""",
        RCOT_RL_PLUGIN="required",
        VERL_ENGINE_DEVICE="cuda",
        VERL_ENGINE_VENDOR="nvidia",
    )
    assert out.strip().endswith("SdpaFSDPEngineWithLMHead")


def test_without_the_variable_a_users_own_verl_is_left_alone():
    out = run("import verl, sys; print('rcot_rl.training.verl_patches' in sys.modules)")
    assert out.strip().endswith("False")


def test_another_version_of_verl_is_refused_loudly():
    code = """
import importlib.metadata as metadata
lookup = metadata.version
metadata.version = lambda name: "0.10.0" if name == "verl" else lookup(name)
import verl
"""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RCOT_RL_PLUGIN": "required"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "rcot_rl patches verl 0.9.1, found 0.10.0" in done.stderr
