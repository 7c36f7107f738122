"""Sizes of JPEGs equal Pillow's, and truncation at any byte is detected."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.corpora.jpeg import JpegFault, size_of


def _jpeg(height: int, width: int, **options: object) -> bytes:
    pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (480, 854), (65, 3)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 60000}])
def test_size_equals_pillows(tmp_path, size, options):
    path = tmp_path / "a.jpg"
    path.write_bytes(_jpeg(*size, **options))
    assert size_of(path) == size


def test_size_ignores_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(_jpeg(10, 20, exif=exif.tobytes()))
    assert size_of(path) == (10, 20)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_a_fault(tmp_path, share):
    data = _jpeg(120, 90)
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(JpegFault):
        size_of(path)


def test_files_that_are_not_jpegs_are_faults(tmp_path):
    path = tmp_path / "a.jpg"
    for data in (b"GIF89a" * 9, b"\xff\xd8" + bytes(40), b"\xff\xd8\xff\xda" + b"\xff\xd9" * 9):
        path.write_bytes(data)
        with pytest.raises(JpegFault) as error:
            size_of(path)
        assert error.value.reason == "unreadable_frame"
    with pytest.raises(FileNotFoundError):
        size_of(tmp_path / "none.jpg")
