"""`rcot segment`: what it writes, and what it refuses before anything heavy starts."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from rcot_rl.errors import InputError
from rcot_rl.inference import segment as module
from rcot_rl.inference.policy import PolicyResponse
from rcot_rl.inference.query_trace import Trace
from rcot_rl.inference.segment import SegmentModels, published, strip_frames, write_query
from rcot_rl.inference.video import DecodedVideo, read_clip, write_video

BOX = [8.0, 8.0, 24.0, 24.0]


def trace() -> Trace:
    return Trace("the box", keyframe=1, boxes_source=[BOX], points_source=[[16.0, 16.0]])


def frames(count=3) -> DecodedVideo:
    rng = np.random.default_rng(0)
    still = cv2.GaussianBlur(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), (9, 9), 0)
    names = tuple(f"{i:05d}" for i in range(count))
    return DecodedVideo(names, np.stack([still] * count), Fraction(5))


def mask(t: int) -> np.ndarray:
    """A box of two objects that differs from frame to frame."""
    masks = np.zeros((2, 48, 64), bool)
    masks[0, 10:20, 10 + t : 20], masks[1, 10:20, 20:30] = True, True
    return masks


def masks(count=3):
    """In the order of a propagation: from frame 1 forward, then backward."""
    return ((t, mask(t)) for t in (*range(1, count), 0))


def segment(video, query, out, *, every=1, skip_corrupt=False, say=lambda line: None, **settings):
    """Run `segment` for one query, or a list of queries."""
    queries = [query] if isinstance(query, str) else query
    models = SegmentModels(**settings)
    return module.segment(
        video, queries, out, models, every=every, skip_corrupt=skip_corrupt, say=say
    )


@pytest.mark.parametrize("as_video", [True, False])
def test_masks_overlay_and_strip_are_written(tmp_path, as_video):
    out, done = tmp_path / "new" / "out", []
    with published(out) as folder:
        shares = write_query(
            folder,
            frames(),
            trace(),
            masks(),
            as_video=as_video,
            progress=lambda *n: done.append(n),
        )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert shares == pytest.approx([mask(t).any(axis=0).mean() for t in range(3)])
    assert [p.name for p in sorted((out / "masks").iterdir())] == [f"{i:05d}.png" for i in range(3)]
    for t in range(3):
        written = cv2.imread(str(out / "masks" / f"{t:05d}.png"), cv2.IMREAD_UNCHANGED)
        assert written.dtype == np.uint8 and set(np.unique(written)) == {0, 255}
        assert np.array_equal(written == 255, mask(t).any(axis=0))
    shown = read_clip(out / "overlay.mp4" if as_video else out / "overlay")
    assert shown.images.shape == (3, 384, 512, 3), "8 times the size, to be readable"
    small = np.stack([cv2.resize(i, (64, 48), interpolation=cv2.INTER_AREA) for i in shown.images])
    changed = np.abs(small.astype(int) - frames().images).sum(axis=-1)
    assert changed[:, 12:18, 14:28].mean() > 2 * changed[:, 26:38].mean()
    # the box, the border and the label are on the keyframe alone
    assert changed[1, 8, 9:23].mean() > 3 * changed[0, 8, 9:23].mean()
    assert changed[1, :40, 63].mean() > 3 * changed[2, :40, 63].mean()
    height, width = cv2.imread(str(out / "strip.png")).shape[:2]
    assert width > 3 * height
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"out"}


def test_a_failure_leaves_nothing(tmp_path):
    def broken():
        yield 1, mask(1)
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"), published(tmp_path / "out") as folder:
        write_query(folder, frames(), trace(), broken(), as_video=True)
    with pytest.raises(ValueError, match="2 of 3 frames"), published(tmp_path / "out") as folder:
        write_query(folder, frames(), trace(), [(0, mask(0)), (1, mask(1))], as_video=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), published(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    ("n_frames", "keyframe", "refused"),
    [(8, 1, [0, 7]), (8, 3, []), (2, 1, [0]), (100, 5, [9, 8, 7, 6]), (1, 0, [0])],
)
def test_the_strip_shows_the_keyframe_and_refused_frames_first(n_frames, keyframe, refused):
    chosen = strip_frames(n_frames, keyframe, refused)
    assert len(chosen) == min(4, n_frames) and chosen == sorted(set(chosen))
    assert {keyframe, *refused[:3]} <= set(chosen) <= set(range(n_frames))


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
    with published(out.resolve()) as folder:
        write_query(folder, frames(), trace(), masks(), as_video=True)
    assert sorted(p.name for p in real.iterdir()) == ["masks", "overlay.mp4", "strip.png"]
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


def test_skipped_frames_are_reported_before_models_load(tmp_path, no_vllm):
    folder = tmp_path / "a:b"
    folder.mkdir()
    for k in range(4):
        cv2.imwrite(str(folder / f"{k}.png"), np.zeros((28, 28, 3), np.uint8))
    (folder / "2.png").write_bytes(b"broken")
    announced = []
    with pytest.raises(InputError, match="--skip-corrupt"):
        segment(folder, "x", tmp_path / "out", say=announced.append)
    assert announced == []
    with pytest.raises(ImportError):  # vLLM, which is not here
        segment(folder, "x", tmp_path / "out", skip_corrupt=True, say=announced.append)
    assert announced[0] == f"{folder}: skipped 1 frames that cannot be decoded"


@pytest.mark.parametrize("name", ["a:b", "-x", "k[1]*?", "s3:x", "%05d", "a\nb", "~x"])
def test_results_are_written_under_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    named = DecodedVideo((f"{name}1", f"{name}2"), frames(2).images, Fraction(5))
    for as_video in (True, False):
        out = Path(name, str(as_video)).resolve()
        with published(out) as folder:
            write_query(folder, named, trace(), masks(2), as_video=as_video)
        assert {p.stem for p in (out / "masks").iterdir()} == set(named.names)
        shown = read_clip(out / "overlay.mp4" if as_video else out / "overlay")
        assert len(shown.names) == 2


def test_hidden_files_do_not_fill_a_folder(tmp_path, clip, no_vllm):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(ImportError):
        segment(clip, "x", tmp_path / "out")


class ScriptedPolicy:
    """Stands in for the engine: refuses black frames, proposes position 0 and then 2."""

    def __init__(self, *arguments, **settings) -> None:
        self.videos: list[np.ndarray] = []
        ScriptedPolicy.last = self

    def close(self) -> None:
        pass

    def count_tokens(self, text: str) -> int:
        return len(text)

    def most_frames(self, side: int, text_tokens: int) -> int:
        return ScriptedPolicy.most

    async def generate(self, request, sampling, started=None):
        if started is not None:
            started.set()
        return [PolicyResponse(f"<think>t</think><answer>{self.answer(request)}</answer>")]

    def answer(self, request) -> str:
        if request.video is not None:
            self.videos.append(request.video)
            return "2" if "not " in request.text else "0"
        if "A or B" in request.text:
            return "B" if request.image.mean() < 5 else "A"
        return "[]" if "dog" in request.text else '[{"bbox_2d": [28, 28, 56, 84]}]'


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(module, "PolicyEngine", ScriptedPolicy)
    ScriptedPolicy.most = 100


@pytest.fixture
def growing(tmp_path):
    """A folder of six frames; frame t has the colour 20 t."""
    (tmp_path / "growing").mkdir()
    for t in range(6):
        cv2.imwrite(str(tmp_path / "growing" / f"{t}.png"), np.full((56, 56, 3), 20 * t, np.uint8))
    return tmp_path / "growing"


def test_every_applies_to_reasoning_and_all_frames_get_masks(tmp_path, scripted, growing):
    lines = []
    (outcome,) = segment(
        growing, "the box", tmp_path / "out", sam2="flow", every=2, say=lines.append
    )
    for video in ScriptedPolicy.last.videos:
        assert video[:, 0, 0, 0].tolist() == [0, 40, 80]
    written = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert written["refused"] == [0] and outcome.trace.keyframe == written["keyframe"] == 4
    assert [s["frame"] for s in written["steps"] if s["task"] == "aks"] == [0, 4]
    assert written["shown_frames"] == [0, 2, 4]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 6
    steps = [line for line in lines if line.startswith(("keyframe", "judged", "grounded"))]
    assert steps == [
        "keyframe proposal: 0",
        "judged frame 0: refused",
        "keyframe proposal: 2",
        "judged frame 4: accepted",
        "grounded frame 4: 1 object",
    ]


def test_a_clip_that_the_model_cannot_hold_is_thinned_and_that_is_said(tmp_path, scripted, growing):
    ScriptedPolicy.most, lines = 2, []
    segment(growing, "the box", tmp_path / "out", sam2="flow", every=2, say=lines.append)
    written = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert len(written["shown_frames"]) == 2 and set(written["shown_frames"]) <= {0, 2, 4}
    assert "the policy saw 2 of 6 frames" in lines


def test_several_queries_have_numbered_folders_and_one_engine(tmp_path, scripted, growing):
    lines = []
    outcomes = segment(
        growing, ["the box", "the dog"], tmp_path / "out", sam2="flow", say=lines.append
    )
    assert [o.nothing_found for o in outcomes] == [None, "no_object"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "2"]
    for outcome, query in zip(outcomes, ("the box", "the dog"), strict=True):
        written = json.loads((outcome.out / "trace.json").read_text())
        assert written["query"] == query
        assert len(list((outcome.out / "masks").iterdir())) == 6
    empty = [cv2.imread(str(f), cv2.IMREAD_GRAYSCALE) for f in (tmp_path / "out/2/masks").iterdir()]
    assert not np.any(empty)
    assert sum(line.startswith("description") for line in lines) == 1
    assert {line.split(":")[0] for line in lines} >= {"query 1", "query 2"}
    assert sum(line.startswith("loading policy") for line in lines) == 1


def test_a_failed_start_restores_the_number_of_threads(tmp_path, clip, no_vllm, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    with pytest.raises(ImportError):
        segment(clip, "x", tmp_path / "out")
    assert "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() == threads


def test_characters_without_a_glyph_are_reported(tmp_path, scripted, growing):
    lines = []
    segment(growing, "the 左 box", tmp_path / "out", sam2="flow", say=lines.append)
    assert "the overlay's font lacks 左; they are drawn as □" in lines
