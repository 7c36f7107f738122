"""The one rule for paths that a user gives: which names are refused, and why.

Our own code takes a path as it is written. Packages that get some of them do not: `datasets` and
vLLM read `*`, `?` and `[` as a pattern and then open other folders' files, fsspec splits at `::`,
`datasets` and OmegaConf expand `$NAME` and `${name}`. Such a path is refused before anything
starts.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from rcot_rl.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}:/")
"""Also what `pathlib` makes of a URL, with one slash."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INTERPRETED = re.compile(r"::|[*?\[]|\$[\w{]")
"""The last one is a variable: of the environment, or of OmegaConf."""
_REWARD_MODULE = "pkg://"


def path_fault(path: str | os.PathLike[str], *, handed_on: bool = False) -> str | None:
    """What is wrong with a path as it is written; None if nothing is.

    Args:
        path: The path as the user gave it.
        handed_on: Whether packages get it that interpret more than the file system does: run
            folders, shards, models, rewards and prompts.
    """
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8; rename it"
    if _URL.match(text):
        return "is a URL; only folders and files of this host's file systems are read and written"
    first = text.split("/", 1)[0]
    if first == "~" or (first.startswith("~") and os.path.expanduser(first) != first):
        return f"'{first}' is expanded by a shell only; write the folder out, or ./{first}"
    if handed_on:
        control = _CONTROL.search(text)
        if control is not None:
            return f"the path holds the control character {control[0]!a}; rename the folder or file"
        held = list(dict.fromkeys(_INTERPRETED.findall(text)))
        if held:
            signs = " and ".join(f"'{sign}'" for sign in held)
            return (
                f"the path holds {signs}, which datasets, fsspec, vLLM or OmegaConf would "
                "interpret; rename the folder or file"
            )
    return None


def check_path(
    path: str | os.PathLike[str], *, key: str | None = None, handed_on: bool = False
) -> None:
    """Refuse a path that something would interpret, as written or with its links resolved.

    Args:
        path: The path; a relative one counts from the working directory.
        key: The recipe key or option that gave it.
        handed_on: As in `path_fault`.

    Raises:
        InputError: Names the path and the characters.
    """
    for form in (os.fspath(path), os.path.realpath(path)):
        fault = path_fault(form, handed_on=handed_on)
        if fault is not None:
            raise InputError(fault, file=form, key=key)


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
"""A recipe's path that only our own code opens."""

HandedOnPath = Annotated[str, AfterValidator(_handed_on)]
"""A recipe's path that verl, vLLM or `datasets` get too."""
