"""Incomplete or wrong weights are reported from their headers, before torch is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cluster.preflight.plan import check_run
from rcot_rl.errors import InputError
from rcot_rl.inference import model_folder
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.segmentation import segmenter
from rcot_rl.weights import tensors_of, weight_shapes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
TINY = {"models.policy": model_folder.TINY, "models.segmenter": segmenter.TINY}


@pytest.mark.parametrize("key", TINY)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: POINTER, "git lfs pull"),
        (lambda data: b"", "truncated"),
        (lambda data: data[:5], "truncated"),
        (lambda data: data[: len(data) // 2], "bytes, expected"),
        (lambda data: data[:-1], "bytes, expected"),
        (lambda data: data + b"x", "bytes, expected"),
        (lambda data: data[:200], "truncated"),
        (lambda data: b"PK\x03\x04" + data, "pickle"),
        (lambda data: b"\x80\x02" + data, "pickle"),
        (lambda data: data[:8] + b"?" * 100_000 + data[8:], "not JSON"),
    ],
    ids=["lfs", "empty", "5 bytes", "half", "less", "more", "in header", "zip", "pickle", "noise"],
)
def test_spoilt_weights_stop_a_run_at_once(tmp_path: Path, key: str, spoil, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY[key], folder)
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        recipe = load_recipe("laptop", [f"{key}={folder}"])
        check_run(recipe, tmp_path / "run", tuple(recipe.stages), print)
    (fault,) = [line for line in caught.value.faults if message in line]
    assert fault.startswith(f"{file}: ") and "fix: " in fault


@pytest.mark.parametrize("tiny", TINY.values())
def test_headers_are_read_as_safetensors_reads_them(tiny: Path) -> None:
    expected = {name: value.shape for name, value in load_file(tiny / "model.safetensors").items()}
    assert tensors_of(tiny / "model.safetensors") == expected


def sharded(folder: Path, parts: dict[str, list[str]]) -> Path:
    folder.mkdir()
    for part, names in parts.items():
        save_file({name: np.ones((2, 3), np.float32) for name in names}, folder / part)
    table = {name: part for part, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    return index


def test_every_part_in_the_index_must_exist_with_its_tensors(tmp_path: Path) -> None:
    parts = {f"model-0000{n}-of-00002.safetensors": [f"{n}.a", f"{n}.b"] for n in (1, 2)}
    index = sharded(tmp_path / "m", parts)
    assert weight_shapes(tmp_path / "m") == dict.fromkeys(["1.a", "1.b", "2.a", "2.b"], (2, 3))
    second = tmp_path / "m" / "model-00002-of-00002.safetensors"
    save_file({"2.a": np.ones(1, np.float32)}, second)
    with pytest.raises(InputError, match=r"2\.b: the index lists it in model-00002"):
        weight_shapes(tmp_path / "m")
    second.unlink()
    with pytest.raises(InputError, match=f"{second.name}: the model folder lacks weights"):
        weight_shapes(tmp_path / "m")
    index.unlink()
    with pytest.raises(InputError, match="the index or a part is missing"):
        weight_shapes(tmp_path / "m")


def test_a_tokenizer_that_is_a_git_lfs_pointer_is_reported(tmp_path: Path) -> None:
    shutil.copytree(model_folder.TINY, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"tokenizer\.json: is a Git LFS pointer"):
        model_folder.check_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("sam2.1_hiera_large.pt", "facebook/sam2.1-hiera-large"),
        ("sam2_hiera_tiny.pt", "facebook/sam2-hiera-tiny"),
        ("mine.pth", "facebook/sam2.1-hiera-large"),
        ("deep/sam2.1_hiera_small.pt", "facebook/sam2.1-hiera-small"),
    ],
)
@pytest.mark.parametrize(("exists", "says"), [(True, "not a complete"), (False, "no such file")])
def test_a_missing_or_truncated_checkpoint_of_sam2_is_named_with_its_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub: str, exists: bool, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if exists:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"PK")
    with pytest.raises(InputError, match=says) as caught:
        segmenter.check_segmenter(name)
    assert caught.value.file == name and hub in caught.value.message
    if exists:  # the error about its folder names the file
        with pytest.raises(InputError, match=Path(name).name):
            segmenter.check_segmenter(str((tmp_path / name).parent))


def test_a_pickle_file_is_checked_without_torch(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    code = (
        "import sys\nfor name in ('vllm', 'transformers'): sys.modules[name] = None\n"
        "from pathlib import Path\nfrom rcot_rl.segmentation.segmenter import check_segmenter\n"
        "try: check_segmenter('sam2.1_hiera_large.pt')\n"
        "except Exception as error: print(error, 'torch' in sys.modules)\n"
    )
    output = run_python(code).strip()
    assert "no such file" in output and output.endswith("False")
