"""Toy corpora on disk, in the five public layouts: `rcot data toy`.

    write_corpus   one split of one layout
    write_layout   the training and evaluation splits of one layout
    write_all      every layout, each in a folder of its own
    summarise      what a corpus holds

A split is made in a hidden temporary folder and then moved to its place. `toy.json` at the corpus'
root holds what every split was made from, so that the same one is not made again, and what
the templates of `traces/trace_files.py` need to know. Bytes follow from (seed, layout, split,
preset, number of sentences) and the clip's index alone. Leaves out archives and the folders of the
original DAVIS release.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.parallel import ordered_map
from data_pipelines.toy.arguments import LAYOUT_SPLITS, checked_split
from data_pipelines.toy.clips import SINGLE_TARGET, ClipSpec, draw_clip
from data_pipelines.toy.metadata import WRITERS, Split, paths_of
from data_pipelines.toy.sidecar import SIDECAR, merged, read_sidecar, summarise
from data_pipelines.toy.writers import Paths, Record, save_json, write_clip
from rcot_rl.errors import InputError
from rcot_rl.files import writing
from rcot_rl.suggestions import did_you_mean

__all__ = ["LAYOUT_SPLITS", "summarise", "write_all", "write_corpus", "write_layout"]


def write_corpus(
    root: Path | str,
    layout: str,
    split: str,
    n_videos: int,
    seed: int,
    preset: str,
    queries_per_video: int = 4,
    absent_share: float = 0.0,
    workers: int = 1,
    multi_share: float | None = None,
) -> dict[str, int]:
    """Writes one split below `root` and returns {"videos", "frames", "expressions", "objects"}.

    A split already there, made from the same arguments, stays as it is. Ref-YouTube-VOS `valid`
    also has, as published, videos of the `test` file, which are not evaluated (one to every two)
    and are not counted. ReasonVOS has one nameless split; `valid` and `test` are both it. MeViS
    also has `valid`, without masks.

    preset: of `scenes.PRESETS`. queries_per_video: fewer where a scene has no more; Ref-DAVIS17
    always has four an object. absent_share: share of sentences without a target; MeViS and ReVOS
    only. multi_share: share of sentences drawn to speak of several targets (None: about two of
    five come out so), there only too. workers: processes; bytes do not depend on it.
    Raises InputError for arguments out of range and for a place taken by something else.
    """
    split = checked_split(
        layout, split, n_videos, seed, preset, queries_per_video, absent_share, multi_share
    )
    root = Path(root).resolve()
    made_from = {
        "preset": preset,
        "seed": seed,
        "n_videos": n_videos,
        "queries_per_video": queries_per_video,
        "absent_share": absent_share,
        "multi_share": multi_share,
    }
    sidecar = read_sidecar(root, layout)
    if sidecar is not None and split in sidecar["splits"]:
        return _reuse(root, sidecar, split, made_from)
    _stop_if_taken(root, layout, split, sidecar is not None)
    spec = ClipSpec(layout, split, seed, preset, queries_per_video, absent_share, multi_share)
    with writing(root):
        # Beside the corpus, or in it where it is there: it may be on a file system of its own.
        above = root if root.is_dir() else root.parent
        above.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.{split}.", dir=above))
        try:
            summary = _write(temporary, root, spec, n_videos, workers, sidecar, made_from)
            _publish(temporary, root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return summary


def write_layout(
    root: Path | str,
    layout: str,
    seed: int,
    preset: str,
    n_videos: int,
    n_eval: int | None = None,
    queries_per_video: int = 4,
    absent_share: float = 0.0,
    workers: int = 1,
) -> dict[str, dict[str, int]]:
    """Writes the splits of one layout into `root`: `n_videos` clips to train on, `n_eval` to
    evaluate on (None: a fifth of them, at least one). Returns split -> `write_corpus`'s summary.
    """
    if layout not in LAYOUT_SPLITS:
        hint = did_you_mean(layout, LAYOUT_SPLITS)
        raise InputError(f"unknown layout{hint} (known: {', '.join(LAYOUT_SPLITS)})", key=layout)
    n_eval = max(1, n_videos // 5) if n_eval is None else n_eval
    return {
        split: write_corpus(
            root,
            layout,
            split,
            n_videos if split == "train" else n_eval,
            seed,
            preset,
            queries_per_video,
            absent_share,
            workers,
        )
        for split in LAYOUT_SPLITS[layout]
    }


def write_all(
    root: Path | str,
    seed: int,
    preset: str,
    n_videos: int,
    n_eval: int | None = None,
    queries_per_video: int = 4,
    absent_share: float = 0.0,
    workers: int = 1,
) -> dict[str, dict[str, dict[str, int]]]:
    """Writes `root`/<layout> for all layouts, as `write_layout`. absent_share: MeViS and ReVOS.

    Returns layout -> split -> summary.
    """
    return {
        layout: write_layout(
            Path(root) / layout,
            layout,
            seed,
            preset,
            n_videos,
            n_eval,
            queries_per_video,
            0.0 if layout in SINGLE_TARGET else absent_share,
            workers,
        )
        for layout in LAYOUT_SPLITS
    }


def _reuse(
    root: Path, sidecar: Mapping[str, Any], split: str, made_from: Mapping[str, Any]
) -> dict[str, int]:
    found = sidecar["splits"][split]
    other = [k for k, v in made_from.items() if found.get(k) != v]
    if other:
        differences = ", ".join(f"{k} {found.get(k)} there, {made_from[k]} asked" for k in other)
        raise InputError(
            f"holds another {split} split ({differences}); choose another folder or remove it",
            file=root,
        )
    return dict(found["summary"])


def _stop_if_taken(root: Path, layout: str, split: str, known: bool) -> None:
    """Refuses to write among files that no toy.json accounts for."""
    if root.exists() and not root.is_dir():
        raise InputError("is not a folder", file=root)
    if not known and root.is_dir() and any(p.name[0] != "." for p in root.iterdir()):
        raise InputError(f"is not empty, and holds no {SIDECAR} of a toy corpus", file=root)
    for name in paths_of(layout, split).own:
        if (root / name).exists():
            raise InputError(f"is in the way of the {split} split", file=root / name)


def _write(
    temporary: Path,
    root: Path,
    spec: ClipSpec,
    n_videos: int,
    workers: int,
    sidecar: Mapping[str, Any] | None,
    made_from: Mapping[str, Any],
) -> dict[str, int]:
    """Writes clips, metadata and toy.json below `temporary`; returns the summary."""
    records = _clips(temporary, spec, n_videos, workers)
    hidden: list[Record] = []
    if (spec.layout, spec.split) == ("ref-youtube-vos", "valid"):
        test = ClipSpec(spec.layout, "test", spec.seed, spec.preset, spec.queries, 0.0)
        hidden = _clips(temporary, test, (n_videos + 1) // 2, workers)
    WRITERS[spec.layout](Split(temporary, root, spec.layout, spec.split), records, hidden)
    summary = {
        "videos": len(records),
        "frames": sum(len(r.clip.frames) for r in records),
        "expressions": sum(len(r.clip.expressions) for r in records),
        "objects": sum(len(r.clip.scene.objects) for r in records),
    }
    document = merged(sidecar, spec, {**made_from, "summary": summary}, records, hidden)
    save_json(temporary / SIDECAR, document)
    return summary


def _clips(root: Path, spec: ClipSpec, n: int, workers: int) -> list[Record]:
    paths = paths_of(spec.layout, spec.split)
    one = partial(_clip, root, spec, paths)
    return list(ordered_map(one, range(n), workers))


def _clip(root: Path, spec: ClipSpec, paths: Paths, index: int) -> Record:
    return write_clip(root, spec.layout, paths, draw_clip(spec, index))


def _publish(temporary: Path, root: Path) -> None:
    """Moves what is in `temporary` into `root`; toy.json last, since it says what is there."""
    temporary.chmod(0o777 & ~_umask())
    if not root.exists():
        os.replace(temporary, root)
        return
    for path in sorted(temporary.iterdir(), key=lambda p: (p.name == SIDECAR, p.name)):
        _move(path, root / path.name)


def _move(source: Path, target: Path) -> None:
    """Renames, or, where a folder is already there, moves its members into it."""
    if source.is_dir() and target.is_dir():
        for path in sorted(source.iterdir()):
            _move(path, target / path.name)
    else:
        os.replace(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
