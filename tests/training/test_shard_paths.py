"""Shards in run folders with odd names: verl's own datasets read them, or the name is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcot_rl.system.paths import path_fault

pytestmark = pytest.mark.slow

CODE = r"""
import json, sys
from pathlib import Path
import datasets
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.trainer.ppo.utils import create_rl_dataset
from verl.trainer.sft_trainer import create_sft_dataset
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import grpo_config, sft_config

datasets.disable_progress_bars()
recipe, tokenizer = load_recipe("laptop"), AutoTokenizer.from_pretrained(TINY)
common = {"model": TINY, "train": [Path("x")], "val": [], "out": Path("out")}
bases = {
    "sft": sft_config(recipe, "sft", **common), "grpo": grpo_config(recipe, "grpo-ktg", **common)
}

def read(kind, shard):
    base = bases[kind]
    OmegaConf.update(base, "data.train_files", [shard])
    OmegaConf.update(base, "trainer.default_local_dir", shard)
    OmegaConf.save(base, "verl.yaml")
    config = OmegaConf.load("verl.yaml")
    OmegaConf.resolve(config)
    assert config.trainer.default_local_dir == shard
    if kind == "sft":
        rows = create_sft_dataset(config.data.train_files, config.data, tokenizer, None)
        return [messages[0]["content"] for messages in rows.messages]
    rows = create_rl_dataset(config.data.train_files, config.data, tokenizer, None)
    return [row[0]["content"] for row in rows.dataframe["prompt"]]

rows = []
for kind, shard in json.load(open("shards.json")):
    try:
        rows.append(read(kind, shard))
    except Exception as error:
        rows.append(type(error).__name__)
json.dump(rows, open("rows.json", "w"))
"""

NAMES = [f"k{sign}1" for sign in map(chr, range(32, 127)) if sign not in "/\\"]
NAMES += ["k\\1", "k[12]", "k1", "k2", "k::1", "k://1", "k**", "k$HOME", "k${seed}", "lr=1e-6", "é"]
NAMES += ["k$(x)", "k$", ".k", "-k", "__k__", "k%05d", "k{1..3}", "k[!x]1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write folders side by side, each with a shard that holds the folder's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        turns = [{"role": "user", "content": name}]
        row = {
            "prompt": turns,
            "messages": [*turns, {"role": "assistant", "content": "yes"}],
            "extra_info": {"index": 0},
        }
        pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def rows_read(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, run_verl_python
) -> dict[tuple[str, str], object]:
    """Return (kind of training, folder) -> the rows that verl reads there, or its error.

    The configuration goes through its file, as it does in a run.
    """
    work = tmp_path_factory.mktemp("work")
    cases = [(kind, name) for name in NAMES for kind in ("sft", "grpo")]
    shards = [(kind, str(folders / name / "train-00000-of-00001.parquet")) for kind, name in cases]
    (work / "shards.json").write_text(json.dumps(shards))
    run_verl_python(CODE, cwd=work, HF_HOME=str(work / "hub"))
    return dict(zip(cases, json.loads((work / "rows.json").read_text()), strict=True))


def is_refused(folders: Path, name: str) -> bool:
    return path_fault(folders / name, handed_on=True) is not None


def test_a_shard_is_read_from_its_own_folder_or_the_folder_is_refused(
    folders: Path, rows_read: dict[tuple[str, str], object]
) -> None:
    wrong = {
        (kind, name): rows
        for (kind, name), rows in rows_read.items()
        if rows != [name] and not is_refused(folders, name)
    }
    assert wrong == {}


def test_only_names_that_need_it_are_refused(
    folders: Path, rows_read: dict[tuple[str, str], object]
) -> None:
    """Names that verl reads may still be patterns or variables that happen to match themselves."""
    refused = {name for name in NAMES if is_refused(folders, name)}
    assert {"k[12]", "k*1", "k?1", "k::1", "k${seed}"} <= refused
    assert all(
        any(sign in name for sign in ("[", "*", "?", "$H", "$1", "${", "::")) for name in refused
    )
    assert rows_read["grpo", "k[12]"] == ["k1", "k2"], "the fault that the rule prevents"
