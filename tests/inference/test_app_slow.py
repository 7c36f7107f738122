"""The page of `rcot app` in headless Chromium, with the shipped models."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcot_rl.inference.video import write_video

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
]
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
def page(tmp_path, address):
    with chromium(tmp_path / "profile") as page:
        page.look(1280)
        page.open(f"{address}/")
        page.wait_for("document.getElementById('query').value")
        yield page
        assert page.log == [], "an exception, or a load that the policy blocked"


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
    assert "1 object" in page.value("document.getElementById('summary').textContent")
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
    run(page, "the red circle")
    for dark in (False, True):
        page.look(390, dark=dark)
        assert page.value("document.documentElement.scrollWidth") <= 390


class Page:
    """One tab of headless Chromium, over its DevTools protocol."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._last = 0
        self.log: list[str] = []
        """Exceptions, console errors and blocked loads of the pages."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a DevTools command and return its result."""
        self._last += 1
        self._connection.send(
            json.dumps({"id": self._last, "method": method, "params": parameters})
        )
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                return message["result"]
            details = message.get("params", {})
            if message.get("method") == "Runtime.exceptionThrown":
                self.log.append(json.dumps(details["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded":
                self.log.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")

    def value(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression, promises awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 120) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition}; {self.log}"
            time.sleep(0.2)

    def open(self, url: str) -> None:
        """Load a page."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {url!r} && document.readyState === 'complete'")

    def look(self, width: int, *, dark: bool = False) -> None:
        """Set the window's width in pixels, and light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty profile folder, and end it."""
    from websockets.sync.client import connect

    assert BROWSER is not None
    options = [
        "--headless=new",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
        *(["--no-sandbox"] if os.getuid() == 0 else []),
    ]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [BROWSER, *options, "about:blank"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        with connect(_page_address(profile), max_size=None) as connection:
            yield Page(connection)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _page_address(profile: Path) -> str:
    """Return the address of the browser's first tab."""
    file = profile / "DevToolsActivePort"
    for _ in range(300):
        if file.is_file() and "\n" in (text := file.read_text()):
            port = text.split("\n")[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
                tabs = [tab for tab in json.load(reply) if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise AssertionError(f"{BROWSER} did not start; see {profile.parent / 'chromium.log'}")
