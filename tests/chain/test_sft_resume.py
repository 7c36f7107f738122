"""CoT-SFT on the real stack, resumed at an epoch boundary, trains every planned step once.

One run saves each step. A copy of it without the later checkpoints is what a run leaves that was
killed right after a step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROWS, BATCH, EPOCHS, SEED = 18, 4, 3, 1
STEPS = ROWS // BATCH * EPOCHS
SETTINGS = [
    "toy.corpora=[{layout: mevis, split: train, videos: 30}]",
    "data.corpora=[{dataset: mevis}]",
    "data.describe=template",
    "data.sets={sft-384: {ktg: 9, aks: 9, val: 4}, grpo-aks-480: {aks: 4, val: 4}, "
    "grpo-ktg-960: {ktg: 4, val: 4}}",
    "data.allow_smaller=true",
    f"train.sft.batch_size={BATCH}",
    "train.sft.micro_batch_size=2",
    f"train.sft.epochs={EPOCHS}",
    "train.sft.save_every=1",
    "train.sft.verl={trainer.max_ckpt_to_keep: null}",
    "eval.benchmarks=[]",
    "stages=[data, sft]",
]

LENGTHS = r"""
import json, sys
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.tokenizer import hf_processor

config = OmegaConf.load(sys.argv[1])
model = config.model.path
rows = create_sft_dataset(
    config.data.train_files, config.data, AutoTokenizer.from_pretrained(model), hf_processor(model)
)
print(json.dumps([len(rows[k]["input_ids"]) for k in range(len(rows))]))
"""


def tokens(run: Path) -> list[int]:
    """Return the tokens of each step's batch, as the trainer logged them."""
    rows = [json.loads(row) for row in (run / "sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "every step once"
    return [round(row["train/global_tokens"]) for row in rows]


def weights(run: Path) -> dict:
    import torch

    file = run / f"sft/checkpoints/global_step_{STEPS}/model_world_size_1_rank_0.pt"
    state = torch.load(file, map_location="cpu", weights_only=False)
    return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in state.items()}


def start(start_rcot, run: Path, *more: str) -> None:
    log = run.parent / f"{run.name}.txt"
    process = start_rcot(
        "run", "laptop", *SETTINGS, *more, "--out", str(run), stdout=-3, stderr=log.open("w")
    )
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, start_rcot) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    start(start_rcot, run)
    return run


def test_an_uninterrupted_run_takes_the_rows_that_the_seed_gives(straight, run_python):
    from torch import Generator, randperm

    path = str(straight / "sft/attempt-1/verl.yaml")
    output = run_python(LENGTHS, path, VERL_PLATFORM="cpu", RCOT_RL_PLUGIN="required")
    lengths = json.loads(output.splitlines()[-1])
    assert len(lengths) == ROWS and len(set(lengths)) > 4
    expected = []
    for epoch in range(EPOCHS):
        order = randperm(ROWS, generator=Generator().manual_seed(SEED + epoch)).tolist()
        batches = [order[k : k + BATCH] for k in range(0, ROWS - BATCH + 1, BATCH)]
        expected += [sum(lengths[row] for row in batch) for batch in batches]
    assert tokens(straight) == expected


@pytest.mark.parametrize(("step", "ranks"), [(4, 1), (8, 1), (6, 1), (8, 2)])
def test_a_resumed_run_trains_every_step_once(straight, tmp_path, start_rcot, step, ranks):
    import torch

    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "sft" / "done.json").unlink()
    shutil.rmtree(run / "sft" / "model")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / "sft" / "checkpoints" / f"global_step_{later}")
    start(start_rcot, run, f"cluster.gpus_per_node={ranks}")
    assert (run / "sft" / "attempt-2").is_dir() and not (run / "sft" / "attempt-3").exists()
    assert tokens(run) == tokens(straight)
    if ranks == 1:
        expected, resumed = weights(straight), weights(run)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)
