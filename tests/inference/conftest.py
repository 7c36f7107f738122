"""One vLLM engine and two tiny checkpoints, randomly initialised, for the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.recipe.inference_section import EngineSection

SECTION = EngineSection(
    max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=1024, kv_cache_bytes=64 << 20
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    from rcot_rl.tiny.policy_model import PolicySize, build_model, save_policy
    from rcot_rl.tiny.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    for seed in (0, 1):
        save_policy(
            build_model(tokenizer, PolicySize(layers=2), seed), tokenizer, folder / f"m{seed}"
        )
    return folder / "m0", folder / "m1"


@pytest.fixture(scope="session")
def running_engine(checkpoints):
    import torch

    from rcot_rl.inference.engine import PolicyEngine

    threads = torch.get_num_threads()
    with PolicyEngine(checkpoints[0], SECTION, device="cpu") as engine:
        yield engine
    torch.set_num_threads(threads)


@pytest.fixture
def engine(running_engine, checkpoints):
    """Return the running engine, with the weights of the first checkpoint."""
    if running_engine.model != checkpoints[0]:
        running_engine.load_checkpoint(checkpoints[0])
    return running_engine
