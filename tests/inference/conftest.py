"""One vLLM engine and two tiny checkpoints, randomly initialised, for the slow tests."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from rcot_rl.inference.policy import gather_texts
from rcot_rl.recipe.inference_section import EngineSection

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # engines' processes inherit it
from vision_counter import EXTENSION

SECTION = EngineSection(
    max_model_len=1024,
    max_num_seqs=32,
    max_num_batched_tokens=1024,
    kv_cache_bytes=64 << 20,
    vllm={"worker_extension_cls": EXTENSION},
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    from rcot_rl.tiny.policy_model import PolicySize, build_model, save_policy
    from rcot_rl.tiny.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    size = PolicySize(hidden=128, heads=4, layers=2, vision_hidden=96)
    for seed in (0, 1):
        save_policy(build_model(tokenizer, size, seed), tokenizer, folder / f"m{seed}")
    return folder / "m0", folder / "m1"


@pytest.fixture(scope="session")
def running_engine(checkpoints):
    import torch

    from rcot_rl.inference.engine import PolicyEngine

    threads = torch.get_num_threads()
    # the engine's tasks belong to the event loop in which it was started
    with asyncio.Runner() as runner, runner.run(_started(PolicyEngine, checkpoints[0])) as engine:
        yield BlockingEngine(engine, runner)
    torch.set_num_threads(threads)


async def _started(kind, model):
    return kind(model, SECTION, device="cpu")


class BlockingEngine:
    """An engine whose calls wait for the result."""

    def __init__(self, engine, runner):
        self.engine, self.runner = engine, runner

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def generate(self, requests, sampling):
        """Return the texts of requests that are in progress together."""
        return self.run(gather_texts(self.engine, requests, sampling))

    def respond(self, request, sampling, started=None):
        return self.run(self.engine.generate(request, sampling, started))

    def load_checkpoint(self, path):
        self.run(self.engine.load_checkpoint(path))

    @property
    def model(self):
        return self.engine.model


@pytest.fixture
def engine(running_engine, checkpoints):
    """Return the running engine, with the weights of the first checkpoint."""
    if running_engine.model != checkpoints[0]:
        running_engine.load_checkpoint(checkpoints[0])
    return running_engine
