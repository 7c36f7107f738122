"""The project's git checkout: its commit and its tracked files.

A missing git, a folder owned by another user and a broken repository each have their own message;
none of them counts as "no commit".
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from rcot_rl.errors import InputError

VARIABLE = "RCOT_COMMIT"
"""Commit of code that was copied without its repository; set by a launcher."""
CHECKOUT = Path(__file__).resolve().parents[2]
_REDIRECTS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
"""Variables, set in git hooks, that point git at another repository."""


def is_checkout(folder: Path = CHECKOUT) -> bool:
    """Return True if the folder has a `.git`, whether or not git can read it."""
    return (folder / ".git").exists()


def commit_of(checkout: Path = CHECKOUT) -> str:
    """Return the commit, followed by `+` if tracked files differ from it. Raises InputError."""
    head = _git(checkout, "rev-parse", "--verify", "HEAD").decode().strip()
    changed = _git(checkout, "status", "--porcelain", "-uno").strip()
    return head + ("+" if changed else "")


def tracked_files(checkout: Path = CHECKOUT) -> list[Path]:
    """Return the tracked files that exist, without symbolic links. Raises InputError."""
    names = _git(checkout, "ls-files", "-z", "--cached").split(b"\0")
    paths = [checkout / os.fsdecode(name) for name in names if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def _git(checkout: Path, *arguments: str) -> bytes:
    if not is_checkout(checkout):  # git would search the parent folders
        raise InputError("is not a git checkout (it has no .git)", file=checkout)
    environment = {k: v for k, v in os.environ.items() if k not in _REDIRECTS} | {"LC_ALL": "C"}
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, env=environment
        )
    except FileNotFoundError as error:
        raise InputError("git is not on PATH on this host: install it", file=checkout) from error
    except OSError as error:
        raise InputError(f"git does not start: {error.strerror}", file=checkout) from error
    if result.returncode != 0:
        raise InputError(_reason(result.stderr.decode(errors="replace"), checkout), file=checkout)
    return result.stdout


def _reason(stderr: str, checkout: Path) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    message = (lines[0] if lines else "no message").removeprefix("fatal: ").removeprefix("error: ")
    if "dubious ownership" in message:
        return (
            f"git fails: {message}: another user owns the folder; to allow it: "
            f"git config --global --add safe.directory {shlex.quote(str(checkout))}"
        )
    if "Needed a single revision" in message:
        return "the repository has no commit; if it should have one, clone it again"
    return f"git fails: {message[:300]}; if the repository is broken, clone it again"
