"""Overlays: visible on any colour, text that fits, and nothing drawn that was not asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from rcot_rl.inference.overlay import (
    COLORS,
    MISSING,
    MOST_LINES,
    draw_overlay,
    draw_strip,
    missing_glyphs,
    readable_scale,
    wrap,
)

HEIGHT, WIDTH = 60, 80
NOTHING = np.zeros((0, HEIGHT, WIDTH), bool)


def flat(color) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), color, np.uint8)


def square(top=20, left=20, side=20) -> np.ndarray:
    mask = np.zeros((1, HEIGHT, WIDTH), bool)
    mask[0, top : top + side, left : left + side] = True
    return mask


def changed(drawn: np.ndarray, frame: np.ndarray) -> np.ndarray:
    return (drawn != frame).any(axis=2)


def contrast(image: np.ndarray, color) -> float:
    """Return the largest contrast ratio of a pixel with a colour, as defined by WCAG 2."""

    def luminance(rgb) -> np.ndarray:
        share = np.asarray(rgb) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    values, background = luminance(image) + 0.05, luminance(color) + 0.05
    return float(np.maximum(values / background, background / values).max())


@pytest.fixture
def font():
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)


def test_a_frame_without_marks_is_an_unchanged_copy():
    frame = flat((10, 20, 30))
    drawn = draw_overlay(frame, NOTHING)
    assert np.array_equal(drawn, frame) and not np.shares_memory(drawn, frame)


def test_overlays_change_only_what_they_mark():
    frame = flat((10, 20, 30))
    marks = changed(draw_overlay(frame, square(), [[30, 30, 50, 50]], [[40, 40]]), frame)
    assert marks[20:40, 20:40].all()
    assert marks[30, 30:50].all() and marks[30:50, 49].all()
    assert not marks[:16].any() and not marks[54:].any() and not marks[:, 54:].any()
    with pytest.raises(ValueError, match="masks"):
        draw_overlay(frame, square().transpose(0, 2, 1))


@pytest.mark.parametrize(
    "color", [*COLORS, (0, 0, 0), (60, 60, 60), (128, 128, 128), (255, 255, 255), (255, 0, 0)]
)
@pytest.mark.parametrize("index", range(len(COLORS)))
def test_every_object_is_visible_on_every_colour(color, index):
    """Mask outline, box and point have the contrast of 3 that WCAG asks of graphics."""
    frame = flat(color)
    masks = np.zeros((index + 1, HEIGHT, WIDTH), bool)
    masks[index] = square()[0]
    boxes, points = [[0, 0, 0, 0]] * index, [[0, 0]] * index
    for drawn, area in (
        (draw_overlay(frame, masks), np.s_[17:23, 25:35]),
        (draw_overlay(frame, NOTHING, [*boxes, [45, 10, 75, 50]]), np.s_[7:14, 50:70]),
        (draw_overlay(frame, NOTHING, (), [*points, [60, 30]]), np.s_[22:38, 52:68]),
    ):
        assert contrast(drawn[area], color) >= 3


def test_objects_that_overlap_have_different_colours():
    masks = np.concatenate([square(10, 10), square(20, 20)])
    drawn = draw_overlay(flat((128, 128, 128)), masks)
    colors = {tuple(drawn[y, x]) for y, x in ((15, 15), (25, 25), (36, 36))}
    assert len(colors) == 3


def test_scale_enlarges_frame_and_marks():
    drawn = draw_overlay(flat(0), square(), [[50, 10, 70, 30]], scale=3)
    assert drawn.shape == (3 * HEIGHT, 3 * WIDTH, 3)
    marks = drawn.any(axis=2)
    assert marks[70:110, 70:110].all()
    assert marks[31, 160:200].all() and not marks[:25].any()
    assert readable_scale(128, 128) == 3 and readable_scale(720, 1280) == 1


def test_only_a_keyframe_has_a_border():
    border = np.ones((HEIGHT, WIDTH), bool)
    border[3:-3, 3:-3] = False
    frame = flat(90)
    assert changed(draw_overlay(frame, NOTHING, keyframe=True), frame)[border].all()
    assert not changed(draw_overlay(frame, square()), frame)[border].any()


def test_label_and_query_are_written_at_top_and_bottom():
    frame = np.full((360, 480, 3), 255, np.uint8)
    masks = np.zeros((0, 360, 480), bool)
    rows = changed(draw_overlay(frame, masks, label="keyframe", query="the cat"), frame).any(axis=1)
    assert rows[:20].all() and rows[-20:].all() and not rows[60:-60].any()
    long = changed(draw_overlay(frame, masks, query="the cat " * 400), frame).any(axis=1)
    assert rows[-20:].sum() <= long.sum() < 120, "a long query does not cover the frame"
    texts = [draw_overlay(frame, masks, query=q) for q in ("the cat", "the dog")]
    assert (texts[0] != texts[1]).any()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=400), st.integers(30, 400))
def test_lines_fit_and_keep_the_words_in_order(text, width):
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    lines = wrap(text, font, width)
    assert len(lines) <= MOST_LINES
    assert all(font.getlength(line) <= width or len(line) <= 1 for line in lines)
    lacking = set(missing_glyphs(text))
    written = "".join(MISSING if c in lacking else c for c in text)
    squeezed = "".join("".join(lines).removesuffix("…").split())
    assert "".join(written.split()).startswith(squeezed)


def test_a_cut_text_ends_with_an_ellipsis(font):
    assert wrap("two words", font, 400) == ["two words"]
    lines = wrap("many words " * 40, font, 100)
    assert len(lines) == MOST_LINES and lines[-1].endswith("…")


def test_characters_without_a_glyph_are_boxes(font):
    assert missing_glyphs("left é Ж ش 左 🙂 左") == "左🙂"
    assert wrap("左 of", font, 400) == [f"{MISSING} of"]


def test_a_strip_has_its_panels_side_by_side_above_the_text():
    panels = [np.full((64, 40, 3), value, np.uint8) for value in (10, 200)]
    strip = draw_strip(panels, "query: the cat")
    assert strip.shape[0] > 64 and strip.shape[1] == 84
    assert np.array_equal(strip[:64, :40], panels[0])
    assert np.array_equal(strip[:64, -40:], panels[1])
    assert strip[64:].max() > 128, "the text is light on dark"
