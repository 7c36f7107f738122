"""Fixtures that tests of several rooms share.

Most are functions: test modules cannot import one another, so a helper of several files is a
fixture that returns it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rcot_rl.system import disk
from rcot_rl.system.logs import LOGGERS

CHECKOUT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    """Return the Grafana dashboard."""
    text = (CHECKOUT / "docs" / "grafana" / "rcot.json").read_text(encoding="utf-8")
    return json.loads(text)


@pytest.fixture(scope="session")
def dashboard_names(dashboard: dict[str, Any]) -> set[str]:
    """Return the names of metrics in the dashboard's expressions."""
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    texts = [target["expr"] for target in targets]
    return {name for text in texts for name in re.findall(r"\b(?:ray_|vllm:)[a-z0-9_]+", text)}


@pytest.fixture
def set_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that changes what file systems report.

    Its arguments: `free` bytes and `inodes`; `read_only`; `fault`, the errno of every attempt to
    write a file; `under`, to change only the file systems below this folder.
    """
    real_statvfs, real_write_fault = os.statvfs, disk._write_fault

    def change(
        free: int = 10**13,
        inodes: int = 10**6,
        read_only: bool = False,
        fault: int | None = None,
        under: Path | None = None,
    ) -> None:
        def is_changed(path: object) -> bool:
            return under is None or Path(str(path)).is_relative_to(under)

        def statvfs(path: object) -> os.statvfs_result:
            real = real_statvfs(path)
            if not is_changed(path):
                return real
            flag = real.f_flag | os.ST_RDONLY if read_only else real.f_flag & ~os.ST_RDONLY
            blocks = free // real.f_frsize
            sizes = (real.f_bsize, real.f_frsize, 2 * blocks, blocks, blocks)
            return os.statvfs_result((*sizes, 10**6, inodes, inodes, flag, real.f_namemax))

        monkeypatch.setattr(os, "statvfs", statvfs)
        monkeypatch.setattr(
            disk,
            "_write_fault",
            lambda folder, size: fault if is_changed(folder) else real_write_fault(folder, size),
        )

    return change


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Return a function that runs code in a new interpreter and returns its standard output.

    Its arguments: the code, the code's arguments, `cwd`, and environment variables by name (None
    unsets one). An exit status other than 0 fails the test.
    """

    def run(code: str, *arguments: str, cwd: Path | None = None, **variables: str | None) -> str:
        environment = os.environ | variables
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=cwd,
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_rcot() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs an `rcot` command in a process of this checkout.

    Its arguments: the command's, `cwd`, and environment variables by name.
    """

    def run(
        *arguments: object, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "rcot_rl.cli", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path} | variables,
            capture_output=True,
            text=True,
            timeout=900,
        )

    return run


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Return a function that runs an `rcot` command in this process, with typer's runner.

    An exception of the command is in the result, as it was raised. Its arguments: the command's,
    and `stdin`.
    """
    from rcot_rl.cli.main import app

    def run(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)

    return run


@pytest.fixture(scope="session")
def policy_with_tokens() -> Callable[..., Path]:
    """Return a function that copies the tiny policy's processor and adds tokens to it.

    Its arguments: the new folder, `special` and `ordinary` tokens. A token that the tokenizer has
    already is left as it is.
    """
    from rcot_rl.inference.model_folder import TINY

    def copy(folder: Path, special: tuple[str, ...] = (), ordinary: tuple[str, ...] = ()) -> Path:
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        added = tokenizer["added_tokens"]
        known = {token["content"] for token in added}
        new = [(token, token in special) for token in (*special, *ordinary) if token not in known]
        first_id = max(tokenizer["model"]["vocab"].values()) + 1
        tokenizer["added_tokens"] = added + [
            added[0] | {"id": first_id + k, "content": token, "special": is_special}
            for k, (token, is_special) in enumerate(new)
        ]
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        return folder

    return copy


@pytest.fixture(scope="session")
def save_json() -> Callable[[Path, Any], None]:
    """Return a function that writes a JSON file, and the folders above it."""

    def save(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    return save


@pytest.fixture(scope="session")
def coco_rle() -> Callable[[np.ndarray], dict | None]:
    """Return a function that encodes a mask bool [H, W] with the COCO library; None if empty."""
    from hotcoco import mask as coco

    def encode(mask: np.ndarray) -> dict | None:
        if not mask.any():
            return None
        counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        text = counts.decode() if isinstance(counts, bytes) else counts
        return {"size": list(mask.shape), "counts": text}

    return encode


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Undo `configure_logging`, which the console script calls: `caplog` needs propagation."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[BrowserPage]:
    """Return a tab of a headless Chromium with an empty profile."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with _chromium(tmp_path / "profile") as page:
        yield page


class BrowserPage:
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

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as `Tab` with the code 9."""
        typed = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind, extra in (("keyDown", typed), ("keyUp", {})):
            values = {"key": key, "code": key, "windowsVirtualKeyCode": code} | extra
            self.call("Input.dispatchKeyEvent", type=kind, **values)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def _chromium(profile: Path) -> Iterator[BrowserPage]:
    """Start a browser with an empty profile folder, and end it."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
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
            [CHROMIUM, *options, "about:blank"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        with connect(_page_address(profile), max_size=None) as connection:
            yield BrowserPage(connection)
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
    raise AssertionError(f"{CHROMIUM} did not start; see {profile.parent / 'chromium.log'}")
