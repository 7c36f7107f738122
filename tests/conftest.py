"""Fixtures that tests of several rooms share.

Most are functions: test modules cannot import one another, so a helper of several files is a
fixture that returns it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rcot_rl.system import disk
from rcot_rl.system.logs import LOGGERS

CHECKOUT = Path(__file__).resolve().parents[1]


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
