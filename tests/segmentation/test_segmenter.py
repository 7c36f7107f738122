"""Segmenters: shapes, order independence, the flow propagator on known motion, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rcot_rl.errors import InputError
from rcot_rl.segmentation import sam2
from rcot_rl.segmentation.flow_propagator import FlowSegmenter, cut_box
from rcot_rl.segmentation.sam2 import Sam2Segmenter, preprocess
from rcot_rl.segmentation.segmenter import TINY, load_segmenter, union
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
    masks = load_segmenter(spec).segment(frames, 1, np.zeros((0, 4)), np.zeros((0, 2)))
    assert masks.shape == (0, 3, 96, 128)
    assert masks.dtype == bool


@pytest.mark.parametrize("spec", segmenters())
@pytest.mark.parametrize("key", [0, 1, 2])
def test_shape_and_dtype_for_two_objects(spec, key):
    frames, truth = moving_square(3)
    box, point = prompt(truth[key])
    masks = load_segmenter(spec).segment(frames, key, np.repeat(box, 2, 0), np.repeat(point, 2, 0))
    assert masks.shape == (2, 3, 96, 128)
    assert masks.dtype == bool
    assert np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize("spec", segmenters())
def test_a_clip_of_one_frame_is_segmented(spec):
    frames, truth = moving_square(1)
    assert load_segmenter(spec).segment(frames, 0, *prompt(truth[0])).shape == (1, 1, 96, 128)


@pytest.mark.parametrize("spec", segmenters())
def test_boxes_alone_are_prompt_enough(spec):
    frames, truth = moving_square(3)
    box, _ = prompt(truth[1])
    masks = load_segmenter(spec).segment(frames, 1, np.repeat(box, 2, 0), None)
    assert masks.shape == (2, 3, 96, 128)
    assert iou(masks[0, 1], truth[1]) > 0.6


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_union_holds_exactly_the_pixels_of_some_object(n):
    masks = np.random.default_rng(n).random((n, 2, 4, 5)) < 0.4
    merged = union(masks)
    assert merged.shape == (2, 4, 5)
    assert merged.dtype == bool
    for t, y, x in np.ndindex(merged.shape):
        assert merged[t, y, x] == (masks[:, t, y, x].sum() > 0)


def test_segmenter_names_identify_their_weights():
    assert load_segmenter("tiny").name == "sam2:tiny-sam2"
    assert load_segmenter(str(TINY)).name == "sam2:tiny-sam2"
    assert load_segmenter("flow").name == "flow (GrabCut + DIS)"


@pytest.mark.parametrize("key", [0, 4, 8])
def test_flow_follows_a_square_both_ways(key):
    frames, truth = moving_square()
    masks = FlowSegmenter().segment(frames, key, *prompt(truth[key]))[0]
    assert min(iou(f, t) for f, t in zip(masks, truth, strict=True)) > 0.8


def test_flow_masks_are_empty_while_the_object_is_absent():
    frames, truth = moving_square(step=1, gone=(5, 6))
    masks = FlowSegmenter().segment(frames, 2, *prompt(truth[2]))[0]
    assert not masks[5:7].any()
    assert iou(masks[7], truth[7]) > 0.7


def test_flow_mirrors_with_its_input():
    frames, truth = moving_square(5)
    box, point = prompt(truth[2])
    width = frames.shape[2]
    flipped_box = np.array([[width - box[0, 2], box[0, 1], width - box[0, 0], box[0, 3]]])
    flipped_point = np.array([[width - 1 - point[0, 0], point[0, 1]]])
    straight = FlowSegmenter().segment(frames, 2, box, point)[0]
    mirrored = FlowSegmenter().segment(
        np.ascontiguousarray(frames[:, :, ::-1]), 2, flipped_box, flipped_point
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
    forward_first = untrained._segment(frames, 3, box, point, (False, True))
    backward_first = untrained._segment(frames, 3, box, point, (True, False))
    assert 0 < forward_first.mean() < 1
    assert np.array_equal(forward_first, backward_first)


def test_sam2_backward_is_forward_on_the_reversed_clip(untrained):
    frames, truth = moving_square(6)
    box, point = prompt(truth[5])
    backward = untrained.segment(frames, 5, box, point)
    forward = untrained.segment(np.ascontiguousarray(frames[::-1]), 0, box, point)
    assert np.array_equal(backward, forward[:, ::-1])


def test_sam2_keeps_no_full_size_logits(untrained, monkeypatch):
    kept = []
    session_of = untrained._session

    def spy(frames):
        kept.append(session_of(frames))
        return kept[-1]

    monkeypatch.setattr(untrained, "_session", spy)
    frames, truth = moving_square(4)
    untrained.segment(frames, 0, *prompt(truth[0]))
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
    small = segmenter.segment(frames, 0, box, point)
    large = segmenter.segment(larger, 0, box * [wide, tall, wide, tall], point * [wide, tall])
    assert small.any()
    assert iou(large, small.repeat(tall, axis=2).repeat(wide, axis=3)) > 0.95


def test_sam2_memory_is_bounded_and_bounding_changes_nothing(untrained, monkeypatch):
    frames, truth = moving_square(14, side=20, step=4)
    box, point = prompt(truth[7])
    most = []
    forget = sam2._forget_beyond

    def spy(session, frame, reach):
        forget(session, frame, reach)
        most.append(len(session.output_dict_per_obj[0]["non_cond_frame_outputs"]))

    monkeypatch.setattr(sam2, "_forget_beyond", spy)
    bounded = untrained.segment(frames, 7, box, point)
    assert max(most) == untrained._reach() == 4
    monkeypatch.setattr(sam2, "_forget_beyond", lambda *_: None)
    assert 0 < bounded.mean() < 1
    assert np.array_equal(bounded, untrained.segment(frames, 7, box, point))


def encoded_frames(segmenter):
    """Count the frames that the image encoder sees from now on."""
    count = []
    segmenter.model.vision_encoder.register_forward_hook(
        lambda _, args, kwargs, out: count.append(1), with_kwargs=True
    )
    return count


def test_queries_about_one_video_encode_each_frame_once():
    frames, truth = moving_square(7)
    shared, alone = (load_segmenter("tiny") for _ in range(2))
    count = encoded_frames(shared)
    for key in (0, 3, 6):
        alone.features = sam2.FeatureStore()
        expected = alone.segment(frames, key, *prompt(truth[key]))
        # another array with the same content, as when the video is read again
        assert np.array_equal(shared.segment(frames.copy(), key, *prompt(truth[key])), expected)
    assert len(count) == len(frames)


def test_changed_frames_are_encoded_again():
    frames, truth = moving_square(4)
    segmenter = load_segmenter("tiny")
    segmenter.segment(frames, 1, *prompt(truth[1]))
    count = encoded_frames(segmenter)
    frames[2] = 255 - frames[2]
    segmenter.segment(frames, 1, *prompt(truth[1]))
    assert len(count) == 1


def test_features_stay_within_their_limit_and_masks_do_not_depend_on_it():
    frames, truth = moving_square(9)
    segmenter = load_segmenter("tiny")
    expected = segmenter.segment(frames, 4, *prompt(truth[4]))
    one = segmenter.features.bytes // len(frames)
    for room in (0, one, 3 * one):
        segmenter.features = sam2.FeatureStore(room)
        assert np.array_equal(segmenter.segment(frames, 4, *prompt(truth[4])), expected)
        assert segmenter.features.bytes <= max(room, one)


def test_sam2_in_bfloat16_agrees_with_float32():
    frames, truth = moving_square(4)
    box, point = prompt(truth[1])
    half = load_segmenter("tiny", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    full = load_segmenter("tiny").segment(frames, 1, box, point)
    assert iou(half.segment(frames, 1, box, point), full) > 0.9


def test_another_dtype_is_refused():
    with pytest.raises(InputError, match="bfloat16"):
        load_segmenter("tiny", dtype="int8")


def test_the_session_gets_each_frame_as_preprocess_makes_it(untrained):
    frames, _ = moving_square(4)
    session = untrained._session(frames)
    assert session.num_frames == 4
    whole = preprocess(frames, 64)
    assert all(torch.equal(session.get_frame(t), whole[t]) for t in range(4))


def test_preprocess_normalises_as_imagenet():
    frames = np.zeros((2, 10, 20, 3), np.uint8)
    frames[..., 0] = 255
    pixels = preprocess(frames, 8)
    assert pixels.shape == (2, 3, 8, 8)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert torch.allclose(pixels.mean((0, 2, 3)), expected, atol=1e-5)


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
