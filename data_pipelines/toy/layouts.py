"""Write toy corpora in the five public layouts (`rcot data toy`).

A split is made in a hidden temporary folder and then moved into place. `toy.json` at the corpus'
root records the arguments of every split, so that an equal one is not made again, and what the
templates of `traces/toy_templates.py` need. The bytes depend on (seed, layout, split, preset,
number of expressions) and the clip's index alone. Archives and the original DAVIS folders are out
of scope.
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
from data_pipelines.toy.arguments import LAYOUT_SPLITS, check_layout, checked_split
from data_pipelines.toy.clips import SINGLE_TARGET, ClipSpec, draw_clip
from data_pipelines.toy.sidecar import SIDECAR, merged, read_sidecar
from data_pipelines.toy.split_files import WRITERS, SplitTarget, ValidLabels, paths_of
from data_pipelines.toy.writers import ClipRecord, SplitPaths, save_json, write_clip
from rcot_rl.errors import InputError
from rcot_rl.system.files import writing

__all__ = ["LAYOUT_SPLITS", "write_all", "write_corpus", "write_layout"]


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
    valid_labels: ValidLabels = "meta",
) -> dict[str, int]:
    """Write one split below `root`; an existing split of the same arguments is kept.

    Ref-YouTube-VOS `valid` also has, as published, videos of the `test` file (one for every two),
    which are not evaluated and not counted. ReasonVOS has one unnamed split: `valid` and `test`
    both name it. MeViS also has `valid`, without masks. Raises InputError.

    Args:
        preset: One of `scenes.PRESETS`.
        queries_per_video: Maximum number of expressions; Ref-DAVIS17 always has four per object.
        absent_share: Share of expressions without a target; MeViS and ReVOS only.
        workers: Processes; the bytes do not depend on it.
        multi_share: Share of expressions drawn to have several targets; MeViS and ReVOS only.
            None: about two of five.
        valid_labels: Layout of the masks of Ref-YouTube-VOS `valid`.

    Returns:
        The numbers of "videos", "frames", "expressions" and "objects".
    """
    split = checked_split(
        layout, split, n_videos, seed, preset, queries_per_video, absent_share, multi_share
    )
    root = Path(root).resolve()
    made_from: dict[str, Any] = {
        "preset": preset,
        "seed": seed,
        "n_videos": n_videos,
        "queries_per_video": queries_per_video,
        "absent_share": absent_share,
        "multi_share": multi_share,
    }
    if (layout, split) == ("ref-youtube-vos", "valid"):
        made_from["valid_labels"] = valid_labels
    sidecar = read_sidecar(root, layout)
    if sidecar is not None and split in sidecar["splits"]:
        return _reuse(root, sidecar, split, made_from)
    _stop_if_taken(root, layout, split, sidecar is not None)
    spec = ClipSpec(layout, split, seed, preset, queries_per_video, absent_share, multi_share)
    with writing(root):
        # in or beside the corpus, so that moving stays on one file system
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
    **options: Any,
) -> dict[str, dict[str, int]]:
    """Write the training and evaluation splits of one layout into `root`.

    Args:
        n_videos: Clips of the training split.
        n_eval: Clips of the evaluation split; None: a fifth of `n_videos`, at least one.
        options: Further arguments of `write_corpus`.

    Returns:
        split -> the summary of `write_corpus`.
    """
    check_layout(layout)
    n_eval = max(1, n_videos // 5) if n_eval is None else n_eval
    counts = {s: n_videos if s == "train" else n_eval for s in LAYOUT_SPLITS[layout]}
    return {
        split: write_corpus(root, layout, split, count, seed, preset, **options)
        for split, count in counts.items()
    }


def write_all(
    root: Path | str,
    seed: int,
    preset: str,
    n_videos: int,
    absent_share: float = 0.0,
    **options: Any,
) -> dict[str, dict[str, dict[str, int]]]:
    """Write `root`/<layout> for all layouts; layout -> the result of `write_layout`.

    Args:
        absent_share: Applies to MeViS and ReVOS.
        options: Further arguments of `write_layout`.
    """
    shares = {layout: 0.0 if layout in SINGLE_TARGET else absent_share for layout in LAYOUT_SPLITS}
    return {
        layout: write_layout(
            Path(root) / layout, layout, seed, preset, n_videos, absent_share=share, **options
        )
        for layout, share in shares.items()
    }


def _reuse(
    root: Path, sidecar: Mapping[str, Any], split: str, made_from: Mapping[str, Any]
) -> dict[str, int]:
    existing = {"valid_labels": "meta", **sidecar["splits"][split]}
    other = [k for k, v in made_from.items() if existing.get(k) != v]
    if other:
        differences = ", ".join(f"{k} is {existing.get(k)}, not {made_from[k]}" for k in other)
        raise InputError(
            f"holds another {split} split ({differences}); choose another folder or remove it",
            file=root,
        )
    return dict(existing["summary"])


def _stop_if_taken(root: Path, layout: str, split: str, known: bool) -> None:
    """Refuse to write among files that do not belong to this toy corpus."""
    if root.exists() and not root.is_dir():
        raise InputError("is not a folder", file=root)
    if not known and root.is_dir() and any(p.name[0] != "." for p in root.iterdir()):
        raise InputError(f"is not empty and has no {SIDECAR} of a toy corpus", file=root)
    for name in paths_of(layout, split).parts:
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
    """Write clips, metadata and toy.json below `temporary`; return the summary."""
    records = _clips(temporary, spec, n_videos, workers)
    hidden: list[ClipRecord] = []
    if (spec.layout, spec.split) == ("ref-youtube-vos", "valid"):
        test = ClipSpec(spec.layout, "test", spec.seed, spec.preset, spec.queries, 0.0)
        hidden = _clips(temporary, test, (n_videos + 1) // 2, workers)
    valid_labels = made_from.get("valid_labels", "meta")
    target = SplitTarget(temporary, root, spec.layout, spec.split, valid_labels)
    WRITERS[spec.layout](target, records, hidden)
    summary = {
        "videos": len(records),
        "frames": sum(len(r.clip.frames) for r in records),
        "expressions": sum(len(r.clip.expressions) for r in records),
        "objects": sum(len(r.clip.scene.objects) for r in records),
    }
    document = merged(sidecar, spec, {**made_from, "summary": summary}, records, hidden)
    save_json(temporary / SIDECAR, document)
    return summary


def _clips(root: Path, spec: ClipSpec, n: int, workers: int) -> list[ClipRecord]:
    paths = paths_of(spec.layout, spec.split)
    one = partial(_clip, root, spec, paths)
    return list(ordered_map(one, range(n), workers))


def _clip(root: Path, spec: ClipSpec, paths: SplitPaths, index: int) -> ClipRecord:
    return write_clip(root, spec.layout, paths, draw_clip(spec, index))


def _publish(temporary: Path, root: Path) -> None:
    """Move the contents of `temporary` into `root`; toy.json last, because it lists the splits."""
    temporary.chmod(0o777 & ~_umask())
    if not root.exists():
        os.replace(temporary, root)
        return
    for path in sorted(temporary.iterdir(), key=lambda p: (p.name == SIDECAR, p.name)):
        _move(path, root / path.name)


def _move(source: Path, target: Path) -> None:
    """Rename; if both are folders, move the members instead."""
    if source.is_dir() and target.is_dir():
        for path in sorted(source.iterdir()):
            _move(path, target / path.name)
    else:
        os.replace(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
