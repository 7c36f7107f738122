"""Embedded frames and clips: size, number of frames, colours and bytes."""

from __future__ import annotations

import base64
import io
import re

import av
import cv2
import numpy as np
import pytest

from rcot_rl.monitoring.pages import embedded_media
from rcot_rl.monitoring.pages.embedded_media import (
    CLIP_BYTES,
    FRAME_BYTES,
    LONGEST_CLIP,
    MOST_CLIP_FRAMES,
    FrameSheet,
    clip_size,
    clip_uri,
    draw_masks,
    jpeg_uri,
)
from rcot_rl.monitoring.run_files.marks import PREDICTED, TINT, rgb


def data_of(uri: str, kind: str) -> bytes:
    head, _, data = uri.partition(";base64,")
    assert head == f"data:{kind}"
    return base64.b64decode(data, validate=True)


def decoded(uri: str) -> tuple[np.ndarray, float]:
    """Return the frames of a clip [T, H, W, 3], and its length in seconds."""
    with av.open(io.BytesIO(data_of(uri, "video/mp4"))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        seconds = float(stream.duration * stream.time_base)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), seconds


def test_a_clip_has_its_frames_in_order_and_its_length() -> None:
    frames = [np.full((96, 128, 3), 20 * k, np.uint8) for k in range(10)]
    shown, seconds = decoded(clip_uri(frames, rate=5))
    assert shown.shape == (10, 96, 128, 3) and seconds == pytest.approx(2.0)
    assert np.abs(shown.mean(axis=(1, 2, 3)) - 20 * np.arange(10)).max() < 4


def test_a_clip_of_noise_is_small_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (MOST_CLIP_FRAMES, 180, 320, 3), np.uint8)
    data = data_of(clip_uri(list(noise), rate=12), "video/mp4")
    assert len(data) <= CLIP_BYTES
    monkeypatch.setattr(embedded_media, "CLIP_BYTES", 500)
    with pytest.raises(ValueError, match="more than 500 bytes"):
        clip_uri(list(noise[:4]), rate=12)


def test_the_same_clip_is_the_same_text() -> None:
    frames = list(np.random.default_rng(2).integers(0, 256, (4, 64, 64, 3), np.uint8))
    assert clip_uri(frames, rate=4) == clip_uri(frames, rate=4)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((128, 128), (256, 256)),
        ((480, 854), (180, 320)),
        ((100, 75), (300, 224)),
        ((320, 1), (320, 2)),
    ],
)
def test_clips_are_enlarged_by_whole_numbers_or_scaled_down(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert clip_size(*size) == shown and max(shown) <= LONGEST_CLIP


def test_masks_are_tinted_and_the_truth_is_outlined() -> None:
    frame = np.full((100, 100, 3), 100, np.uint8)
    mask, truth = np.zeros((2, 100, 100), dtype=bool)
    mask[10:40, 10:40] = True
    truth[50:80, 50:80] = True
    drawn = draw_masks(frame, mask, truth)
    assert drawn.shape == (300, 300, 3)
    tint = np.rint((1 - TINT) * 100 + TINT * np.array(rgb(PREDICTED)))
    assert drawn[75, 75].tolist() == tint.tolist()
    assert drawn[195, 195].tolist() == [100] * 3 and drawn[285, 20].tolist() == [100] * 3
    assert [255] * 3 in drawn[145:155, 195].tolist(), "the light line of the truth"
    assert (frame == 100).all(), "the frame itself is not changed"


def test_a_sheet_embeds_each_frame_once_and_scales_it_down() -> None:
    rng = np.random.default_rng(3)
    sheet, other = FrameSheet("a"), FrameSheet("b")
    frame, second = rng.integers(0, 256, (2, 300, 900, 3), np.uint8)
    names = [sheet.add(frame), sheet.add(frame.copy()), sheet.add(second), sheet.add(frame, 90)]
    assert names[0] == names[1] and len(set(names)) == 3
    assert other.add(frame) not in names, "ids of two sections differ"
    pictures = re.findall(r'href="(data:[^"]*)"', sheet.html())
    sizes = []
    for picture in pictures:
        data = data_of(picture, "image/jpeg")
        assert len(data) <= FRAME_BYTES
        sizes.append(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2])
    assert sizes == [(133, 400), (133, 400), (30, 90)]
    assert set(re.findall(r'<symbol id="(\w+)"', sheet.html())) == set(names)


def test_a_frame_that_cannot_be_small_is_refused() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (2000, 2000, 3), np.uint8)
    with pytest.raises(ValueError, match="45000 bytes"):
        jpeg_uri(noise)
