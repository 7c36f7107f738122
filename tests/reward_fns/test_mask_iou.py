"""`mask_iou` with a segmenter that fills boxes: values by hand, errors for missing input."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.protocol.row_clips import clip_text
from reward_fns import load_reward
from reward_fns.components.mask_iou import MaskRequest

SIZE = (60, 84)  # H, W; the canvas is 840 wide and high


class BoxFiller:
    """Fills each box, identically in every frame."""

    def __init__(self) -> None:
        self.requests: list[MaskRequest] = []

    def union_masks(self, requests):
        self.requests += requests
        out = []
        for request in requests:
            masks = np.zeros((len(request.frames), *SIZE), dtype=bool)
            for x1, y1, x2, y2 in request.boxes:
                sx, sy = SIZE[1] / request.canvas, SIZE[0] / request.canvas
                rows = slice(round(y1 * sy), round(y2 * sy))
                masks[:, rows, round(x1 * sx) : round(x2 * sx)] = True
            out.append(masks)
        return out


@pytest.fixture
def clip(tmp_path: Path) -> str:
    frames = []
    for k in range(3):
        path = tmp_path / f"{k}.png"
        cv2.imwrite(str(path), np.zeros((*SIZE, 3), np.uint8))
        frames.append(str(path))
    target = np.zeros(SIZE, dtype=bool)
    target[0:30, 0:42] = True  # the upper left quarter
    return clip_text(frames, 1, [target, target, np.zeros(SIZE, dtype=bool)])


TRUTH = [{"bbox_2d": [0, 0, 420, 420], "point_2d": [210, 210]}]


def score(clip: object, items: list[dict], segmenter=None, **keys: object):
    reward = load_reward(
        "ktg-masks",
        overrides={"components.masks": keys} if keys else None,
        segmenter=segmenter or BoxFiller(),
    )
    response = f"<think>t</think><answer>{json.dumps(items)}</answer>"
    return reward.score(response, TRUTH, extra_info={"clip": clip})


def test_over_the_clip_a_mask_without_target_costs(clip):
    result = score(clip, TRUTH)
    assert result.components["masks"] == pytest.approx(2 / 3)  # 1, 1, and 0 in the third frame
    assert result.reward == pytest.approx(6.0 + 2.0 * 2 / 3) and "mask_iou_low" in result.reasons


def test_on_the_keyframe_only_the_keyframe_counts(clip):
    segmenter = BoxFiller()
    result = score(clip, TRUTH, segmenter, over="keyframe")
    assert (result.components["masks"], result.reasons) == (1.0, [])
    assert [Path(f).name for f in segmenter.requests[0].frames] == ["1.png"]
    assert segmenter.requests[0].keyframe == 0 and segmenter.requests[0].canvas == 840


def test_half_of_the_target_earns_half(clip):
    half = [{"bbox_2d": [0, 0, 210, 420], "point_2d": [100, 210]}]
    assert score(clip, half, over="keyframe").components["masks"] == 0.5


def test_an_answer_without_boxes_earns_nothing(clip):
    for items in ([], [{}], [{"bbox_2d": [9, 9, 1, 1]}]):
        assert score(clip, items).components["masks"] == 0.0


def test_too_many_objects_are_not_segmented(clip):
    segmenter = BoxFiller()
    result = score(clip, TRUTH * 33, segmenter)
    assert result.components["masks"] == 0.0 and segmenter.requests == []


def test_a_missing_segmenter_raises_with_the_fix(clip):
    reward = load_reward("ktg-masks")
    assert reward.max_reward == 8.0
    with pytest.raises(InputError, match="--segmenter tiny"):
        reward.score("", TRUTH, extra_info={"clip": clip})
    dropped = load_reward("ktg-masks", overrides={"components.masks": None})
    assert dropped.score("", TRUTH).reward == 0.0


def one_frame(frame: str = "a", **changes: object) -> dict[str, object]:
    return {"frames": [frame], "keyframe": 0, "masks": [None]} | changes


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (None, "data.clip_frames"),
        ("{", "not a valid clip"),
        (one_frame() | {"frames": [], "masks": []}, "needs at least one frame"),
        (one_frame(keyframe=1), "keyframe that is a position"),
        (one_frame(masks=[{"size": [4, 4], "counts": "zzzz"}]), "RLE"),
        (one_frame(masks=[{"size": [10**8, 10**8], "counts": "0"}]), "mask size"),
        (one_frame("/none.png"), "not a readable image"),
    ],
)
def test_malformed_clips_raise(clip, message):
    with pytest.raises(InputError, match=message):
        score(clip, TRUTH)


def test_veason_is_segmented_from_the_chosen_frame(clip):
    truth = {"frames": [4, 7, 9], "areas": [5, 5, 0], "boxes": [[[0, 0, 420, 420]]] * 2 + [[]]}
    segmenter = BoxFiller()
    reward = load_reward("veason-r1-sam2", segmenter=segmenter)

    def consistency(keyframe):
        answer = json.dumps({"keyframe_timestamp": keyframe, "bbox_2d_list": [[0, 0, 420, 420]]})
        response = f"<think>t</think><answer>{answer}</answer>"
        return reward.score(response, truth, extra_info={"clip": clip}).components["consistency"]

    assert consistency(7) == pytest.approx(2 / 3)
    assert segmenter.requests[-1].keyframe == 1 and segmenter.requests[-1].points == [None]
    assert consistency(5) == 0.0 and len(segmenter.requests) == 1
    with pytest.raises(InputError, match="one frame for each frame of the ground truth"):
        short = {"frames": [4], "areas": [5], "boxes": [[]]}
        reward.score("", short, extra_info={"clip": clip})
