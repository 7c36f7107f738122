"""Folders in which runs share corpora, texts and shards (`data.store`).

    STORE/corpora-<hash>/<layout>      toy corpora; hash of `toy`
    STORE/texts-<hash>/                descriptions and traces by a model; hash of the data settings
    STORE/shards-<hash>/<set>/         shard sets; the same hash

A run's folder has relative links to them, so that a folder with a store and its runs can be moved.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe

_APART = ("name", "stages", "eval", "report", "cluster", "wandb", "tracking")
"""Sections of the recipe that the data stage does not read."""
_LOCK = ".lock"


@contextlib.contextmanager
def shared_data(recipe: Recipe, root: Path) -> Iterator[None]:
    """Link the run folder `root` to `data.store`, and keep other runs out of it meanwhile.

    Another run that builds in the same store is waited for. Does nothing without a store.

    Raises:
        InputError: The run already has data of its own, or of another store.
    """
    if recipe.data.store is None:
        yield
        return
    store = Path(recipe.data.store).resolve()
    store.mkdir(parents=True, exist_ok=True)
    with (store / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, folder in store_folders(recipe, store).items():
            folder.mkdir(exist_ok=True)
            _link(root / name, folder)
        yield


def store_folders(recipe: Recipe, store: Path) -> dict[str, Path]:
    """Return the folder in the store for each of the run's folders `corpora`, `texts`, `shards`."""
    settings = _hash(_data_settings(recipe))
    folders = {name: store / f"{name}-{settings}" for name in ("texts", "shards")}
    if recipe.toy is not None:
        folders["corpora"] = store / f"corpora-{_hash(recipe.toy.model_dump(mode='json'))}"
    return folders


def _data_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what texts and shards may depend on; rather too much than too little."""
    values = recipe.model_dump(mode="json", exclude=set(_APART))
    for key in ("store", "workers"):
        del values["data"][key]
    del values["predict"]["variants"]
    if recipe.data.seed is not None:
        del values["seed"]
    values["train"] = list(values["train"].items())
    return values


def _hash(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _link(link: Path, folder: Path) -> None:
    if not link.is_symlink() and not link.exists():
        link.symlink_to(os.path.relpath(folder, link.parent))
    elif link.resolve() != folder.resolve():
        raise InputError(
            f"exists, and data.store would put it in {folder}; remove data.store, or choose "
            "another run folder with --out",
            file=link,
        )
