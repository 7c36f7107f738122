"""Check a cluster's health on its head, and then become the run.

    python -m cluster.launch.head [--rendezvous DIR] [--chdir DIR] HEALTH-OPTIONS -- COMMAND …

All launchers that start a cluster end here. COMMAND is a list of words, never a shell's line; it
replaces this process, so that signals reach it and its status is the job's.
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
from rcot_rl.errors import InputError
from rcot_rl.system import variables


def main() -> NoReturn:
    """Exit with the command's status; 2 if the cluster is not fit for a run."""
    variables.settle()
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    health.add_arguments(parser)
    parser.add_argument("--rendezvous", type=Path, help="folder in which the nodes met")
    parser.add_argument("--chdir", type=Path, help="working folder of COMMAND")
    args, command = parser.parse_args(given[:cut]), given[cut + 1 :]
    if not command:
        parser.error("no command after --")
    _find_token()
    if args.rendezvous is not None:
        try:
            choice = rendezvous.address(args.rendezvous, time.monotonic() + args.wait)
            rendezvous.await_ray(choice, time.monotonic() + args.wait)
        except InputError as error:
            print(f"rcot: {error}", file=sys.stderr)
            sys.exit(2)
        os.environ["RAY_ADDRESS"] = choice["address"]
    if args.chdir is not None:
        _change_folder(args.chdir)
    # a separate process: the run must not inherit its connection to Ray
    options = _health_words(given[:cut])
    status = _run_check([sys.executable, "-m", "cluster.launch.health", *options])
    if status != 0:
        sys.exit(status)
    os.execvp(command[0], command)


def _find_token() -> None:
    """Set RAY_AUTH_MODE by Ray's rule: a token if there is one in the environment or in ~/.ray."""
    if any(os.environ.get(k) for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")):
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_MODE"] = "token"
    elif not (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "disabled"


def _change_folder(folder: Path) -> None:
    """Change to `folder`; modules of the current folder stay importable."""
    code = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"rcot: launch.workdir: {folder} on the head: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONPATH"] = code


def _run_check(words: list[str]) -> int:
    """Run the health check, which ends with this process. Returns its exit status."""
    child = subprocess.Popen(words)

    def stop(*_: object) -> NoReturn:
        child.terminate()
        sys.exit(143)

    handlers = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGHUP)}
    status = child.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status


def _health_words(words: list[str]) -> list[str]:
    """Remove this module's options, which are `--name=value` or two words."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in ("--rendezvous", "--chdir"):
            skip = not equals
        else:
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
