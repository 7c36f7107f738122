"""The batched kernels of the SDPA engines against verl's and transformers' own."""

import pytest

pytestmark = pytest.mark.slow

LOG_PROBS = """
import torch, verl
from verl.utils.torch_functional import logprobs_from_logits
from rcot_rl.training import sdpa_engine_mixin
sdpa_engine_mixin.CHUNK_TOKENS = 128
torch.manual_seed(0)
labels = torch.randint(0, 563, (300,))
results = []
for function, dtype in FUNCTIONS:
    torch.manual_seed(1)
    logits = (torch.randn(300, 563) * 4).to(torch.DTYPE).to(dtype).requires_grad_()
    value = function(logits, labels)
    assert value.dtype == torch.float32 and value.shape == labels.shape
    (value * torch.linspace(-1, 1, 300)).sum().backward()
    results.append((value.detach(), logits.grad.float()))
(a, da), (b, db) = results
print(float((a - b).abs().max()), float((da - db).abs().max()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_and_gradients_equal_verls(run_verl_python, dtype: str):
    """16-bit logits give what verl computes from the same numbers in fp32."""
    chunked = f"(sdpa_engine_mixin.label_log_probs, torch.{dtype})"
    functions = f"[(logprobs_from_logits, torch.float32), {chunked}]"
    out = run_verl_python(LOG_PROBS.replace("FUNCTIONS", functions).replace("DTYPE", dtype))
    values, gradients = map(float, out.split()[-2:])
    assert values < 1e-5
    # a gradient of 16 bits is rounded: at most 2**-9 of a number below 1
    assert gradients < {"float32": 1e-6, "bfloat16": 2**-9}[dtype]


def test_windows_attended_together_equal_windows_attended_one_by_one(run_verl_python):
    """Outputs and gradients of a tower, on images whose sides are not multiples of a window's."""
    out = run_verl_python(
        """
import torch, verl
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from rcot_rl.training.sdpa_engine_mixin import batch_windows
torch.manual_seed(0)
config = Qwen2_5_VLVisionConfig(depth=3, hidden_size=32, intermediate_size=48, num_heads=2,
    out_hidden_size=16, fullatt_block_indexes=[1], window_size=56, patch_size=14)
config._attn_implementation = "sdpa"
tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)
grid = torch.tensor([[1, 10, 6], [1, 4, 14], [2, 6, 6]])
pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
results = []
for together in (False, True):
    if together:
        batch_windows(tower)
    tower.zero_grad()
    features = tower(pixels, grid_thw=grid)
    features = features.pooler_output if hasattr(features, "pooler_output") else features
    (features * torch.linspace(-1, 1, features.shape[-1])).sum().backward()
    results.append((features.detach(), torch.cat([p.grad.flatten() for p in tower.parameters()])))
assert tower.config._attn_implementation == "sdpa", "another model can be built from it"
(a, da), (b, db) = results
print(len(a), float((a - b).abs().max()), float((da - db).abs().max() / da.abs().max()))
""",
    )
    tokens, values, gradients = map(float, out.split()[-3:])
    assert tokens == (60 + 56 + 72) / 4
    assert values < 1e-5
    assert gradients < 1e-5


def test_verl_takes_the_gpu_engine_on_an_nvidia_gpu(run_verl_python):
    out = run_verl_python(
        """
import verl
import rcot_rl.training.engine_cuda_sdpa
from verl.workers.engine import EngineRegistry
print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__)
""",
        VERL_PLATFORM=None,
        VERL_ENGINE_DEVICE="cuda",
        VERL_ENGINE_VENDOR="nvidia",
    )
    assert out.strip().endswith("SdpaFSDPEngineWithLMHead")
