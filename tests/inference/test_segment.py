"""`rcot segment`: what it writes, and what it refuses before anything heavy starts."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference import segment as module
from rcot_rl.inference.segment import segment, write_result
from rcot_rl.inference.video import DecodedVideo, read_clip, write_video
from rcot_rl.recipe.inference_section import EngineSection

TRACE = {"keyframe": 1, "boxes_source": [[8, 8, 24, 24]], "points_source": [[16, 16]]}


def frames(count=3) -> DecodedVideo:
    rng = np.random.default_rng(0)
    still = cv2.GaussianBlur(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), (9, 9), 0)
    names = tuple(f"{i:05d}" for i in range(count))
    return DecodedVideo(names, np.stack([still] * count), Fraction(5))


def masks(count=3) -> np.ndarray:
    boxes = np.zeros((count, 48, 64), bool)
    boxes[:, 10:20, 10:30] = True
    return boxes


@pytest.mark.parametrize("as_video", [True, False])
def test_masks_overlay_and_trace_are_written(tmp_path, as_video):
    out = tmp_path / "new" / "out"
    write_result(out, frames(), masks(), TRACE, as_video=as_video)
    assert [p.name for p in sorted((out / "masks").iterdir())] == [f"{i:05d}.png" for i in range(3)]
    mask = cv2.imread(str(out / "masks" / "00002.png"), cv2.IMREAD_UNCHANGED)
    assert mask.dtype == np.uint8 and np.array_equal(mask == 255, masks()[2])
    assert np.array_equal(mask > 0, mask == 255)
    assert json.loads((out / "trace.json").read_text()) == TRACE
    shown = read_clip(out / "overlay.mp4" if as_video else out / "overlay")
    assert len(shown.names) == 3
    changed = np.abs(shown.images.astype(int) - frames().images).sum(axis=-1)
    assert changed[:, 12:18, 12:28].mean() > 5 * changed[:, 40:].mean()
    # the box is on the keyframe alone
    assert changed[1, 8, 8:24].mean() > 3 * changed[0, 8, 8:24].mean()
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"out"}


def test_a_failure_leaves_nothing(tmp_path):
    broken = dict(TRACE, boxes_source=[["a"]])
    with pytest.raises(ValueError, match="unpack"):
        write_result(tmp_path / "out", frames(), masks(), broken, as_video=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_result(tmp_path / "file" / "out", frames(), masks(), TRACE, as_video=True)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "v.mp4", frames().images, Fraction(5))
    return tmp_path / "v.mp4"


def test_bad_input_is_refused_before_vllm(tmp_path, clip, no_vllm, monkeypatch):
    monkeypatch.setattr(module, "check_model", lambda path: None)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("x")
    cases = [
        ({"query": "  "}, "the query is empty"),
        ({"out": taken}, "exists and is not empty"),
        ({"video": tmp_path / "none.mp4"}, "no such video"),
        ({"every": 0}, "at least 1"),
        ({"prompts": "klingon"}, "no such prompt set"),
        ({"image_canvas": 100}, "multiple of 28"),
    ]
    for changes, message in cases:
        arguments = {"video": clip, "query": "the cat", "out": tmp_path / "out"} | changes
        with pytest.raises(InputError, match=message):
            segment(**arguments)
    monkeypatch.undo()
    with pytest.raises(InputError, match="no such model folder"):
        segment(clip, "the cat", tmp_path / "out", model=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["link", "empty", "here"])
def test_an_existing_empty_folder_is_filled(tmp_path, monkeypatch, place):
    """A link, the working folder, or a mount, which cannot be replaced."""
    real = tmp_path / "real"
    real.mkdir()
    out = {"link": tmp_path / "link", "empty": real, "here": Path(".")}[place]
    if place == "link":
        out.symlink_to(real)
    monkeypatch.chdir(real)
    before = real.stat().st_ino
    write_result(out.resolve(), frames(), masks(), TRACE, as_video=True)
    assert sorted(p.name for p in real.iterdir()) == ["masks", "overlay.mp4", "trace.json"]
    assert real.stat().st_ino == before, "the folder itself stays"


def test_impossible_inputs_are_refused_before_models_load(tmp_path, clip, no_vllm, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        segment(clip, "x", tmp_path / "file" / "out")
    with pytest.raises(InputError, match="the query is not"):
        segment(clip, "caf\udce9", tmp_path / "out")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="no usable GPU"):
        segment(clip, "x", tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_skipped_frames_are_announced_before_models_load(tmp_path, no_vllm):
    folder = tmp_path / "a:b"
    folder.mkdir()
    for k in range(4):
        cv2.imwrite(str(folder / f"{k}.png"), np.zeros((28, 28, 3), np.uint8))
    (folder / "2.png").write_bytes(b"broken")
    announced = []
    with pytest.raises(InputError, match="--skip-corrupt"):
        segment(folder, "x", tmp_path / "out", announce=announced.append)
    assert announced == []
    with pytest.raises(ImportError):  # vLLM, which is not here
        segment(folder, "x", tmp_path / "out", skip_corrupt=True, announce=announced.append)
    assert announced == [f"{folder}: skipped 1 frames that cannot be decoded"]


@pytest.mark.parametrize("name", ["a:b", "-x", "k[1]*?", "s3:x", "%05d", "a\nb", "~x"])
def test_results_are_written_under_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    named = DecodedVideo((f"{name}1", f"{name}2"), frames(2).images, Fraction(5))
    for as_video in (True, False):
        out = Path(name, str(as_video)).resolve()
        write_result(out, named, masks(2), TRACE, as_video=as_video)
        assert {p.stem for p in (out / "masks").iterdir()} == set(named.names)
        shown = read_clip(out / "overlay.mp4" if as_video else out / "overlay")
        assert len(shown.names) == 2


def test_hidden_files_do_not_fill_a_folder(tmp_path, clip, no_vllm):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(ImportError):
        segment(clip, "x", tmp_path / "out")


def test_a_clip_too_long_for_the_model_is_refused_with_a_stride(tmp_path, no_vllm):
    folder = tmp_path / "clip"
    folder.mkdir()
    for k in range(40):
        cv2.imwrite(str(folder / f"{k}.png"), np.zeros((28, 28, 3), np.uint8))
    short = EngineSection(max_model_len=128)
    with pytest.raises(InputError, match=r"40 frames make \d+ tokens") as caught:
        segment(folder, "x", tmp_path / "out", engine=short)
    assert caught.value.key == "--every"
    stride = int(caught.value.message.split("take every ")[1].split("th")[0])
    with pytest.raises(ImportError):  # goes on to vLLM, which is not here
        segment(folder, "x", tmp_path / "out", engine=short, every=stride)
