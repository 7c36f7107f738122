"""Label images read as Pillow reads them, whoever wrote them and however broken they are."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.corpora.corpus import CorpusFault
from data_pipelines.corpora.label_png import plain_labels, read_labels


def saved(labels: np.ndarray, mode: str = "P", **options: object) -> bytes:
    image = Image.fromarray(labels, "L")
    if mode == "P":
        image = image.copy()
        image.putpalette([k * 7 % 256 for k in range(768)])
    file = io.BytesIO()
    (image.convert("1") if mode == "1" else image).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def written(labels: np.ndarray, filters: np.ndarray, pieces: int = 1) -> bytes:
    """Return a handmade PNG: grey, one filter type per row, the stream in several chunks."""
    height, width = labels.shape
    lines, above = [], np.zeros(width, np.uint8)
    for row, kind in zip(labels, filters, strict=True):
        left = np.concatenate([[0], row[:-1]]).astype(np.uint8)
        lines.append(bytes([kind]) + [row, row - left, row - above][kind].tobytes())
        above = row
    packed = zlib.compress(b"".join(lines))
    cuts = [len(packed) * k // pieces for k in range(pieces + 1)]
    parts = [chunk(b"IDAT", packed[a:b]) for a, b in pairwise(cuts)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IEND", b"")


images = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).integers(0, 256, t[:2]).astype(np.uint8)
)


@given(
    images,
    st.sampled_from([("P", {}), ("L", {}), ("P", {"optimize": True}), ("P", {"bits": 4})]),
)
@settings(max_examples=80, deadline=None)
def test_label_images_written_by_pillow_read_as_pillow_reads_them(tmp_path_factory, labels, how):
    mode, options = how
    if "bits" in options:
        labels = labels % 16
    path = tmp_path_factory.getbasetemp() / "labels.png"
    path.write_bytes(saved(labels, mode, **options))
    read_labels.cache_clear()
    np.testing.assert_array_equal(read_labels(str(path)), labels)


def test_plain_palettes_are_read_without_pillow():
    labels = (np.arange(12 * 9).reshape(12, 9) % 5).astype(np.uint8)
    np.testing.assert_array_equal(plain_labels(saved(labels)), labels)
    for pieces in (1, 2, 7):
        decoded = plain_labels(written(labels, np.zeros(12, int), pieces))
        np.testing.assert_array_equal(decoded, labels)


@given(images, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_filtered_rows_are_left_to_pillow(tmp_path_factory, labels, seed):
    filters = np.random.default_rng(seed).integers(0, 3, len(labels))
    filters[-1] = 2
    data = written(labels, filters, 2)
    assert plain_labels(data) is None
    path = tmp_path_factory.getbasetemp() / "filtered.png"
    path.write_bytes(data)
    read_labels.cache_clear()
    np.testing.assert_array_equal(read_labels(str(path)), labels)


def test_images_that_are_not_plain_are_left_to_pillow():
    labels = np.zeros((6, 6), np.uint8)
    plain = saved(labels)
    colour = cv2.imencode(".png", np.zeros((6, 6, 3), np.uint8))[1].tobytes()
    end = plain.index(b"IEND") - 4
    for data in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        plain[:-12],
        plain[:-1],
        plain[:end] + chunk(b"IDAT", b"more") + plain[end:],
        plain[:33] + chunk(b"acTL", bytes(8)) + plain[33:],
        plain[:-40] + bytes(40),
        colour,
        saved(labels, "1"),
        saved(labels, bits=2),
    ):
        assert plain_labels(data) is None


def test_a_stream_longer_than_its_image_is_not_inflated():
    labels = np.zeros((4, 4), np.uint8)
    bomb = written(np.zeros((4096, 4096), np.uint8), np.zeros(4096, int))
    size = struct.pack(">II", 4, 4)
    header = b"IHDR" + size + bomb[24:29]
    data = bomb[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    assert plain_labels(data) is None
    np.testing.assert_array_equal(plain_labels(written(labels, np.zeros(4, int))), labels)


def test_broken_files_fail_as_pillow_does(tmp_path):
    labels = (np.arange(64 * 48).reshape(64, 48) // 200).astype(np.uint8)
    whole = saved(labels)
    rng = np.random.default_rng(1)
    same = refused = 0
    for k in range(400):
        raw = bytearray(whole)
        raw[rng.integers(0, len(raw))] = rng.integers(0, 256)
        path = tmp_path / f"{k}.png"
        path.write_bytes(raw)
        try:
            with Image.open(path) as image:
                expected = np.array(image) if image.mode in ("P", "L", "1") else None
        except (OSError, SyntaxError, ValueError):
            expected = None
        if expected is None:
            with pytest.raises(CorpusFault):
                read_labels(str(path))
            refused += 1
        else:
            np.testing.assert_array_equal(read_labels(str(path)), expected)
            same += 1
    assert same
    assert refused > 200


def test_cached_labels_are_read_only(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(saved(np.ones((3, 3), np.uint8)))
    with pytest.raises(ValueError, match="read-only"):
        read_labels(str(path))[0, 0] = 5
