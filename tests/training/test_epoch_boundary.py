"""Training resumed after any step, also at the end of an epoch, sees the rows that the seed gives.

verl's own loops, samplers, loaders and checkpoint handler run here; only the model is missing.
"""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SEED, EPOCHS, BATCH = 5, 3, 12


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Start a process group of one rank, which verl's checkpoint handler needs."""
    import torch.distributed as dist

    if dist.is_initialized():  # by the vLLM engine of an earlier slow test
        assert dist.get_world_size() == 1
        yield
        return
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Engine:
    """verl's engine as one of `ranks` ranks, without a model."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_data_parallel_size(self) -> int:
        return self.ranks

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def save_checkpoint(self, local_path: str, **_: Any) -> None:
        Path(local_path).mkdir(parents=True, exist_ok=True)
        for kind in ("model", "optim", "extra_state"):
            name = f"{kind}_world_size_{self.ranks}_rank_{self.rank}.pt"
            with zipfile.ZipFile(Path(local_path) / name, "w") as file:
                file.writestr("data", "x")

    def load_checkpoint(self, path: str) -> None:
        assert Path(path).is_dir()


class Client:
    """verl's training worker; `steps` has the rows of each step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def reset(self) -> None:
        pass

    def step_profile(self) -> None:
        pass

    def train_batch(self, data: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        self.steps.append(data["row"].flatten().tolist())
        return tu.get_tensordict({}, {"metrics": {}})


def sft(
    folder: Path, rows: int, workers: int = 0, rank: int = 0, ranks: int = 1, epochs: int = EPOCHS
) -> list[list[int]]:
    """Run CoT-SFT in `folder` on one rank, from its newest checkpoint: the rows of each step."""
    import torch
    from omegaconf import OmegaConf
    from verl.trainer import sft_trainer

    from rcot_rl.training.sft_trainer import RCoTSFTTrainer

    trainer = object.__new__(RCoTSFTTrainer)
    trainer.config = OmegaConf.create(
        {
            "data": {
                "train_batch_size": BATCH,
                "pad_mode": "right",
                "num_workers": workers,
                "use_dynamic_bsz": False,
                "max_token_len_per_gpu": 1,
                "micro_batch_size_per_gpu": 1,
            },
            "model": {"use_remove_padding": False},
            "trainer": {
                "seed": SEED,
                "total_epochs": epochs,
                "total_training_steps": None,
                "save_freq": 1,
                "test_freq": -1,
                "max_ckpt_to_keep": None,
                "default_local_dir": str(folder),
                "project_name": "p",
                "experiment_name": "e",
                "logger": [],
                "rcot": {"provenance": {}},
            },
        }
    )
    trainer.rank, trainer.device_name = 0, "cpu"
    trainer.engine, trainer.training_client = Engine(rank, ranks), Client()
    trainer.train_dataset = [{"row": torch.tensor([k])} for k in range(rows)]
    trainer.val_dataset = None
    trainer.optimizer_config = OmegaConf.create({})
    trainer.model_config = OmegaConf.create({"tokenizer": {"pad_token_id": 0}})
    trainer.start_profile_step = trainer.end_profile_step = -1
    trainer._get_batch_seqlens = lambda data: [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "aggressive_empty_cache", lambda **_: None)
        patch.setattr(sft_trainer, "log_gpu_memory_usage", lambda *_, **__: None)
        trainer._build_dataloader()
        trainer._init_engine()
        trainer._build_ckpt_handler()
        trainer.resume_global_step = trainer.ckpt_handler.load_checkpoint()
        trainer.fit()
    return trainer.training_client.steps


def derived(rows: int) -> list[list[int]]:
    """Derive the global batches of all epochs from the seed alone."""
    from torch import Generator, randperm

    out = []
    for epoch in range(EPOCHS):
        order = randperm(rows, generator=Generator().manual_seed(SEED + epoch)).tolist()
        out += [order[k : k + BATCH] for k in range(0, rows - BATCH + 1, BATCH)]
    return out


def interrupt(folder: Path, step: int) -> None:
    """Leave `folder` as a run that ended right after `step` would."""
    import shutil

    from rcot_rl.training.checkpoint_store import all_of, settle

    for checkpoint in all_of(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    assert settle(folder) == step


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("rows", [48, 53])
def test_sft_resumed_after_any_step_trains_the_rest_once(tmp_path, rows, workers):
    expected = derived(rows)
    steps_per_epoch = rows // BATCH
    assert sft(tmp_path, rows, workers) == expected
    after = range(len(expected)) if workers == 0 else (3, steps_per_epoch, 2 * steps_per_epoch)
    for step in sorted(after, reverse=True):
        if step:
            interrupt(tmp_path, step)
            assert sft(tmp_path, rows, workers) == expected[step:], step


def test_sft_resumed_at_every_epoch_boundary_in_turn_trains_every_step(tmp_path):
    """A run that was resumed at a boundary saves positions that the next resume can use."""
    expected = derived(53)
    assert sft(tmp_path, 53, epochs=1) == expected[:4]
    assert sft(tmp_path, 53, epochs=2) == expected[4:8]
    interrupt(tmp_path, 6)
    assert sft(tmp_path, 53) == expected[6:]


@pytest.mark.parametrize("step", [3, 4, 8])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1), (2, 3), (4, 2)])
def test_sft_resumed_on_another_number_of_ranks_trains_the_rest_once(tmp_path, before, after, step):
    from rcot_rl.training.reshard_checkpoint import _convert_positions

    rows, expected = 53, [sorted(batch) for batch in derived(53)]
    for rank in range(before):
        sft(tmp_path / f"{before}-{rank}", rows, rank=rank, ranks=before)
    parts = []
    for rank in range(after):
        folder = tmp_path / f"resumed-{rank}"
        source = tmp_path / f"{before}-0" / f"global_step_{step}"
        Engine(rank, after).save_checkpoint(str(folder / source.name))
        _convert_positions(source, folder / source.name, before, after)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        parts.append(sft(folder, rows, rank=rank, ranks=after))
    merged = [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
    assert merged == expected[step:]


# --- GRPO -----------------------------------------------------------------------------------------


def grpo(rows: int, batch: int, workers: int, state: dict | None, steps: int) -> tuple[list, list]:
    """The prompts of `steps` steps of verl's GRPO loop, and the loader's state after each."""
    import torch
    from omegaconf import OmegaConf
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    data = [{"row": torch.tensor(k), "raw_prompt": k} for k in range(rows)]
    settings = OmegaConf.create({"shuffle": True, "seed": SEED, "train_batch_size": BATCH})
    settings.gen_batch_size = batch
    trainer = object.__new__(PPOTrainerSync)
    trainer.config = OmegaConf.create({"data": settings})
    trainer.global_steps = 0
    trainer.train_dataloader_it = None
    # as `_init_dataloader` builds it
    trainer.train_dataloader = StatefulDataLoader(
        dataset=data,
        batch_size=batch,
        num_workers=workers,
        drop_last=True,
        collate_fn=lambda part: {
            "row": torch.stack([one["row"] for one in part]),
            "raw_prompt": np.array([one["raw_prompt"] for one in part], dtype=object),
        },
        sampler=create_rl_sampler(settings, data),
    )
    if state is not None:
        trainer.train_dataloader.load_state_dict(state)
    prompts, states = [], []
    for _ in range(steps):
        prompts.append(trainer._next_train_batch()["row"].tolist())
        states.append(trainer.train_dataloader.state_dict())
    return prompts, states


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fetched", [BATCH, 1])
@pytest.mark.parametrize("rows", [36, 41])
def test_grpo_resumed_after_any_step_draws_the_prompts_that_follow(rows, fetched, workers):
    """fetched: prompts that verl takes from the loader at once; 1 with dynamic sampling."""
    from torch import Generator, randperm

    steps = 3 * (rows // BATCH)
    generator, order = Generator().manual_seed(SEED), []
    while len(order) < steps * BATCH:
        for _ in range(2 if workers else 1):  # with workers, torchdata shuffles twice an epoch
            of_epoch = randperm(rows, generator=generator).tolist()
        order += of_epoch[: rows - rows % fetched]
    expected = [order[k * BATCH : (k + 1) * BATCH] for k in range(steps)]
    prompts, states = grpo(rows, fetched, workers, None, steps)
    assert prompts == expected
    after = range(1, steps) if workers == 0 else (2, 3, 6)
    for step in after:
        rest, _ = grpo(rows, fetched, workers, states[step - 1], steps - step)
        assert rest == expected[step:], step
