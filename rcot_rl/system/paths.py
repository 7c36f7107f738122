"""Which of a user's paths are refused, and why.

Our code uses a path as it is written. Other packages do not: `datasets` and vLLM read `*`, `?` and
`[` as a pattern and then open files of other folders, fsspec splits at `::`, `datasets` and
OmegaConf expand `$NAME` and `${name}`. Such a path is refused before anything starts.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from rcot_rl.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}:/")
"""Matches one slash too: `pathlib` merges the two slashes of a URL."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INTERPRETED = re.compile(r"::|[*?\[]|\$[\w{]")
"""The last alternative is a variable of the environment or of OmegaConf."""
_REWARD_MODULE = "pkg://"


def path_fault(path: str | os.PathLike[str], *, handed_on: bool = False) -> str | None:
    """Return what is wrong with a path as it is written, or None.

    Args:
        path: The path as the user gave it.
        handed_on: True for run folders, shards, models, rewards and prompts: packages that
            interpret parts of a path get them.
    """
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8; rename it"
    if _URL.match(text):
        return "is a URL; only files and folders of this host can be read and written"
    first = text.split("/", 1)[0]
    if first == "~" or (first.startswith("~") and os.path.expanduser(first) != first):
        return f"only a shell expands '{first}'; write the full path, or ./{first}"
    if handed_on:
        control = _CONTROL.search(text)
        if control is not None:
            return (
                f"the path contains the control character {control[0]!a}; rename the folder or file"
            )
        marks = list(dict.fromkeys(_INTERPRETED.findall(text)))
        if marks:
            listed = " and ".join(f"'{mark}'" for mark in marks)
            return (
                f"the path contains {listed}, which datasets, fsspec, vLLM or OmegaConf would "
                "interpret; rename the folder or file"
            )
    return None


def check_path(path: str | os.PathLike[str], *, handed_on: bool = False) -> None:
    """Raise InputError for a path that a package would interpret, as written or resolved."""
    for form in (os.fspath(path), os.path.realpath(path)):
        fault = path_fault(form, handed_on=handed_on)
        if fault is not None:
            raise InputError(fault, file=form)


def _literal(text: str) -> str:
    return _accepted(text, handed_on=False)


def _handed_on(text: str) -> str:
    return text if text.startswith(_REWARD_MODULE) else _accepted(text, handed_on=True)


def _accepted(text: str, *, handed_on: bool) -> str:
    fault = path_fault(text, handed_on=handed_on)
    if fault is not None:
        raise ValueError(fault)
    return text


PathText = Annotated[str, AfterValidator(_literal)]
"""A recipe path that only our own code opens."""

HandedOnPath = Annotated[str, AfterValidator(_handed_on)]
"""A recipe path that verl, vLLM or `datasets` opens too."""
