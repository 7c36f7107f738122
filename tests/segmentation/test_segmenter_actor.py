"""Masks for rewards by the real SAM2, in this process and batched in the actor."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.protocol.row_clips import clip_text
from rcot_rl.segmentation.segmenter_actor import LocalSegmenter, SegmenterActor
from reward_fns import load_reward
from reward_fns.components.mask_iou import MaskRequest


@pytest.fixture
def clip(tmp_path: Path) -> tuple[list[str], list[np.ndarray]]:
    """Return frames and masks of a red disc that moves to the right over a grey ground."""
    ys, xs = np.mgrid[:128, :128]
    paths, masks = [], []
    for k in range(4):
        mask = (ys - 64) ** 2 + (xs - 40 - 8 * k) ** 2 < 18**2
        frame = np.full((128, 128, 3), 70, np.uint8)
        frame[mask] = (40, 40, 220)
        path = tmp_path / f"{k}.png"
        cv2.imwrite(str(path), frame)
        paths.append(str(path))
        masks.append(mask)
    return paths, masks


def request(paths: list[str]) -> MaskRequest:
    box = (22 * 840 / 128, 46 * 840 / 128, 58 * 840 / 128, 82 * 840 / 128)
    return MaskRequest(paths, 0, [box], [(40 * 840 / 128, 64 * 840 / 128)], 840)


@pytest.mark.parametrize("spec", ["flow", "tiny"])
def test_real_masks_follow_the_disc(clip, spec):
    paths, masks = clip
    union = LocalSegmenter(spec).union_masks([request(paths)])[0]
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(union, masks, strict=True)]
    assert min(ious) > 0.6, ious


def test_the_reward_scores_masks_of_the_real_segmenter(clip):
    paths, masks = clip
    reward = load_reward("ktg-masks", segmenter=LocalSegmenter("flow"))
    ask = request(paths)
    truth = [{"bbox_2d": list(ask.boxes[0]), "point_2d": list(ask.points[0])}]
    response = f"<think>t</think><answer>{json.dumps(truth)}</answer>"
    info = {"clip": clip_text(paths, 0, masks)}
    good = reward.score(response, truth, extra_info=info)
    assert good.components["masks"] > 0.6
    moved = [{"bbox_2d": [600, 600, 700, 700], "point_2d": [650, 650]}]
    other = f"<think>t</think><answer>{json.dumps(moved)}</answer>"
    assert reward.score(other, truth, extra_info=info).components["masks"] < 0.2


def test_the_actor_gathers_and_one_bad_request_costs_only_itself(clip):
    paths, _ = clip

    async def many():
        actor = SegmenterActor("flow", "cpu")
        requests = [request(paths), request([*paths, "/none.png"]), request(paths)]
        results = await asyncio.gather(
            *(actor.union_masks(one) for one in requests), return_exceptions=True
        )
        return results, actor.batches

    results, batches = asyncio.run(many())
    assert np.array_equal(results[0], results[2]) and isinstance(results[1], InputError)
    assert batches == [3]


@pytest.mark.slow
def test_in_ray_every_worker_gets_the_same_actor(clip, monkeypatch):
    import ray

    from rcot_rl.segmentation.segmenter_actor import segmenter_handle

    paths, _ = clip
    monkeypatch.delenv("RCOT_SEGMENTER", raising=False)
    with pytest.raises(InputError, match="RCOT_SEGMENTER"):
        segmenter_handle()
    monkeypatch.setenv("RCOT_SEGMENTER", "flow")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=2, include_dashboard=False, address="local")
    try:
        first, second = segmenter_handle(), segmenter_handle()
        assert first._actor._actor_id == second._actor._actor_id
        local = LocalSegmenter("flow").union_masks([request(paths)])[0]
        assert np.array_equal(second.union_masks([request(paths)])[0], local)
    finally:
        ray.shutdown()


def test_frames_are_segmented_without_exif_rotation(clip, tmp_path):
    """As for readers of corpora: an EXIF rotation would turn frames away from boxes and labels."""
    from PIL import Image

    paths, _ = clip
    turned = []
    for path in paths:
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            turned.append(f"{path}.jpg")
            image.crop((0, 0, 128, 96)).save(turned[-1], exif=exif, quality=95)
    assert LocalSegmenter("flow").union_masks([request(turned)])[0].shape == (4, 96, 128)
