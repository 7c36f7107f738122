"""Masks that predictions and rewards share: same bytes, no damage by kills, a bounded folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.corpora.corpus import Expression, Video
from rcot_rl.inference.predict import Target, write_expression
from rcot_rl.inference.query_trace import Trace
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation.clip_frames import ClipFrames
from rcot_rl.segmentation.mask_store import (
    ABANDONED_S,
    MaskStore,
    StoredMasks,
    decode_mask,
    encode_mask,
    mask_store,
    masks_key,
)
from rcot_rl.segmentation.sam2 import Sam2Segmenter
from rcot_rl.segmentation.segmenter import load_segmenter
from rcot_rl.segmentation.segmenter_actor import LocalSegmenter
from rcot_rl.tiny.sam2_model import build_tiny_sam2
from reward_fns.components.mask_iou import MaskRequest

VIDEO = Video("clip", tuple(f"{t:05d}" for t in range(4)), (Expression("0", "the disc", ()),))
BOX, POINT = [22.0, 46.0, 58.0, 82.0], [40.0, 64.0]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return frames of a red disc that moves to the right over a grey ground."""
    ys, xs = np.mgrid[:128, :128]
    paths = []
    for t in range(4):
        frame = np.full((128, 128, 3), 70, np.uint8)
        frame[(ys - 64) ** 2 + (xs - 40 - 8 * t) ** 2 < 18**2] = (40, 40, 220)
        paths.append(tmp_path / f"{t}.png")
        cv2.imwrite(str(paths[-1]), frame)
    return paths


def clip(files: list[Path]) -> ClipFrames:
    return ClipFrames(
        len(files),
        lambda t: cv2.imread(str(files[t]), cv2.IMREAD_COLOR_RGB),
        files.__getitem__,
    )


def traced(keyframe=1, boxes=(BOX,), points=(POINT,)) -> Trace:
    return Trace("q", keyframe=keyframe, boxes_source=list(boxes), points_source=list(points))


class Counted:
    """A segmenter that counts its passes."""

    def __init__(self, segmenter):
        self.segmenter, self.name, self.passes = segmenter, segmenter.name, 0
        self.identity = segmenter.identity

    def segment(self, *arguments):
        self.passes += 1
        return self.segmenter.segment(*arguments)


def predict(folder, trace, segmenter, files, store=None) -> dict[str, bytes]:
    """Predict one expression; return the content of its masks, and its trace as text."""
    write_expression(Target("0", None, str(folder)), VIDEO, trace, segmenter, clip(files), store)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("spec", ["tiny", "flow"])
def test_shared_masks_equal_those_of_a_pass_of_their_own_byte_by_byte(spec, files, tmp_path):
    segmenter, store = Counted(load_segmenter(spec)), MaskStore(tmp_path / "store", 1 << 20)
    other = traced(0, [BOX, [60.0, 50.0, 90.0, 80.0]], [POINT, [70.0, 60.0]])
    for name, trace in (("one", traced()), ("two", other), ("none", traced(boxes=[], points=[]))):
        alone = predict(tmp_path / f"{name}-alone", trace, segmenter, files)
        first = predict(tmp_path / f"{name}-first", trace, segmenter, files, store)
        before = segmenter.passes
        shared = predict(tmp_path / f"{name}-shared", trace, segmenter, files, store)
        assert segmenter.passes == before
        assert len(shared) == 5 and shared == first
        for file in (f"{frame}.png" for frame in VIDEO.frames):
            assert shared[file] == alone[file]
        texts = [json.loads(content["trace.json"]) for content in (alone, shared)]
        assert texts[1].pop("segment_seconds") > 0 and texts[0].pop("segment_seconds") > 0
        assert texts[0] == texts[1]


def test_a_shared_mask_keeps_the_seconds_of_the_pass_that_made_it(files, tmp_path):
    class Slow(Counted):
        def segment(self, *arguments):
            time.sleep(0.2)
            return super().segment(*arguments)

    segmenter, store = Slow(load_segmenter("flow")), MaskStore(tmp_path / "store", 1 << 20)
    contents = [predict(tmp_path / n, traced(), segmenter, files, store) for n in ("a", "b")]
    seconds = [json.loads(content["trace.json"])["segment_seconds"] for content in contents]
    assert seconds[0] == seconds[1] >= 0.2


def test_the_key_differs_with_all_that_masks_depend_on(files):
    flow, frames = load_segmenter("flow"), clip(files)
    box, point = np.array([BOX]), np.array([POINT])

    def key(segmenter=flow, frames=frames, t=1, boxes=box, points=point):
        return masks_key(segmenter, frames, t, boxes, points)

    def tiny(seed, **settings):
        return Sam2Segmenter(build_tiny_sam2(64, seed=seed), "s", SegmenterSection(**settings))

    keys = [
        key(),
        key(t=2),
        key(boxes=box + 0.001),
        key(points=point + 0.001),
        key(boxes=np.tile(box, (2, 1)), points=np.tile(point, (2, 1))),
        key(boxes=np.zeros((0, 4)), points=np.zeros((0, 2))),
        key(frames=clip(files[::-1])),
        key(frames=clip(files[:3])),
        key(tiny(1)),
        key(tiny(2)),
        key(tiny(1, frames_per_batch=2)),
    ]
    assert None not in keys and len(set(keys)) == len(keys)
    assert key(tiny(1, feature_bytes=7)) == key(tiny(1)) and key() == key()
    cv2.imwrite(str(files[3]), np.zeros((128, 128, 3), np.uint8))
    assert key(frames=clip(files)) != key()
    files[3].unlink()
    assert key(frames=clip(files)) is None  # the segmenter reports the frame
    assert key(frames=np.zeros((4, 8, 8, 3), np.uint8)) is None


def test_rewards_share_masks_with_predictions(files, tmp_path):
    segmenter, store = Counted(load_segmenter("tiny")), MaskStore(tmp_path / "store", 1 << 20)
    # on a canvas of the frames' size, the request's prompts are those of the trace
    request = MaskRequest([str(f) for f in files], 1, [tuple(BOX)], [tuple(POINT)], 128)
    alone = LocalSegmenter(segmenter).union_masks([request])[0]
    assert alone.any()
    predicted = predict(tmp_path / "p", traced(), segmenter, files, store)
    passes = segmenter.passes
    masks = LocalSegmenter(segmenter, store).union_masks([request])[0]
    assert segmenter.passes == passes
    assert masks.dtype == bool and np.array_equal(masks, alone)
    assert np.array_equal(masks[2], decode_mask(predicted["00002.png"]))
    request.boxes[0] = (10, 10, 50, 50)
    first, again = (LocalSegmenter(segmenter, store).union_masks([request])[0] for _ in range(2))
    assert segmenter.passes == passes + 1 and np.array_equal(first, again)


def entry(number: int, size=2000) -> StoredMasks:
    content = np.random.default_rng(number).bytes(size)
    return StoredMasks((content, b"", content[:7]), (3, 5), number / 7)


def test_an_entry_is_read_as_it_was_written_by_any_process(tmp_path):
    MaskStore(tmp_path, 1 << 20).put("ab", entry(3))
    assert MaskStore(tmp_path, 1 << 20).get("ab") == entry(3)
    assert MaskStore(tmp_path / "absent", 1).get("ab") is None
    mask = np.arange(40).reshape(5, 8) % 3 == 0
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:9], lambda b: b"", "flip"])
def test_a_damaged_entry_is_removed_and_not_used(damage, tmp_path, caplog):
    store = MaskStore(tmp_path, 1 << 20)
    store.put("ab", entry(3))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    file.write_bytes(flipped if damage == "flip" else damage(data))
    assert store.get("ab") is None
    assert "damaged" in caplog.text and not list(tmp_path.iterdir())
    store.put("ab", entry(4))
    assert store.get("ab") == entry(4)


def _write_for_ever(folder: Path, started) -> None:
    store = MaskStore(folder, 100_000)
    started.set()
    number = os.getpid()
    while True:
        number = (number + 1) % 97
        store.put(f"{number:04x}", entry(number))
        found = store.get(f"{number:04x}")
        assert found is None or found == entry(number)


def test_killed_writers_leave_whole_entries_and_a_bounded_folder(tmp_path):
    processes = multiprocessing.get_context("fork")
    for _ in range(4):
        events = [processes.Event() for _ in range(3)]
        writers = [
            processes.Process(target=_write_for_ever, args=(tmp_path, event)) for event in events
        ]
        for writer in writers:
            writer.start()
        for event in events:
            assert event.wait(60)
        time.sleep(0.2)
        assert all(writer.is_alive() for writer in writers)
        for writer in writers:
            writer.kill()
        for writer in writers:
            writer.join()
    store = MaskStore(tmp_path, 100_000)
    found = {number: store.get(f"{number:04x}") for number in range(97)}
    assert any(found.values())
    assert all(masks in (None, entry(number)) for number, masks in found.items())
    # each process looks after a twentieth of the limit
    assert sum(file.stat().st_size for file in tmp_path.glob("*.masks")) <= 100_000 * 1.2
    left = [file for file in tmp_path.iterdir() if file.suffix != ".masks"]
    for file in left:
        os.utime(file, (0, time.time() - ABANDONED_S - 1))
    store.put("ffff", entry(1))
    assert all(file.suffix == ".masks" for file in tmp_path.iterdir())


def test_the_entries_that_were_not_used_for_longest_are_removed(tmp_path):
    store = MaskStore(tmp_path, 10 * 2500)
    for number in range(9):
        store.put(f"{number}", entry(number))
        os.utime(tmp_path / f"{number}.masks", (number, number))
    assert store.get("0") is not None  # used: it is the newest now
    for number in range(9, 14):
        store.put(f"{number}", entry(number))
    kept = {int(file.stem) for file in tmp_path.iterdir()}
    assert kept >= {0, 11, 12, 13} and not kept & {1, 2, 3}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 25_000


def test_the_limit_comes_from_the_recipe(tmp_path):
    assert mask_store(tmp_path, SegmenterSection(mask_bytes=0)) is None
    assert mask_store(None, SegmenterSection()) is None
    store = mask_store(tmp_path, SegmenterSection(mask_bytes=5))
    assert store is not None and store.most_bytes == 5
    store.put("ab", entry(3))
    assert not list(tmp_path.iterdir())
