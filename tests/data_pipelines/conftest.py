"""Tiny corpora in the public layouts, with the masks that they were drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import Image

# An example may be slow on a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

SaveJson = Callable[[Path, object], None]
EncodeRle = Callable[[np.ndarray], dict | None]

HEIGHT, WIDTH, FRAMES, OBJECTS = 36, 52, 6, 3
NAMES = ("red circle", "blue square", "green star")


@dataclass
class Drawn:
    """The ground truth of a corpus."""

    root: Path
    masks: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """video -> object id -> bool [T, H, W]"""
    frames: dict[str, list[str]] = field(default_factory=dict)
    sentences: dict[str, dict[str, tuple[str, list[str]]]] = field(default_factory=dict)
    """video -> expression id -> (text, object ids)"""


def draw_masks(rng: np.random.Generator) -> np.ndarray:
    """Return bool [OBJECTS, T, H, W]: disjoint masks; each object is hidden in some frames."""
    label = np.zeros((FRAMES, HEIGHT, WIDTH), dtype=np.uint8)
    for k in range(1, OBJECTS + 1):
        seen = rng.permutation(FRAMES)[: rng.integers(2, FRAMES - 1)]
        for t in seen:
            y, x = rng.integers(0, HEIGHT - 12), rng.integers(0, WIDTH - 14)
            h, w = rng.integers(4, 13), rng.integers(4, 15)
            patch = rng.random((h, w)) < 0.9
            label[t, y : y + h, x : x + w][patch] = k
    return np.stack([label == k for k in range(1, OBJECTS + 1)])


def _sentences(objects: list[str], multi: bool) -> dict[str, tuple[str, list[str]]]:
    out = {str(i): (f"the {NAMES[i]}", [o]) for i, o in enumerate(objects)}
    if multi:
        out["3"] = ("both of <image> them", [objects[1], objects[0]])
        out["4"] = ("all", list(reversed(objects)))
        out["5"] = ("the purple one", [])
    return out


def _save_png(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label, mode="P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200] + [9] * (252 * 3))
    image.save(path)


def _frames(drawn: Drawn, folder: Path, video: str, rng: np.random.Generator) -> None:
    for stem in drawn.frames[video]:
        path = folder / video / f"{stem}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def make_corpus(
    root: Path,
    layout: str,
    split: str,
    n_videos: int,
    seed: int,
    save_json: SaveJson,
    coco_rle: EncodeRle,
) -> Drawn:
    """Write a corpus; with expressions of several or no targets where the layout allows them."""
    rng = np.random.default_rng([seed, len(layout)])
    drawn = Drawn(root)
    step = 5 if layout == "ref-youtube-vos" else 1
    for v in range(n_videos):
        video = f"UVO/all/{layout}-{v:03d}" if layout == "revos" else f"{layout}-{v:03d}"
        first = 0 if layout in ("mevis", "revos") else 1
        # Two-digit ids: ascending is by number, not by text.
        objects = [str(first), str(first + 1), "10"]
        masks = draw_masks(rng)
        drawn.masks[video] = dict(zip(objects, masks, strict=True))
        drawn.frames[video] = [f"{t * step:05d}" for t in range(FRAMES)]
        drawn.sentences[video] = _sentences(objects, layout in ("mevis", "revos"))
    if layout in ("ref-youtube-vos", "davis17"):
        _write_labels(drawn, split, rng, save_json)
    elif layout == "reasonvos":
        _write_reasonvos(drawn, rng, save_json)
    else:
        _write_rle(drawn, layout, split, rng, save_json, coco_rle)
    sidecar = {
        video: {
            "description": f"a clip of {video}",
            "objects": {o: {"name": n} for o, n in zip(masks, NAMES, strict=True)},
            "order": [list(masks)[i] for i in (2, 0, 1)],
        }
        for video, masks in drawn.masks.items()
    }
    save_json(root / "toy.json", {"videos": sidecar})
    return drawn


def _write_labels(drawn: Drawn, split: str, rng: np.random.Generator, save_json: SaveJson) -> None:
    videos = {}
    for video, masks in drawn.masks.items():
        _frames(drawn, drawn.root / split / "JPEGImages", video, rng)
        for t, stem in enumerate(drawn.frames[video]):
            label = sum(int(o) * m[t].astype(np.uint8) for o, m in masks.items())
            _save_png(drawn.root / split / "Annotations" / video / f"{stem}.png", label)
        videos[video] = {
            "expressions": {
                e: {"exp": text, "obj_id": objects[0]}
                for e, (text, objects) in drawn.sentences[video].items()
            },
            "frames": drawn.frames[video],
        }
    path = drawn.root / "meta_expressions" / split / "meta_expressions.json"
    save_json(path, {"videos": videos})


def _write_reasonvos(drawn: Drawn, rng: np.random.Generator, save_json: SaveJson) -> None:
    videos = {}
    for video, masks in drawn.masks.items():
        _frames(drawn, drawn.root / "JPEGImages", video, rng)
        for o, mask in masks.items():
            for t, stem in enumerate(drawn.frames[video]):
                path = drawn.root / "Annotations" / f"MOSE_{video}_{o}" / f"{stem}.png"
                _save_png(path, mask[t].astype(np.uint8))
        videos[video] = {
            "source": "MOSE",
            "frames": drawn.frames[video],
            "expressions": [
                {"obj_id": int(objects[0]), "exp_id": int(e), "exp_text": text, "is_sent": True}
                for e, (text, objects) in drawn.sentences[video].items()
            ],
        }
    save_json(drawn.root / "meta_expressions.json", {"videos": videos})


def _write_rle(
    drawn: Drawn,
    layout: str,
    split: str,
    rng: np.random.Generator,
    save_json: SaveJson,
    coco_rle: EncodeRle,
) -> None:
    videos, mask_dict, running = {}, {}, 100
    base = drawn.root / split if layout == "mevis" else drawn.root
    for video, masks in drawn.masks.items():
        _frames(drawn, base / "JPEGImages", video, rng)
        annos = {}
        for o, mask in masks.items():
            annos[o] = running
            mask_dict[str(running)] = [coco_rle(m) for m in mask]
            running -= 1
        expressions = {}
        for e, (text, objects) in drawn.sentences[video].items():
            expressions[e] = {
                "exp": text,
                "obj_id": [int(o) for o in objects],
                "anno_id": [annos[o] for o in objects],
            }
            if layout == "revos":
                expressions[e]["type_id"] = 0 if objects else 2
        videos[video] = {"expressions": expressions, "frames": drawn.frames[video]}
    name = "meta_expressions.json" if layout == "mevis" else f"meta_expressions_{split}_.json"
    save_json(base / name, {"videos": videos})
    save_json(base / "mask_dict.json", mask_dict)


@pytest.fixture
def corpus_maker(tmp_path: Path, save_json: SaveJson, coco_rle: EncodeRle) -> Callable[..., Drawn]:
    """Return a function that writes a corpus of a layout, each layout in its own folder."""

    def make(layout: str, split: str = "train", n_videos: int = 4, seed: int = 0) -> Drawn:
        folder = tmp_path / "corpora" / layout
        return make_corpus(folder, layout, split, n_videos, seed, save_json, coco_rle)

    return make


@pytest.fixture(scope="session")
def parquet_rows() -> Callable[[Path, str], Iterator[dict[str, Any]]]:
    """Return a function that yields the rows of a split of a shard set, in order."""

    def rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
        for path in sorted(folder.glob(f"{split}-*.parquet")):
            yield from pq.read_table(path).to_pylist()

    return rows
