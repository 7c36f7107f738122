"""The report's queries and rollouts in headless Chromium: slider, clips and marks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcot_rl.monitoring.pages.report import write_report

pytestmark = pytest.mark.slow
VISIBLE_STEPS = (
    "[...document.querySelectorAll('details[data-step]')]"
    ".filter(step => step.checkVisibility()).map(step => step.dataset.step).join()"
)
MARKS = (
    "[...document.querySelectorAll('.query[open] .mark.predicted')]"
    ".filter(mark => mark.checkVisibility()).length"
)


@pytest.fixture
def report(make_run: Callable[..., Path]) -> Path:
    """Return a report with rollouts of the steps 1, 5 and 9 of a stage."""
    run = make_run(n_videos=2)
    folder = run / "grpo-ktg" / "rollouts"
    folder.mkdir()
    for step in (1, 5, 9):
        rows = [
            {
                "prompt_id": "p",
                "sample": sample,
                "data_source": "rcot/ktg",
                "response": f"<think>t</think><answer>[]</answer> {step}",
                "ground_truth": "[]",
                "reward": float(sample),
                "components": {},
                "reasons": [],
            }
            for sample in (0, 1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{step}.jsonl").write_text(text)
    return write_report(run)


def test_the_slider_shows_one_step_and_says_which(report: Path, browser: Any) -> None:
    browser.look(1280)
    browser.open(report.as_uri())
    assert browser.value(VISIBLE_STEPS) == "9"
    browser.value("document.querySelector('.slider input').focus()")
    shown = []
    for key, code in (("ArrowLeft", 37), ("Home", 36), ("ArrowLeft", 37), ("End", 35)):
        browser.press(key, code)
        value = browser.value(
            "document.querySelector('.slider input').getAttribute('aria-valuetext')"
        )
        assert browser.value("document.querySelector('.slider output').textContent") in value
        shown.append((browser.value(VISIBLE_STEPS), value))
    assert shown == [("5", "step 5"), ("1", "step 1"), ("1", "step 1"), ("9", "step 9")]
    assert browser.value("document.querySelector('details[data-step=\"9\"]').open")
    assert browser.log == []


def test_without_the_script_the_steps_are_a_list(report: Path, browser: Any) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.look(1280)
    browser.open(report.as_uri())
    tree = browser.call("DOMSnapshot.captureSnapshot", computedStyles=["display"])
    strings, nodes = tree["strings"], tree["documents"][0]["nodes"]
    boxes = set(tree["documents"][0]["layout"]["nodeIndex"])
    steps, sliders = [], []
    for index, names in enumerate(nodes["attributes"]):
        pairs = [strings[k] for k in names]
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        if "data-step" in values:
            steps.append((values["data-step"], index in boxes))
        if values.get("class") == "slider":
            sliders.append(index in boxes)
    assert steps == [("1", True), ("5", True), ("9", True)] and sliders == [False]


def test_a_clip_plays_and_loops(report: Path, browser: Any) -> None:
    browser.look(390)
    browser.open(report.as_uri())
    assert browser.value("document.documentElement.scrollWidth") <= 390
    clip = "document.querySelector('.query[open] video')"
    assert browser.value(f"{clip}.readyState") == 0, "nothing is decoded before it is played"
    browser.value(f"void {clip}.play()")
    end = time.monotonic() + 60
    while not browser.value(f"{clip}.currentTime > 0.2"):
        assert time.monotonic() < end, browser.value(f"{clip}.error && {clip}.error.message")
        time.sleep(0.1)
    facts = browser.value(f"[{clip}.duration, {clip}.videoWidth, {clip}.videoHeight, {clip}.loop]")
    assert facts == [pytest.approx(6 / 4), 256, 192, True]
    assert browser.log == []


def test_the_legend_hides_marks(report: Path, browser: Any) -> None:
    browser.look(1280)
    browser.open(report.as_uri())
    shown = browser.value(MARKS)
    assert shown >= 3
    browser.value("document.querySelector('.show-predicted').click()")
    assert browser.value(MARKS) == 0
    browser.value("document.querySelector('.show-predicted').click()")
    assert browser.value(MARKS) == shown
