"""What git says of this project's checkout: its commit, and the files that it tracks.

Git can be missing, refuse a folder that another user owns, or find a repository broken. Each has
its message here; none of them is taken for "no commit".
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from rcot_rl.errors import InputError

VARIABLE = "RCOT_COMMIT"
"""The commit of code that was copied without its repository: a launcher sets it."""
CHECKOUT = Path(__file__).resolve().parents[1]
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
"""Variables of a hook that would make git look at another repository."""


def is_checkout(folder: Path = CHECKOUT) -> bool:
    """Return True if the folder is one that git made, whether or not git can read it."""
    return (folder / ".git").exists()


def commit_of(checkout: Path = CHECKOUT) -> str:
    """The commit, with `+` when tracked files differ from it. Raises InputError."""
    head = _git(checkout, "rev-parse", "--verify", "HEAD").decode().strip()
    changed = _git(checkout, "status", "--porcelain", "-uno").strip()
    return head + ("+" if changed else "")


def tracked_files(checkout: Path = CHECKOUT) -> list[Path]:
    """The files that git tracks there. Raises InputError."""
    names = _git(checkout, "ls-files", "-z", "--cached").split(b"\0")
    paths = [checkout / os.fsdecode(name) for name in names if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def _git(checkout: Path, *words: str) -> bytes:
    if not is_checkout(checkout):  # git would look for one in the folders above
        raise InputError("is no git checkout (it has no .git)", file=checkout)
    environment = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, env=environment)
    except FileNotFoundError as error:
        raise InputError("git is not on PATH on this host: install it", file=checkout) from error
    except OSError as error:
        raise InputError(f"git does not start: {error.strerror}", file=checkout) from error
    if done.returncode != 0:
        raise InputError(_reason(done.stderr.decode(errors="replace"), checkout), file=checkout)
    return done.stdout


def _reason(text: str, checkout: Path) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = (lines[0] if lines else "nothing").removeprefix("fatal: ").removeprefix("error: ")
    if "dubious ownership" in said:
        return (
            f"git says: {said}: the folder is another user's; to allow it: "
            f"git config --global --add safe.directory {shlex.quote(str(checkout))}"
        )
    if "Needed a single revision" in said:
        return "git finds no commit in it; if there should be one, clone it again"
    return f"git says: {said[:300]}; if the repository is broken, clone it again"
