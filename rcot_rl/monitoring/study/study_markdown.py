"""Markdown of a study's page: tables, numbers and intervals. Texts of results are untrusted."""

from __future__ import annotations

from collections.abc import Sequence

from rcot_rl.monitoring.pages.figures import DASH
from rcot_rl.stats.intervals import Interval


def plain(text: object) -> str:
    """Return a text without meaning in Markdown or HTML, in one line."""
    shown = " ".join(str(text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;")):
        shown = shown.replace(character, entity)
    for character in "\\*_[]":
        shown = shown.replace(character, f"\\{character}")
    return shown


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table whose first `texts` columns are left-aligned and the others right-aligned."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def level_text(value: float | None, digits: int = 1) -> str:
    """Return a level, or a dash."""
    return DASH if value is None else f"{value:.{digits}f}"


def effect_text(value: float | None, digits: int = 2) -> str:
    """Return a signed number, or a dash; never -0.00."""
    return DASH if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"


def interval_text(interval: Interval | None, digits: int = 2) -> str:
    """Return `[low, high]`, or a dash."""
    if interval is None or interval.low is None or interval.high is None:
        return DASH
    return f"[{effect_text(interval.low, digits)}, {effect_text(interval.high, digits)}]"
