"""Segmenters: shapes, order independence, the flow propagator on known motion, refusals."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation import sam2
from rcot_rl.segmentation.clip_frames import KEPT_FRAMES, ClipFrames
from rcot_rl.segmentation.flow_propagator import FlowSegmenter, cut_box
from rcot_rl.segmentation.sam2 import Sam2Segmenter, preprocess
from rcot_rl.segmentation.segmenter import TINY, collect, load_segmenter, union
from rcot_rl.tiny.sam2_model import build_tiny_sam2


def moving_square(length=9, height=96, width=128, side=28, step=4, gone=()):
    """Return frames [T, H, W, 3] of an orange square on a textured ground, and masks [T, H, W]."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(20, 130, (height // 8, width // 8, 3))
    ground = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    paint = rng.integers(-15, 15, (side, side, 3)) + np.array([230, 120, 20])
    frames, masks = [], []
    for t in range(length):
        frame, mask = ground.copy(), np.zeros((height, width), bool)
        x, y = 20 + step * t, 30 + t
        if t not in gone:
            frame[y : y + side, x : x + side] = np.clip(paint, 0, 255)
            mask[y : y + side, x : x + side] = True
        frames.append(frame)
        masks.append(mask)
    return np.stack(frames), np.stack(masks)


def prompt(mask):
    ys, xs = np.nonzero(mask)
    box = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], float)
    return box, np.array([[xs.mean(), ys.mean()]])


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.fixture(scope="module")
def untrained():
    """Return random weights whose masks are neither empty nor full."""
    model = build_tiny_sam2(64, seed=5)
    return Sam2Segmenter(model, "untrained")


def segmenters():
    return ["tiny", "flow"]


@pytest.mark.parametrize("spec", segmenters())
def test_no_objects_give_an_empty_array(spec):
    frames, _ = moving_square(3)
    masks = collect(load_segmenter(spec).segment(frames, 1, np.zeros((0, 4)), np.zeros((0, 2))))
    assert masks.shape == (0, 3, 96, 128)
    assert masks.dtype == bool


@pytest.mark.parametrize("spec", segmenters())
@pytest.mark.parametrize("key", [0, 1, 2])
def test_shape_and_dtype_for_two_objects(spec, key):
    frames, truth = moving_square(3)
    box, point = prompt(truth[key])
    masks = collect(
        load_segmenter(spec).segment(frames, key, np.repeat(box, 2, 0), np.repeat(point, 2, 0))
    )
    assert masks.shape == (2, 3, 96, 128)
    assert masks.dtype == bool
    assert np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize("spec", segmenters())
def test_a_clip_of_one_frame_is_segmented(spec):
    frames, truth = moving_square(1)
    assert collect(load_segmenter(spec).segment(frames, 0, *prompt(truth[0]))).shape == (
        1,
        1,
        96,
        128,
    )


@pytest.mark.parametrize("spec", segmenters())
def test_boxes_alone_are_prompt_enough(spec):
    frames, truth = moving_square(3)
    box, _ = prompt(truth[1])
    masks = collect(load_segmenter(spec).segment(frames, 1, np.repeat(box, 2, 0), None))
    assert masks.shape == (2, 3, 96, 128)
    assert iou(masks[0, 1], truth[1]) > 0.6


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_union_holds_exactly_the_pixels_of_some_object(n):
    masks = np.random.default_rng(n).random((n, 4, 5)) < 0.4
    merged = union(masks)
    assert merged.shape == (4, 5)
    assert merged.dtype == bool
    for y, x in np.ndindex(merged.shape):
        assert merged[y, x] == (masks[:, y, x].sum() > 0)


class CountedFrames:
    """A clip that records which of its frames are alive, and fails at one index."""

    def __init__(self, frames, broken=None):
        self.frames, self.broken = frames, broken
        self.read, self.alive, self.most = [], weakref.WeakSet(), 0

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, t):
        if t == self.broken:
            raise InputError("not a readable image", file=f"{t}.jpg")
        frame = TrackedArray.of(self.frames[t])
        self.read.append(t)
        self.alive.add(frame)
        self.most = max(self.most, len(self.alive))
        return frame


class TrackedArray(np.ndarray):
    """An array that can be in a WeakSet."""

    __hash__ = object.__hash__

    @classmethod
    def of(cls, array):
        return array.copy().view(cls)


@pytest.mark.parametrize("spec", segmenters())
@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("key", [0, 12, 24])
def test_masks_are_streamed_in_the_order_in_which_they_become_known(spec, n, key):
    frames, truth = moving_square(25, step=2)
    box, point = prompt(truth[key])
    clip = CountedFrames(frames)
    order = [*range(key, 25), *range(key - 1, -1, -1)]
    stream = load_segmenter(spec).segment(clip, key, np.repeat(box, n, 0), np.repeat(point, n, 0))
    for expected in order:
        t, masks = next(stream)
        assert t == expected
        assert masks.shape == (n, 96, 128)
        assert masks.dtype == bool
        # nothing is read ahead of its masks
        assert set(clip.read) <= {key, *order[: order.index(t) + 1]}
    assert next(stream, None) is None
    assert clip.most <= 4


@pytest.mark.parametrize("spec", segmenters())
def test_an_unreadable_frame_ends_the_stream_after_the_masks_before_it(spec):
    frames, truth = moving_square(6)
    known = []
    with pytest.raises(InputError, match=r"4\.jpg"):
        for t, _ in load_segmenter(spec).segment(CountedFrames(frames, 4), 2, *prompt(truth[2])):
            known.append(t)
    assert known == [2, 3]


def test_clip_frames_read_on_request_and_keep_a_few():
    reads = []

    def read(t):
        reads.append(t)
        return np.full((4, 6, 3), t, np.uint8)

    clip = ClipFrames(30, read, str)
    assert len(clip) == 30
    assert not reads
    for t in (*range(30), 29, 30 - KEPT_FRAMES):
        assert clip[t].max() == t
    assert reads == list(range(30))
    assert clip.digest(3) != clip.digest(4)
    assert clip.digest(3) == clip.digest(3)
    assert reads[30:] == [3, 4]


def test_a_frame_of_another_size_is_named():
    clip = ClipFrames(3, lambda t: np.zeros((4, 6 + t, 3), np.uint8), "frame{}.png".format)
    assert clip[1].shape == (4, 7, 3)
    with pytest.raises(InputError, match=r"frame2\.png: has 8 x 4 pixels"):
        clip[2]


def test_segmenter_names_identify_their_weights():
    assert load_segmenter("tiny").name == "sam2:tiny-sam2"
    assert load_segmenter(str(TINY)).name == "sam2:tiny-sam2"
    assert load_segmenter("flow").name == "flow (GrabCut + DIS)"


@pytest.mark.parametrize("key", [0, 4, 8])
def test_flow_follows_a_square_both_ways(key):
    frames, truth = moving_square()
    masks = collect(FlowSegmenter().segment(frames, key, *prompt(truth[key])))[0]
    assert min(iou(f, t) for f, t in zip(masks, truth, strict=True)) > 0.8


def test_flow_masks_are_empty_while_the_object_is_absent():
    frames, truth = moving_square(step=1, gone=(5, 6))
    masks = collect(FlowSegmenter().segment(frames, 2, *prompt(truth[2])))[0]
    assert not masks[5:7].any()
    assert iou(masks[7], truth[7]) > 0.7


def test_flow_mirrors_with_its_input():
    frames, truth = moving_square(5)
    box, point = prompt(truth[2])
    width = frames.shape[2]
    flipped_box = np.array([[width - box[0, 2], box[0, 1], width - box[0, 0], box[0, 3]]])
    flipped_point = np.array([[width - 1 - point[0, 0], point[0, 1]]])
    straight = collect(FlowSegmenter().segment(frames, 2, box, point))[0]
    mirrored = collect(
        FlowSegmenter().segment(
            np.ascontiguousarray(frames[:, :, ::-1]), 2, flipped_box, flipped_point
        )
    )[0]
    assert iou(straight, mirrored[:, :, ::-1]) > 0.95


@pytest.mark.parametrize(
    "box", [[200, 200, 300, 300], [-50, -50, -1, -1], [10, 10, 10, 40], [np.nan, 0, 5, 5]]
)
def test_a_box_without_pixels_gives_an_empty_cut(box):
    frames, _ = moving_square(1)
    cut = cut_box(frames[0], np.array(box, float), np.array([5.0, 5.0]))
    assert cut.shape == frames.shape[1:3]
    if not np.isnan(box).any():
        assert not cut.any()


def test_the_point_selects_between_objects_in_the_box():
    """Two squares of different colours share the box; the one under the point is kept."""
    image = np.full((80, 120, 3), 90, np.uint8)
    image += np.random.default_rng(0).integers(0, 10, image.shape, dtype=np.uint8)
    image[20:60, 20:55] = (200, 30, 30)
    cut = cut_box(image, np.array([15, 15, 60, 65]), np.array([37.0, 40.0]))
    assert cut[40, 37]
    assert cut[25:55, 25:50].mean() > 0.95


def test_sam2_passes_do_not_depend_on_their_order(untrained):
    frames, truth = moving_square(7)
    box, point = prompt(truth[3])
    forward_first = collect(untrained._segment(frames, 3, box, point, (False, True)))
    backward_first = collect(untrained._segment(frames, 3, box, point, (True, False)))
    assert 0 < forward_first.mean() < 1
    assert np.array_equal(forward_first, backward_first)


def test_sam2_backward_is_forward_on_the_reversed_clip(untrained):
    frames, truth = moving_square(6)
    box, point = prompt(truth[5])
    backward = collect(untrained.segment(frames, 5, box, point))
    forward = collect(untrained.segment(np.ascontiguousarray(frames[::-1]), 0, box, point))
    assert np.array_equal(backward, forward[:, ::-1])


def test_sam2_keeps_no_full_size_logits(untrained, monkeypatch):
    kept = []
    session_of = untrained._session

    def spy(frames, key):
        kept.append(session_of(frames, key))
        return kept[-1]

    monkeypatch.setattr(untrained, "_session", spy)
    frames, truth = moving_square(4)
    collect(untrained.segment(frames, 0, *prompt(truth[0])))
    stored = kept[0].output_dict_per_obj[0]
    assert stored["cond_frame_outputs"]
    assert not stored["non_cond_frame_outputs"]
    assert all("high_res_masks" not in v for v in stored["cond_frame_outputs"].values())


@pytest.mark.parametrize("times", [(1, 2), (3, 1), (2, 2)])
def test_sam2_answers_in_the_sources_own_coordinates(times):
    """A clip of the same content and more pixels, also of another aspect, has the same masks."""
    segmenter = load_segmenter("tiny")
    frames, truth = moving_square(3, height=128)
    tall, wide = times
    larger = frames.repeat(tall, axis=1).repeat(wide, axis=2)
    box, point = prompt(truth[0])
    small = collect(segmenter.segment(frames, 0, box, point))
    large = collect(
        segmenter.segment(larger, 0, box * [wide, tall, wide, tall], point * [wide, tall])
    )
    assert small.any()
    assert iou(large, small.repeat(tall, axis=2).repeat(wide, axis=3)) > 0.9


def test_sam2_memory_is_bounded_and_bounding_changes_nothing(untrained, monkeypatch):
    frames, truth = moving_square(14, side=20, step=4)
    box, point = prompt(truth[7])
    most = []
    forget = sam2._forget_beyond

    def spy(session, frame, reach):
        forget(session, frame, reach)
        most.append(len(session.output_dict_per_obj[0]["non_cond_frame_outputs"]))

    monkeypatch.setattr(sam2, "_forget_beyond", spy)
    bounded = collect(untrained.segment(frames, 7, box, point))
    assert max(most) == untrained._reach() == 4
    monkeypatch.setattr(sam2, "_forget_beyond", lambda *_: None)
    assert 0 < bounded.mean() < 1
    assert np.array_equal(bounded, collect(untrained.segment(frames, 7, box, point)))


def encoded_frames(segmenter):
    """Return a list that gets the size of each batch that the image encoder sees from now on."""
    sizes = []
    segmenter.model.vision_encoder.register_forward_hook(
        lambda _, args, kwargs, out: sizes.append(len(args[0])), with_kwargs=True
    )
    return sizes


def test_queries_about_one_video_encode_each_frame_once():
    frames, truth = moving_square(7)
    shared, alone = (load_segmenter("tiny") for _ in range(2))
    count = encoded_frames(shared)
    for key in (0, 3, 6):
        alone.features = sam2.FeatureStore(1 << 30)
        expected = collect(alone.segment(frames, key, *prompt(truth[key])))
        # another array with the same content, as when the video is read again
        assert np.array_equal(
            collect(shared.segment(frames.copy(), key, *prompt(truth[key]))), expected
        )
    assert len(count) == len(frames)


def test_changed_frames_are_encoded_again():
    frames, truth = moving_square(4)
    segmenter = load_segmenter("tiny")
    collect(segmenter.segment(frames, 1, *prompt(truth[1])))
    count = encoded_frames(segmenter)
    frames[2] = 255 - frames[2]
    collect(segmenter.segment(frames, 1, *prompt(truth[1])))
    assert len(count) == 1


def test_features_stay_within_their_limit_and_masks_do_not_depend_on_it():
    frames, truth = moving_square(9)
    segmenter = load_segmenter("tiny")
    expected = collect(segmenter.segment(frames, 4, *prompt(truth[4])))
    one = segmenter.features.bytes // len(frames)
    for room in (0, one, 3 * one):
        segmenter.features = sam2.FeatureStore(room)
        assert np.array_equal(collect(segmenter.segment(frames, 4, *prompt(truth[4]))), expected)
        assert segmenter.features.bytes <= max(room, one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sam2_in_half_precision_agrees_with_float32(dtype):
    frames, truth = moving_square(4)
    box, point = prompt(truth[1])
    half = load_segmenter("tiny", settings=SegmenterSection(dtype=dtype))
    assert half.model.dtype == getattr(torch, dtype)
    assert half.name == f"sam2:tiny-sam2 ({dtype})"
    full = collect(load_segmenter("tiny").segment(frames, 1, box, point))
    assert iou(collect(half.segment(frames, 1, box, point)), full) > 0.9


def test_on_a_cpu_the_default_dtype_is_float32():
    assert load_segmenter("tiny").model.dtype == torch.float32


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 9), (4, [1, 4, 4]), (64, [1, 8])])
def test_upcoming_frames_are_encoded_together(size, sizes):
    """The first batch is one frame, because the size of a frame's features is unknown."""
    frames, truth = moving_square(9)
    expected = collect(load_segmenter("tiny").segment(frames, 4, *prompt(truth[4])))
    batched = load_segmenter("tiny", settings=SegmenterSection(frames_per_batch=size))
    seen = encoded_frames(batched)
    assert iou(collect(batched.segment(frames, 4, *prompt(truth[4]))), expected) > 0.999
    assert seen == sizes


def test_batched_features_equal_those_of_single_frames():
    frames, _ = moving_square(3)
    segmenter = load_segmenter("tiny")
    together = segmenter.encode(frames)
    for t, features in enumerate(together):
        alone = segmenter.encode(frames[t : t + 1])[0]
        for a, b in zip(features["vision_feats"], alone["vision_feats"], strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=1e-4)
            assert a.untyped_storage().nbytes() == a.nbytes, "keeps the whole batch alive"


def test_a_batch_is_never_larger_than_the_features_that_can_be_kept():
    frames, truth = moving_square(9)
    one = sum(t.nbytes for t in load_segmenter("tiny").encode(frames[:1])[0]["vision_feats"])
    settings = SegmenterSection(frames_per_batch=8, feature_bytes=2 * one)
    segmenter = load_segmenter("tiny", settings=settings)
    seen = encoded_frames(segmenter)
    collect(segmenter.segment(frames, 0, *prompt(truth[0])))
    assert max(seen) == 2
    assert sum(seen) == 9
    assert segmenter.features.bytes == 2 * one


def test_equal_frames_are_encoded_and_counted_once():
    frames = np.repeat(moving_square(1)[0], 6, axis=0)
    segmenter = load_segmenter("tiny", settings=SegmenterSection(frames_per_batch=4))
    seen = encoded_frames(segmenter)
    collect(segmenter.segment(frames, 2, np.array([[20.0, 30.0, 48.0, 58.0]]), None))
    assert seen == [1]
    feats = segmenter.encode(frames[:1])[0]["vision_feats"]
    assert segmenter.features.bytes == sum(t.nbytes for t in feats)


def test_a_frame_that_is_unreadable_ahead_of_its_turn_costs_no_masks_before_it():
    frames, truth = moving_square(6)
    segmenter = load_segmenter("tiny", settings=SegmenterSection(frames_per_batch=4))
    known = []
    with pytest.raises(InputError, match=r"4\.jpg"):
        for t, _ in segmenter.segment(CountedFrames(frames, 4), 1, *prompt(truth[1])):
            known.append(t)
    assert known == [1, 2, 3]


def test_all_frames_share_one_position_encoding():
    """transformers makes one per frame, five times as large as the features."""
    frames, _ = moving_square(3)
    segmenter = load_segmenter("tiny")
    first, *rest = (f["vision_pos_embeds"] for f in segmenter.encode(frames))
    assert len(first) == 1
    assert all(other[0] is first[0] for other in rest)


@pytest.mark.slow
def test_compiled_sam2_gives_the_same_masks_on_a_cpu():
    frames, truth = moving_square(5)
    compiled = load_segmenter("tiny", settings=SegmenterSection(compile=True))
    expected = collect(load_segmenter("tiny").segment(frames, 2, *prompt(truth[2])))
    assert iou(collect(compiled.segment(frames, 2, *prompt(truth[2]))), expected) > 0.999


@pytest.mark.slow
def test_compilation_without_a_compiler_is_refused(tmp_path, run_python):
    output = run_python(
        "from rcot_rl.errors import InputError\n"
        "from rcot_rl.recipe.inference_section import SegmenterSection\n"
        "from rcot_rl.segmentation.segmenter import load_segmenter\n"
        "try: load_segmenter('tiny', settings=SegmenterSection(compile=True))\n"
        "except InputError as error: print(error.faults)\n",
        CXX=str(tmp_path / "no-compiler"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert "segmenter.compile: torch.compile failed" in output


def test_preprocess_normalises_as_imagenet():
    frames = np.zeros((2, 10, 20, 3), np.uint8)
    frames[..., 0] = 255
    pixels = preprocess(frames, 8)
    assert pixels.shape == (2, 3, 8, 8)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert torch.allclose(pixels.mean((0, 2, 3)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(72, 128), (40, 30), (64, 64), (300, 20)])
def test_preprocess_agrees_with_sam2s_own_processor(size):
    """Within half a grey level, by which the processor rounds the resized image, and its own
    rounding of weights on a CPU."""
    from transformers import Sam2VideoVideoProcessor

    frames = np.random.default_rng(1).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    processor = Sam2VideoVideoProcessor(size={"height": 64, "width": 64})
    theirs = processor(torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt")
    levels = torch.tensor(sam2.STD).view(3, 1, 1) * 255
    difference = (preprocess(frames, 64) - theirs["pixel_values_videos"][0]).abs() * levels
    assert difference.max() < 1.2
    assert difference.mean() < 0.35
    if size == (64, 64):
        assert difference.max() < 1e-4


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_segmenter(str(tmp_path / "nowhere"))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    weights = load_file(TINY / "model.safetensors")
    weights.pop("no_object_pointer")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    with pytest.raises(InputError, match="no_object_pointer"):
        load_segmenter(str(tmp_path))


def test_folders_that_are_not_sam2_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config"):
        load_segmenter(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(InputError, match="JSON"):
        load_segmenter(str(tmp_path))
    config.write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(InputError, match="qwen2_5_vl"):
        load_segmenter(str(tmp_path))
    config.write_text((TINY / "config.json").read_text())
    with pytest.raises(InputError, match="safetensors"):
        load_segmenter(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="unreadable weights"):
        load_segmenter(str(tmp_path))
