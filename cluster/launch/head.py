"""What the head of a cluster runs: the health check, then the run in its place.

    python -m cluster.launch.head [--rendezvous DIR] [--chdir DIR] HEALTH-OPTIONS -- COMMAND …

All launchers that start a cluster end here. COMMAND is a list of words, never a shell's line; it
takes this process' place, so that signals reach it and its status is the job's.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from cluster.launch import health, rendezvous
from rcot_rl import variables
from rcot_rl.errors import InputError


def main() -> NoReturn:
    """Exit status: COMMAND's; 2 when the cluster cannot carry a run."""
    variables.settle()
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    health.add_arguments(parser)
    parser.add_argument("--rendezvous", type=Path, help="where a launcher's nodes met")
    parser.add_argument("--chdir", type=Path, help="where COMMAND starts; this code comes along")
    args, command = parser.parse_args(given[:cut]), given[cut + 1 :]
    if not command:
        parser.error("no command after --")
    _find_token()
    if args.rendezvous is not None:
        try:
            found = rendezvous.address(args.rendezvous, time.monotonic() + args.wait)
            _await_ray(found, time.monotonic() + args.wait)
        except InputError as error:
            print(f"rcot: {error}", file=sys.stderr)
            sys.exit(2)
        os.environ["RAY_ADDRESS"] = found["address"]
    if args.chdir is not None:
        _move(args.chdir)
    # a process of its own: the run must not inherit its connection to Ray
    status = _checked([sys.executable, "-m", "cluster.launch.health", *_health_words(given[:cut])])
    if status != 0:
        sys.exit(status)
    os.execvp(command[0], command)


def _find_token() -> None:
    """Ray's own rule, but for a token in the environment alone: without any, there is none."""
    if any(os.environ.get(k) for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")):
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_MODE"] = "token"
    elif not (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "disabled"


def _move(folder: Path) -> None:
    code = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"rcot: launch.workdir: {folder} on the head: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONPATH"] = code


def _checked(words: list[str]) -> int:
    child = subprocess.Popen(words)
    ends = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda *_: (child.terminate(), sys.exit(143))) for n in ends}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return status


def _await_ray(found: dict[str, object], deadline: float) -> None:
    ip, port = str(found["ip"]), int(str(found["port"]))
    while not rendezvous.answers(ip, port):
        if time.monotonic() > deadline:
            raise InputError(f"Ray's head does not answer at {found['address']}")
        time.sleep(0.5)


def _health_words(words: list[str]) -> list[str]:
    """Without this module's own options, which come as `--name=value` or as two words."""
    out, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in ("--rendezvous", "--chdir"):
            skip = not equals
        else:
            out.append(word)
    return out


if __name__ == "__main__":
    main()
