"""The pages in headless Chromium: widths, heights, keyboard, colours."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rcot_rl.monitoring.pages.compare_page import comparison_page
from rcot_rl.monitoring.pages.report import write_report
from rcot_rl.monitoring.pages.reward_replay import replay, write_replay
from reward_fns import load_reward

pytestmark = pytest.mark.slow

CONTROLS = "a[href], summary, input, button, select, textarea, video[controls]"
REACHABLE = f"""[...document.querySelectorAll({json.dumps(CONTROLS)})]
  .filter(e => e.checkVisibility() && !e.closest(".skip"))"""
"""Controls that a pointer can reach."""

CONTRAST = """(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const e of document.querySelectorAll("main *, nav *, header *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([e.outerHTML.slice(0, 80), ratio]);
  }
  return faint;
})()"""
"""Texts with a contrast below 4.5 on the colour behind them."""


def rollout(step: int, sample: int) -> dict[str, Any]:
    box = [10 + sample, 10, 40, 40]
    answer = json.dumps([{"bbox_2d": box, "point_2d": [20, 20]}])
    return {
        "prompt_id": f"{step}",
        "sample": sample,
        "data_source": "rcot/ktg",
        "response": f"<think>a disc</think><answer>{answer}</answer>",
        "ground_truth": json.dumps([{"bbox_2d": [10, 10, 40, 40], "point_2d": [20, 20]}]),
        "index": step,
        "reward": float(sample),
        "components": {"format": 1.0},
        "reasons": ["box_far"],
    }


@pytest.fixture
def pages(make_run: Callable[..., Path]) -> dict[str, Path]:
    """Return a report, a comparison and a replay of the synthetic run."""
    run = make_run(n_videos=3)
    folder = run / "grpo-ktg" / "rollouts"
    folder.mkdir()
    for step in (1, 5, 9):
        lines = [json.dumps(rollout(step, sample)) + "\n" for sample in range(4)]
        (folder / f"{step}.jsonl").write_text("".join(lines))
    compared = run / "compare.html"
    compared.write_text(comparison_page([run]), encoding="utf-8")
    rewards = {name: load_reward(name) for name in ("ktg", "ktg-soft")}
    replayed = write_replay(run, replay(run, "grpo-ktg", rewards), run / "replay")
    return {"report": write_report(run), "compare": compared, "replay": replayed}


def test_nothing_is_wider_than_a_phone_or_blocked(pages: dict[str, Path], browser: Any) -> None:
    for name, page in pages.items():
        for width in (390, 820, 1280):
            browser.look(width)
            browser.open(page.as_uri())
            browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            widest = browser.value("document.documentElement.scrollWidth")
            assert widest <= width, f"{name} at {width}: {widest}"
            hidden = browser.value(
                "[...document.querySelectorAll('.wide')]"
                ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"
            )
            assert width != 390 or hidden == [], "a table is cut off"
    assert browser.log == []


def test_the_report_is_short(pages: dict[str, Path], browser: Any) -> None:
    for width, most in ((1280, 6000), (390, 10_000)):
        browser.look(width)
        browser.open(pages["report"].as_uri())
        assert browser.value("document.documentElement.scrollHeight") < most


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_can_be_read(pages: dict[str, Path], browser: Any, dark: bool) -> None:
    browser.look(1280, dark=dark)
    for page in pages.values():
        browser.open(page.as_uri())
        assert browser.value(CONTRAST) == []


def test_a_dark_screen_has_a_dark_page(pages: dict[str, Path], browser: Any) -> None:
    colours = {}
    for dark in (False, True):
        browser.look(1280, dark=dark)
        browser.open(pages["report"].as_uri())
        style = "getComputedStyle(document.querySelector({}))"
        colours[dark] = [
            browser.value(style.format("'body'") + ".backgroundColor"),
            browser.value(style.format("'.chart path'") + ".stroke"),
            browser.value(style.format("'.verdict'") + ".backgroundColor"),
        ]
    assert all(a != b for a, b in zip(colours[False], colours[True], strict=True))


def test_the_keyboard_reaches_every_control_in_the_order_of_the_page(
    pages: dict[str, Path], browser: Any
) -> None:
    browser.look(1280)
    browser.open(pages["report"].as_uri())
    browser.value(f"{REACHABLE}.forEach((e, i) => e.dataset.control = i)")
    count = browser.value(f"{REACHABLE}.length")
    assert count > 40
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().left") >= 0, "shown"
    reached: list[int] = []
    for _ in range(3 * count):
        browser.press("Tab", 9)
        control = browser.value("document.activeElement.dataset.control ?? null")
        if control is not None and int(control) not in reached:
            reached.append(int(control))
        outline = browser.value("getComputedStyle(document.activeElement).outlineStyle")
        assert control is None or outline != "none", "focus must be visible"
        if len(reached) == count:
            break
    assert reached == list(range(count))
    summary = "document.querySelector('.chart summary')"
    browser.value(f"{summary}.focus()")
    browser.press("Enter", 13)
    assert browser.value(f"{summary}.parentElement.open"), "Enter unfolds how to read a chart"


def test_the_structure_is_announced(pages: dict[str, Path], browser: Any) -> None:
    """Landmarks, one h1, no skipped level of headings, and a text for each drawing."""
    for page in pages.values():
        browser.look(390)
        browser.open(page.as_uri())
        landmarks = browser.value(
            "['main', 'nav', 'header', 'h1'].map(n => document.querySelectorAll(n).length)"
        )
        assert landmarks == [1, 1, 1, 1]
        levels = browser.value(
            "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
        )
        assert all(b <= a + 1 for a, b in pairwise(levels)), levels
        unnamed = browser.value(
            "[...document.querySelectorAll('svg, img, video')].filter(e => !e.closest("
            "'[aria-hidden=true], .sheet') && !e.getAttribute('aria-label') && !e.alt).length"
        )
        assert unnamed == 0
