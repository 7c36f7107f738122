"""Frames and clips inside a page: JPEG and H.264 of bounded size as data URIs.

A page loads nothing, so each picture counts towards its size: a frame that several drawings show is
embedded once (`FrameSheet`).
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence

import numpy as np

from rcot_rl.monitoring.run_files.marks import EDGE, PREDICTED, TINT, TRUTH, rgb

LONGEST_FRAME = 400
"""Longest side of a drawn frame, in pixels; larger frames are scaled down."""

LONGEST_THUMBNAIL = 120
LONGEST_CLIP = 320
MOST_CLIP_FRAMES = 48
CLIP_BYTES = 60_000
"""Most bytes of a clip, before base64."""

FRAME_BYTES = 45_000
"""Most bytes of a frame, before base64."""

_QUALITIES = (85, 70, 50, 30, 10)
_RATE_FACTORS = (30, 36, 42, 48)
"""x264's constant rate factor: the first whose clip is small enough."""

_SMOOTH_FROM = 256
"""Frames whose longest side is shorter are shown with sharp pixels."""


class FrameSheet:
    """Frames of one section, each embedded once; `Overlay.svg` draws over them by id."""

    def __init__(self, section: str) -> None:
        """Start an empty sheet.

        Args:
            section: Distinguishes the ids of this sheet from those of others on the page.
        """
        self._section = section.encode()
        self._symbols: dict[str, str] = {}

    def add(self, frame: np.ndarray, longest: int = LONGEST_FRAME) -> str:
        """Embed a frame (uint8 [H, W, 3] RGB) unless it is there already; return its id."""
        small = shrunk(frame, longest)
        digest = hashlib.blake2b(self._section, digest_size=6)
        digest.update(str(small.shape).encode() + small.tobytes())
        name = f"f{digest.hexdigest()}"
        if name not in self._symbols:
            height, width = small.shape[:2]
            is_small = max(width, height) < _SMOOTH_FROM
            sharp = ' style="image-rendering: pixelated"' if is_small else ""
            self._symbols[name] = (
                f'<symbol id="{name}" viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
                f'<image href="{jpeg_uri(small)}" width="{width}" height="{height}" '
                f'preserveAspectRatio="none"{sharp}/></symbol>'
            )
        return name

    def html(self) -> str:
        """Return the element that holds the frames; it shows nothing."""
        return f'<svg class="sheet" aria-hidden="true">{"".join(self._symbols.values())}</svg>'


def shrunk(frame: np.ndarray, longest: int) -> np.ndarray:
    """Return a frame [H, W, …] scaled down to at most `longest` pixels a side."""
    import cv2

    scale = longest / max(frame.shape[:2])
    if scale >= 1:
        return frame
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def jpeg_uri(frame: np.ndarray) -> str:
    """Return a frame (uint8 [H, W, 3] RGB) as a data URI of at most `FRAME_BYTES`."""
    import cv2

    for quality in _QUALITIES:
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        encoded, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)
        if encoded and len(data) <= FRAME_BYTES:
            return _uri("image/jpeg", data.tobytes())
    raise ValueError(f"the frame takes more than {FRAME_BYTES} bytes")


def clip_size(height: int, width: int) -> tuple[int, int]:
    """Return (H, W) of a clip: a whole multiple of a small frame, or scaled down; both even."""
    longest = max(height, width)
    scale = LONGEST_CLIP // longest if longest <= LONGEST_CLIP else LONGEST_CLIP / longest
    return max(2, round(height * scale) // 2 * 2), max(2, round(width * scale) // 2 * 2)


def draw_masks(frame: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return a frame of a clip: the predicted mask tinted, the ground truth outlined.

    Args:
        frame: uint8 [H, W, 3] RGB.
        mask: bool [H, W], predicted.
        truth: bool [H, W].

    Returns:
        uint8 `[*clip_size(H, W), 3]` RGB.
    """
    import cv2

    height, width = clip_size(*frame.shape[:2])
    method = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_NEAREST
    drawn = cv2.resize(frame, (width, height), interpolation=method)
    predicted, true = (
        cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        for m in (mask, truth)
    )
    inside = predicted > 0
    tint = (1 - TINT) * drawn[inside] + TINT * np.array(rgb(PREDICTED))
    drawn[inside] = np.rint(tint).astype(np.uint8)
    for shape, colour, thickness in ((predicted, PREDICTED, 1), (true, EDGE, 3), (true, TRUTH, 1)):
        outline, _ = cv2.findContours(shape, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outline, -1, rgb(colour), thickness)
    return drawn


def clip_uri(frames: Sequence[np.ndarray], rate: int) -> str:
    """Return a clip as a data URI of at most `CLIP_BYTES`; ValueError if it cannot be so small.

    H.264 in MP4 with 4:2:0 colour: every browser that plays videos at all plays it.

    Args:
        frames: uint8 [H, W, 3] RGB, of one size with even sides.
        rate: Frames per second.
    """
    for factor in _RATE_FACTORS:
        data = _encoded(frames, rate, factor)
        if len(data) <= CLIP_BYTES:
            return _uri("video/mp4", data)
    raise ValueError(f"the clip takes more than {CLIP_BYTES} bytes")


def _encoded(frames: Sequence[np.ndarray], rate: int, factor: int) -> bytes:
    import av

    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # one thread, because the bytes depend on their number
        options = {"crf": str(factor), "preset": "fast", "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
