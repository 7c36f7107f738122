"""Run lengths equal a decoder that goes digit by digit, on masks and on invalid input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hotcoco import mask as coco
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.corpora import rle


def spelled(runs: list[int]) -> bytes:
    """Return COCO's text of any runs, also of invalid ones."""
    out = bytearray()
    for i, run in enumerate(runs):
        rest = run - (runs[i - 2] if i > 2 else 0)
        while True:
            digit, rest = rest & 31, rest >> 5
            done = rest == (-1 if digit & 16 else 0)
            out.append(48 + digit + (0 if done else 32))
            if done:
                break
    return bytes(out)


def slowly(size: list[int], text: bytes) -> np.ndarray | None:
    """Decode to bool [H, W] with integers of any length; None if it is not a mask."""
    runs: list[int] = []
    value = bits = 0
    for character in text:
        digit = character - 48
        if not 0 <= digit < 64:
            return None
        value |= (digit & 31) << bits
        bits += 5
        if digit < 32:
            value -= (1 << bits) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    if bits or not runs or min(runs) < 0 or sum(runs) != size[0] * size[1]:
        return None
    flat = [number % 2 == 1 for number, run in enumerate(runs) for _ in range(run)]
    return np.array(flat, dtype=bool).reshape(size[1], size[0]).T


def agree(size: list[int], counts: bytes | str | list[int], expected: np.ndarray | None) -> None:
    """Assert that `decode`, `area` and `box` agree with `expected`; None: all raise."""
    given_rle = {"size": size, "counts": counts}
    if expected is None:
        for read in (rle.decode, rle.area, rle.box):
            with pytest.raises(ValueError):
                read(given_rle)
        return
    decoded = rle.decode(given_rle)
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, expected)
    assert rle.area(given_rle) == (int(expected.sum()), tuple(size))
    box, found_size = rle.box(given_rle)
    assert found_size == tuple(size)
    rows, columns = np.nonzero(expected)
    if not rows.size:
        assert box is None
    else:
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


sides = st.integers(1, 40)


@given(sides, sides, st.integers(0, 2**32), st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
def test_masks_survive_encoding_and_decoding(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    edges = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0)).tolist()
    runs = [b - a for a, b in pairwise([0, *edges, height * width])]
    for counts in (spelled(runs), spelled(runs).decode(), runs):
        agree([height, width], counts, mask)


@settings(max_examples=500)
@given(st.integers(1, 6), st.integers(1, 6), st.binary(max_size=9))
@example(1, 1, b"1")
@example(1, 1, b"")
@example(2, 2, b"P")
@example(2, 2, b"4P")
def test_any_bytes_are_read_alike_or_refused(height, width, text):
    agree([height, width], text, slowly([height, width], text))


@settings(max_examples=500)
@given(st.integers(1, 6), st.integers(1, 6), st.text("0123456789NOPQRSnop", max_size=9))
def test_digits_are_read_alike_or_refused(height, width, text):
    agree([height, width], text, slowly([height, width], text.encode()))


near_misses = st.sampled_from([-5, -1, 0, 1, 2, 2**31, 2**32, -(2**32), 2**62, 2**64, 2**200])


@settings(max_examples=500)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9), near_misses, st.integers(0, 8), st.data()
)
def test_runs_that_miss_their_total_are_refused(runs, by, at, data):
    total = sum(runs)
    height = data.draw(st.sampled_from([k for k in range(1, total + 1) if total % k == 0] or [1]))
    size = [height, max(total // height, 1)]
    runs[at % len(runs)] += by
    text = spelled(runs)
    agree(size, text, slowly(size, text))
    whole = min(runs) >= 0 and sum(runs) == size[0] * size[1]
    agree(size, runs, slowly(size, text) if whole else None)


@given(st.integers(0, 60), st.integers(0, 2**16))
def test_a_text_that_is_cut_is_refused(keep, seed):
    mask = np.random.default_rng(seed).random((30, 20)) < 0.5
    edges = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0)).tolist()
    text = spelled([b - a for a, b in pairwise([0, *edges, 600])])
    agree([30, 20], text[:keep], slowly([30, 20], text[:keep]))


@pytest.mark.parametrize(
    "size",
    [
        [1 << 14, 1 << 13],
        [1 << 31, 1 << 31],
        [1 << 32, 1],
        [1, 1 << 63],
        [1 << 64, 1 << 64],
        [1 << 5000, 1],
        [0, 4],
        [4, 0],
        [-2, -2],
        [True, 4],
        [2.0, 2],
        ["2", "2"],
        [2, 2, 1],
        [4],
        "22",
        None,
    ],
)
@pytest.mark.parametrize("counts", [b"4", "4", [4], [1 << 62], b"P" * 12 + b"1"])
def test_sizes_that_would_end_the_process_are_refused(size, counts):
    agree(size, counts, None)


@pytest.mark.parametrize(
    "counts",
    [None, 4, 4.0, {}, (4,), [4.0], [True, 3], ["4"], [[4]], [2, 1 << 100], "4\n", "٤", "\ud800"],
)
def test_counts_of_other_kinds_are_refused(counts):
    agree([2, 2], counts, None)


@pytest.mark.parametrize("text", [b"o" * 2_000_000, b"0" * 2_000_000, b"o" * 2_000_000 + b"1"])
def test_long_invalid_counts_are_refused_quickly(text):
    agree([1000, 1000], text, None)


@given(sides, sides, st.integers(0, 2**32), st.integers(1, 4))
def test_unions_are_those_of_the_pixels(height, width, seed, n):
    masks = np.random.default_rng(seed).random((n, height, width)) < 0.3
    encoded = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    listed = [{"size": [height, width], "counts": e["counts"]} for e in encoded]
    assert rle.union_area(listed) == np.count_nonzero(masks.any(axis=0))


def test_a_union_refuses_what_decoding_refuses():
    with pytest.raises(ValueError):
        rle.union_area([{"size": [2, 2], "counts": [1, 3]}, {"size": [2, 2], "counts": [1, 2]}])
