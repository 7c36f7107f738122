"""Fixtures of the preflight tests: a large host, the 3B recipe's inputs, built shards."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.preflight.checks.case import GIB, HostFacts
from cluster.preflight.checks.policy_facts import PUBLISHED, parameters_of
from cluster.preflight.plan import Report, examine
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe

BIG_HOST = {
    "cpus": 64,
    "ram_bytes": 512 * GIB,
    "available_bytes": 500 * GIB,
    "disk_free_bytes": 2000 * GIB,
    "shm_bytes": 256 * GIB,
    "gpu_gib": 48.0,
    "gpus": 4,
}
SMALL_SETS = (
    "data.sets={sft-384: {ktg: 16, aks: 16, val: 4}, grpo-aks-480: {aks: 32, val: 4}, "
    "grpo-ktg-960: {ktg: 32, val: 4}}"
)
CORPORA = {
    "ref-youtube-vos": ("ref-youtube-vos", ("train", "valid")),
    "mevis": ("mevis", ("train", "valid_u")),
    "revos": ("ReVOS", ("train", "valid")),
    "reasonvos": ("ReasonVOS", ("valid",)),
    "davis17": ("davis17", ("valid",)),
}
VARIABLES = ("RAY_ADDRESS", "WANDB_API_KEY", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide variables, logins and hub cache of this host; report that vLLM for GPUs is installed."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "0.24.0" if n == "vllm" else installed(n)
    )


@pytest.fixture(scope="session")
def fake_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the config of Qwen2.5-VL-3B and a sparse file of its weights' size."""
    folder = tmp_path_factory.mktemp("policy") / "Qwen2.5-VL-3B-Instruct"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    shape = PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"]
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "qwen2_5_vl"}))
    limits = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    n = parameters_of(shape)
    header = json.dumps({"all": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * n)
    return folder


@pytest.fixture(scope="session")
def whole_3b(tmp_path_factory: pytest.TempPathFactory, fake_3b: Path) -> list[str]:
    """Return overrides that point the 3B recipe to existing inputs."""
    root = tmp_path_factory.mktemp("corpora")
    for layout, (folder, splits) in CORPORA.items():
        for split in splits:
            write_corpus(root / folder, layout, split, 2, 1, "lattice")
    texts = root / "texts.jsonl"
    texts.write_text("")
    where = {layout: str(root / folder) for layout, (folder, _) in CORPORA.items()}
    trained = [
        {"dataset": d, "root": where[d], "split": "train"}
        for d in ("ref-youtube-vos", "mevis", "revos")
    ]
    scored = [{"dataset": d, "root": where[d], "split": CORPORA[d][1][-1]} for d in CORPORA]
    return [
        f"models.policy={fake_3b}",
        "models.segmenter=tiny",
        f"data.corpora={json.dumps(trained)}",
        f"data.describe={texts}",
        f"data.trace={texts}",
        f"eval.benchmarks={json.dumps(scored)}",
    ]


@pytest.fixture(scope="session")
def shard_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards of a small laptop run, with counted tokens."""
    from rcot_rl.stages.data_stage import build_shards

    out = tmp_path_factory.mktemp("built")
    write_corpus(out / "mevis", "mevis", "train", 40, 1, "lattice")
    build_shards(load_recipe("laptop", [*_small(out), "data.workers=1"]), out / "shards")
    return out


def _small(root: Path) -> list[str]:
    corpora = json.dumps([{"dataset": "mevis", "root": str(root / "mevis")}])
    return [SMALL_SETS, f"data.corpora={corpora}", "data.describe=template"]


@pytest.fixture
def built(shard_root: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Return a run folder with a copy of those shards, and the overrides that fit them."""
    shutil.copytree(shard_root / "shards", tmp_path / "run" / "shards")
    stages = "stages=[sft, grpo-aks, grpo-ktg]"
    return tmp_path / "run", [*_small(shard_root), "train.sft.batch_size=32", "toy=null", stages]


@pytest.fixture
def look(calm: None, tmp_path: Path, whole_3b: list[str]) -> Callable[..., Report]:
    """Return a function that runs `examine` on a large host.

    Its arguments: "3b" (with existing inputs) or a recipe's name, overrides, `root`, host facts.
    """

    def examine_on(
        recipe: str,
        *overrides: str,
        root: Path | None = None,
        asked_gpu_gib: float | None = None,
        **facts: Any,
    ) -> Report:
        base = whole_3b if recipe == "3b" else []
        name = "rcot_seg_3b" if recipe == "3b" else recipe
        loaded = load_recipe(name, [*base, *overrides])
        host = HostFacts(**{**BIG_HOST, **facts})
        return examine(loaded, root or tmp_path / "run", gpu_gib=asked_gpu_gib, host=host)

    return examine_on
