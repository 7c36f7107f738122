"""Names of frames in prompts and answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcot_rl.protocol.frame_names import FrameNames


@given(st.integers(1, 300), st.sampled_from([0.5, 1, 2, 8, 24, 29.97]), st.data())
def test_every_name_is_read_back_as_its_own_frame(n_frames, fps, data) -> None:
    names = FrameNames(tuple(i / fps for i in range(n_frames)))
    position = data.draw(st.integers(0, n_frames - 1))
    assert names.parse(names.name(position), n_frames) == position
    assert FrameNames().parse(FrameNames().name(position), n_frames) == position


@pytest.mark.parametrize(
    ("answer", "position"),
    [
        ("0.74", 1),
        ("0.76", 2),
        (" 1 ", 2),
        ("1.75", 3),
        ("1.76", None),  # beyond the last frame by more than half of a distance
        ("-1", None),
        ("1e3", None),
        ("0.5 s", None),
        ("nan", None),
        ("", None),
        (None, None),
        ("9" * 400, None),
    ],
)
def test_a_time_names_the_nearest_frame(answer, position) -> None:
    assert FrameNames((0.0, 0.5, 1.0, 1.5)).parse(answer, 4) == position
