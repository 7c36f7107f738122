"""The trackers that a recipe names, and a user's own: `FILE.py:CLASS`.

    python -m rcot_rl.monitoring.trackers.tracker_choice FILE.py:CLASS

loads a user's tracker and exits with status 2 and one line if it is unusable. The preflight runs
it, so that a command never executes a tracker's code itself.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.tracker import Tracker
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.tracking_section import TRACKING, WandbSection

WANDB = {"offline": "wandb-offline", "online": "wandb"}
"""`wandb.mode` -> tracker."""
TENSORBOARD = "tensorboard"
KEY = "tracking.others"
MODULE = "rcot_rl.monitoring.trackers.tracker_choice"
"""This module: as `__main__` it has another name."""
_CLASS = re.compile(r"[A-Za-z_]\w{0,100}")


def choices(recipe: Recipe) -> list[str]:
    """Return the trackers of a recipe: `wandb`, `wandb-offline`, `tensorboard`, `FILE.py:CLASS`."""
    built_in = [WANDB[recipe.wandb.mode]] if recipe.wandb.mode in WANDB else []
    built_in += [TENSORBOARD] if recipe.tracking.tensorboard else []
    return built_in + recipe.tracking.others


def name_of(choice: str) -> str:
    """Return the name of a tracker's files in RUN/tracking: the choice, or a user's class."""
    return choice.rpartition(":")[2]


def source_of(choice: str) -> tuple[Path, str]:
    """Return the file and the class of a user's tracker. Raises InputError."""
    file, colon, name = choice.rpartition(":")
    if not colon or not file.endswith(".py") or not _CLASS.fullmatch(name):
        raise InputError(f"{choice!r} is not FILE.py:CLASS", key=KEY)
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("no such file", file=path, key=KEY)
    return path.resolve(), name


def make_tracker(choice: str, reader: RunReader) -> Tracker:
    """Return a new tracker. Raises InputError if a user's tracker cannot be loaded."""
    if choice == TENSORBOARD:
        from rcot_rl.monitoring.trackers.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker()
    for mode, name in WANDB.items():
        if choice == name:
            from rcot_rl.monitoring.trackers.wandb_tracker import WandbTracker

            section = reader.recipe.wandb if reader.recipe is not None else WandbSection()
            section = section.model_copy(update={"mode": mode})
            return WandbTracker(section, reader.root.resolve() / TRACKING / "wandb")
    return user_tracker(choice)


def user_tracker(choice: str) -> Tracker:
    """Load the module of a user's tracker, and return an instance of its class.

    Raises:
        InputError: It cannot be loaded, or is no complete tracker.
    """
    path, name = source_of(choice)
    spec = importlib.util.spec_from_file_location(f"rcot_tracker_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None)
        text = f"cannot be loaded: {type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(text, file=path, line=line) from error
    loaded = getattr(module, name, None)
    if not inspect.isclass(loaded) or not issubclass(loaded, Tracker):
        text = f"{name} is not a subclass of rcot_rl.monitoring.trackers.tracker.Tracker"
        raise InputError(text, file=path)
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    missing += [] if isinstance(getattr(loaded, "label", None), str) else ["label"]
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}", file=path)
    try:
        return loaded()
    except (Exception, SystemExit) as error:
        text = f"{name}() fails: {type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(text, file=path) from error


def main() -> int:
    """Check a user's tracker. Returns the exit status."""
    logging.disable(logging.CRITICAL)
    try:
        user_tracker(sys.argv[1])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
