"""Small corpora in the public layouts, with predictions and the masks behind both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH, FRAMES = 30, 44, 5

TYPES = {"0": (0, ["1"]), "1": (1, ["1", "2"]), "2": (2, []), "3": (1, ["2"]), "4": (0, ["2"])}
"""Expression id -> (ReVOS type, object ids)."""


@dataclass
class World:
    """A corpus on disk with its ground truth."""

    dataset: str
    root: Path
    split: str = "valid"
    videos: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=lambda: [f"{5 * t:05d}" for t in range(FRAMES)])
    masks: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """video -> object -> bool [T, H, W]"""

    def targets(self, expression: str) -> list[str]:
        _, objects = TYPES[expression]
        if self.dataset in ("mevis", "revos"):
            return objects
        return objects[:1] or ["1"]

    def pairs(self) -> list[tuple[str, str]]:
        return [(v, e) for v in self.videos for e in TYPES]

    @property
    def base(self) -> Path:
        """The folder of the split's JPEGs and labels."""
        at_root = self.dataset in ("revos", "reasonvos")
        return self.root if at_root else self.root / self.split

    @property
    def expressions_file(self) -> Path:
        if self.dataset == "revos":
            return self.root / "meta_expressions_valid_.json"
        if self.dataset in ("mevis", "reasonvos"):
            return self.base / "meta_expressions.json"
        return self.root / "meta_expressions" / "valid" / "meta_expressions.json"

    def edit_expressions(self, change: Callable[[Any], object]) -> None:
        edit_json(self.expressions_file, change)

    def edit_masks(self, change: Callable[[dict[str, list[Any]]], object]) -> None:
        edit_json(self.base / "mask_dict.json", change)

    def jpeg(self, t: int, video: int = 0) -> Path:
        return self.base / "JPEGImages" / self.videos[video] / f"{self.frames[t]}.jpg"

    def truth(self, video: str, expression: str) -> np.ndarray:
        masks = [self.masks[video][o] for o in self.targets(expression)]
        return np.any([np.zeros((FRAMES, HEIGHT, WIDTH), bool), *masks], axis=0)

    def foreground(self, video: str) -> np.ndarray:
        return np.any([*self.masks[video].values()], axis=0)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def blobs(rng: np.random.Generator) -> np.ndarray:
    """Return bool [T, H, W]: a box that moves and grows, absent in the first frame."""
    masks = np.zeros((FRAMES, HEIGHT, WIDTH), dtype=bool)
    y, x = rng.integers(2, 10), rng.integers(2, 20)
    for t in range(1, FRAMES):
        h, w = rng.integers(4, 12), rng.integers(4, 14)
        masks[t, y + t : y + t + h, x + 2 * t : x + 2 * t + w] = True
    return masks


def save_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def _save_frames(folder: Path, world: World) -> None:
    rng = np.random.default_rng(1)
    for video in world.videos:
        for stem in world.frames:
            path = folder / video / f"{stem}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def _write(
    world: World,
    save_json: Callable[[Path, object], None],
    coco_rle: Callable[[np.ndarray], dict | None],
) -> None:
    root, masks = world.root, world.masks
    videos: dict[str, dict] = {v: {"frames": world.frames, "expressions": {}} for v in masks}
    for video, expression in world.pairs():
        objects = world.targets(expression)
        entry = {"exp": f"object {expression}", "obj_id": objects[0] if objects else "1"}
        videos[video]["expressions"][expression] = entry
    if world.dataset in ("ref-youtube-vos", "davis17"):
        _save_frames(root / "valid" / "JPEGImages", world)
        for video, objects in masks.items():
            for t, stem in enumerate(world.frames):
                label = np.zeros((HEIGHT, WIDTH))
                for name, mask in objects.items():
                    label[mask[t]] = int(name)
                save_png(root / "valid" / "Annotations" / video / f"{stem}.png", label)
            objects["1"] = objects["1"] & ~objects["2"]  # the later label overwrites the earlier
        save_json(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": videos})
    elif world.dataset == "reasonvos":
        _save_frames(root / "JPEGImages", world)
        for video, objects in masks.items():
            for name, mask in objects.items():
                for t, stem in enumerate(world.frames):
                    save_png(root / "Annotations" / f"MOSE_{video}_{name}" / f"{stem}.png", mask[t])
            videos[video]["source"] = "MOSE"
            videos[video]["expressions"] = [
                {"obj_id": world.targets(e)[0], "exp_id": e, "exp_text": e, "is_sent": True}
                for e in TYPES
            ]
        save_json(root / "meta_expressions.json", {"videos": videos})
    else:
        revos = world.dataset == "revos"
        base = root if revos else root / world.split
        _save_frames(base / "JPEGImages", world)
        annotations, dictionary = {}, {}
        for video, objects in masks.items():
            for name, mask in objects.items():
                annotations[video, name] = len(dictionary)
                dictionary[str(len(dictionary))] = [coco_rle(m) for m in mask]
        for video, expression in world.pairs():
            objects = world.targets(expression)
            videos[video]["expressions"][expression] |= {
                "obj_id": [int(o) for o in objects],
                "anno_id": [annotations[video, o] for o in objects],
                **({"type_id": TYPES[expression][0]} if revos else {}),
            }
        name = f"meta_expressions_{world.split}_.json" if revos else "meta_expressions.json"
        save_json(base / name, {"videos": videos})
        save_json(base / "mask_dict.json", dictionary)
        if revos:
            empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
            unions = {v: [coco_rle(m) or empty for m in world.foreground(v)] for v in masks}
            foreground = {v: {"masks_rle": listed} for v, listed in unions.items()}
            save_json(base / "mask_dict_foreground.json", foreground)


@pytest.fixture
def make_world(
    tmp_path: Path,
    save_json: Callable[[Path, object], None],
    coco_rle: Callable[[np.ndarray], dict | None],
) -> Callable[..., World]:
    """Return a function that writes a corpus of a dataset's layout, with its ground truth."""

    def make(dataset: str, n_videos: int = 3, seed: int = 0) -> World:
        split = "valid_u" if dataset == "mevis" else "valid"
        world = World(dataset, tmp_path / "corpora" / dataset, split)
        slash = "UVO/all/" if dataset == "revos" else ""
        for k in range(n_videos):
            world.videos.append(f"{slash}clip-{k}")
            rng = np.random.default_rng([seed, k])
            world.masks[world.videos[-1]] = {"1": blobs(rng), "2": blobs(rng)}
        _write(world, save_json, coco_rle)
        return world

    return make


@pytest.fixture
def make_predictions(tmp_path: Path) -> Callable[..., tuple[Path, dict]]:
    """Return a function that writes predictions near the truth.

    It returns their folder and (video, expression) -> bool [T, H, W].
    """

    def make(world: World, seed: int = 0) -> tuple[Path, dict[tuple[str, str], np.ndarray]]:
        rng = np.random.default_rng([seed, 9])
        root, masks = tmp_path / "predictions" / world.dataset, {}
        for video, expression in world.pairs():
            shift = tuple(int(v) for v in rng.integers(-2, 3, 2))
            masks[video, expression] = np.roll(world.truth(video, expression), shift, axis=(1, 2))
            for stem, mask in zip(world.frames, masks[video, expression], strict=True):
                save_png(root / video / expression / f"{stem}.png", mask * 255)
        return root, masks

    return make
