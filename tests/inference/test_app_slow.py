"""The page of `rcot app` in headless Chromium, with the shipped models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from rcot_rl.inference.video import write_video

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PIXELS = """(async () => {{
  const image = document.getElementById("{0}");
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}})()"""
"""A picture of the page, as a data URL."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start the app as a user does; Ctrl-C must end it with status 0."""
    log = tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "rcot_rl.cli", "app", "--port", "0"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), log.read_text()
        yield line.split()[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(browser, address):
    browser.look(1280)
    browser.open(f"{address}/")
    browser.wait_for("document.getElementById('query').value")
    yield browser
    assert browser.log == [], "an exception, or a load that the policy blocked"


def run(page, query: str) -> None:
    page.value(f"document.getElementById('query').value = {query!r}")
    page.value("document.getElementById('run').click()")
    page.wait_for("!document.getElementById('result').hidden", 400)


def test_the_demo_shows_keyframe_verdicts_and_masks_that_the_slider_moves(page):
    run(page, page.value("document.getElementById('query').value"))
    assert page.value(PIXELS.format("keyframe")).startswith("data:image/png")
    verdicts = page.value(
        "[...document.querySelectorAll('#verdicts tbody tr')].map(r => r.innerText)"
    )
    assert 1 <= len(verdicts) <= 5 and "A · accepted" in verdicts[-1]
    assert "2 objects" in page.value("document.getElementById('summary').textContent")
    first = page.value(PIXELS.format("frame"))
    page.value(
        "slider.value = 3; slider.dispatchEvent(new Event('input')); "
        "document.getElementById('frame-caption').textContent"
    )
    assert page.value(PIXELS.format("frame")) != first
    assert "frame 3 · " in page.value("document.getElementById('frame-caption').textContent")
    archive = page.value(
        "fetch(document.getElementById('download').href).then(r => r.arrayBuffer())"
        ".then(b => b.byteLength)"
    )
    assert archive > 1000
    address = page.value("location.href")
    page.open("about:blank")
    page.open(address)  # a reloaded page finds its result again
    page.wait_for("!document.getElementById('result').hidden", 20)


def test_an_upload_is_segmented_and_markup_in_texts_is_shown_as_text(page, tmp_path):
    file = tmp_path / "<b>clip.mp4"
    write_video(
        file, np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8), Fraction(5)
    )
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
    run(page, "<img src=x onerror=alert(1)>")
    assert "<b>clip.mp4 · 3 frames" in page.value("document.getElementById('notes').textContent")
    assert page.value(PIXELS.format("keyframe")).startswith("data:image/png")
    assert "<img src=x onerror=alert(1)>" in page.value(
        "document.getElementById('summary').textContent"
    )
    assert page.value("document.querySelectorAll('#summary *').length") == 0


def test_nothing_is_wider_than_a_phone(page):
    run(page, "all triangles")
    for dark in (False, True):
        page.look(390, dark=dark)
        assert page.value("document.documentElement.scrollWidth") <= 390
