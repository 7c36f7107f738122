"""Every row of a build, recomputed from the files of the corpora by independent code.

Nothing of the readers, the geometry or the masks' libraries is used: JSON, run lengths and PNGs
are read here, circles are tried out one by one, rounding is in fractions.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines.build import build
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

LAYOUTS = ("ref-youtube-vos", "mevis", "revos")
SIZES = ((37, 53), (61, 29), (1, 40), (43, 1), (17, 131), (28, 28), (50, 75))
"""Source sizes (H, W); each video has one."""
FRAMES = 7


def sets_of(scale: int) -> dict[str, SetSize]:
    return {
        "sft-x": SetSize(ktg=10 * scale, aks=5 * scale, val=4),
        "grpo-aks-x": SetSize(aks=5 * scale, val=4),
        "grpo-ktg-x": SetSize(ktg=6 * scale, val=4),
    }


# Corpora with masks of every awkward kind.


def awkward_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return bool [H, W]: one pixel, a border, a ring, dust, all pixels, or blobs."""
    mask = np.zeros((height, width), bool)
    kind = rng.integers(0, 8)
    if kind == 0:
        mask[rng.integers(height), rng.integers(width)] = True
    elif kind == 1:
        mask[[0, -1], :] = mask[:, [0, -1]] = True
    elif kind == 2:
        mask[:] = True
        mask[height // 3 : height // 3 + 3, width // 3 : width // 3 + 4] = False
    elif kind == 3:
        mask = rng.random((height, width)) < 0.15
    elif kind == 4:
        mask[:] = True
    else:
        for _ in range(kind - 4):
            y, x = rng.integers(0, height), rng.integers(0, width)
            h, w = rng.integers(1, 12), rng.integers(1, 15)
            mask[y : y + h, x : x + w] = True
    return mask


def run_lengths(mask: np.ndarray, listed: bool) -> dict[str, Any]:
    """Return COCO run lengths, as text or as a list."""
    flat = [False, *mask.T.ravel().tolist()]
    runs, value = [0], False
    for bit in flat[1:]:
        if bit != value:
            runs.append(0)
            value = bit
        runs[-1] += 1
    if listed:
        return {"size": list(mask.shape), "counts": runs}
    text = ""
    for i, run in enumerate(runs):
        rest = run - (runs[i - 2] if i > 2 else 0)
        while True:
            digit, rest = rest & 31, rest >> 5
            done = rest == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if done else 32))
            if done:
                break
    return {"size": list(mask.shape), "counts": text}


def write_png(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0] + [7] * (253 * 3))
    image.save(path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_corpus(root: Path, layout: str, n_videos: int) -> None:
    rng = np.random.default_rng([len(layout), n_videos])
    base = root if layout == "revos" else root / "train"
    videos: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    sidecar: dict[str, Any] = {}
    for v in range(n_videos):
        name = f"TAO/x{v % 3}/clip-{v:02d}" if layout == "revos" else f"{layout}-{v:02d}"
        height, width = SIZES[v % len(SIZES)]
        stems = [f"{5 * t:05d}" for t in range(FRAMES)]
        objects = ["2", "11", "1"] if v % 2 else ["9", "10", "3"]
        drawn = {o: np.zeros((FRAMES, height, width), bool) for o in objects}
        for t in range(FRAMES):
            for o in rng.permutation(objects)[: rng.integers(0, 4)]:
                drawn[str(o)][t] = awkward_mask(rng, height, width)
        for stem in stems:
            path = base / "JPEGImages" / name / f"{stem}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            cv2.imwrite(str(path), picture)
        groups = [[o] for o in objects] + [objects[:2], objects[::-1], []]
        if layout == "ref-youtube-vos":
            groups = groups[:3]
            for t, stem in enumerate(stems):
                labels = np.zeros((height, width), np.uint8)
                for o in objects:
                    labels[drawn[o][t]] = int(o)
                write_png(base / "Annotations" / name / f"{stem}.png", labels)
        else:
            for k, o in enumerate(objects):
                masks[str(5000 - 3 * v - k)] = [
                    run_lengths(m, listed=(v + t) % 5 == 0) if m.any() or t % 2 else None
                    for t, m in enumerate(drawn[o])
                ]
        expressions = {}
        for e, group in enumerate(groups):
            entry: dict[str, Any] = {"exp": f"the <image> № {e} of {name}, {len(group)}"}
            if layout == "ref-youtube-vos":
                entry["obj_id"] = group[0]
            else:
                entry["obj_id"] = [int(o) for o in group]
                entry["anno_id"] = [5000 - 3 * v - objects.index(o) for o in group]
            if layout == "revos":
                entry["type_id"] = e % 2 if group else 2
            expressions[str(e)] = entry
        videos[name] = {"expressions": expressions, "frames": stems}
        sidecar[name] = {
            "description": f"clip {v} of {layout}",
            "objects": {o: {"name": f"thing {o}"} for o in objects},
            "order": objects,
        }
    if layout == "ref-youtube-vos":
        write_json(root / "meta_expressions/train/meta_expressions.json", {"videos": videos})
    elif layout == "mevis":
        write_json(base / "meta_expressions.json", {"videos": videos})
    else:
        write_json(root / "meta_expressions_train_.json", {"videos": videos})
    if masks:
        write_json(base / "mask_dict.json", masks)
    write_json(root / "toy.json", {"videos": sidecar})


# Reading them again.


def decoded_runs(rle: dict[str, Any]) -> np.ndarray:
    """Decode to bool [H, W], digit by digit and pixel by pixel."""
    height, width = rle["size"]
    runs: list[int] = []
    if isinstance(rle["counts"], list):
        runs = rle["counts"]
    else:
        value = bits = 0
        for character in rle["counts"]:
            digit = ord(character) - 48
            value |= (digit & 31) << bits
            bits += 5
            if digit < 32:
                value -= (1 << bits) if digit & 16 else 0
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = bits = 0
    assert sum(runs) == height * width and min(runs) >= 0
    mask = np.zeros((height, width), bool)
    at = 0
    for number, run in enumerate(runs):
        for pixel in range(at, at + run):
            mask[pixel % height, pixel // height] = number % 2 == 1
        at += run
    return mask


def unfilter(kind: int, line: bytearray, above: bytearray) -> None:
    """Undo a PNG filter of one byte per pixel, in place."""
    for x in range(len(line)):
        left, up = line[x - 1] if x else 0, above[x]
        corner = above[x - 1] if x else 0
        guess = left + up - corner
        nearest = min((left, up, corner), key=lambda v: abs(guess - v))
        line[x] = (line[x] + (0, left, up, (left + up) // 2, nearest)[kind]) % 256


def png_labels(path: Path) -> np.ndarray:
    """Decode a palette PNG of 1, 2, 4 or 8 bits, not interlaced, to uint8 [H, W]."""
    data, at, packed = path.read_bytes(), 8, b""
    width = height = depth = 0
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
            depth = body[8]
            assert body[9] == 3 and body[12] == 0
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, stride = zlib.decompress(packed), -(-width * depth // 8)
    labels = np.zeros((height, width), np.uint8)
    above = bytearray(stride)
    for y in range(height):
        start = y * (stride + 1)
        line = bytearray(raw[start + 1 : start + 1 + stride])
        unfilter(raw[start], line, above)
        for x in range(width):
            byte, offset = divmod(x * depth, 8)
            labels[y, x] = (line[byte] >> (8 - depth - offset)) & ((1 << depth) - 1)
        above = line
    return labels


@dataclass
class Disk:
    """A corpus, read independently from its files."""

    layout: str
    root: Path
    documents: dict[str, Any] = field(default_factory=dict)
    cached_masks: dict[tuple, np.ndarray] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.root if self.layout == "revos" else self.root / "train"

    def document(self, path: str) -> Any:
        if path not in self.documents:
            self.documents[path] = json.loads((self.root / path).read_text(encoding="utf-8"))
        return self.documents[path]

    def video(self, name: str) -> dict[str, Any]:
        path = {
            "ref-youtube-vos": "meta_expressions/train/meta_expressions.json",
            "mevis": "train/meta_expressions.json",
            "revos": "meta_expressions_train_.json",
        }[self.layout]
        return self.document(path)["videos"][name]

    def objects(self, name: str, expression: str) -> list[str]:
        """Return the ids of the targets, ascending by number."""
        listed = self.video(name)["expressions"][expression]["obj_id"]
        return [str(o) for o in sorted(map(int, listed if isinstance(listed, list) else [listed]))]

    def mask(self, name: str, expression: str, object_id: str, t: int) -> np.ndarray | None:
        key = (name, object_id, t)
        if key not in self.cached_masks:
            self.cached_masks[key] = self._mask(name, expression, object_id, t)
        return self.cached_masks[key]

    def _mask(self, name: str, expression: str, object_id: str, t: int) -> Any:
        video = self.video(name)
        if self.layout == "ref-youtube-vos":
            labels = png_labels(self.base / "Annotations" / name / f"{video['frames'][t]}.png")
            return labels == int(object_id)
        entry = video["expressions"][expression]
        anno = entry["anno_id"][entry["obj_id"].index(int(object_id))]
        prefix = "" if self.layout == "revos" else "train/"
        rle = self.document(f"{prefix}mask_dict.json")[str(anno)][t]
        return None if rle is None else decoded_runs(rle)

    def jpeg(self, name: str, t: int) -> Path:
        return self.base / "JPEGImages" / name / f"{self.video(name)['frames'][t]}.jpg"


# The contract's words.


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def on_canvas(value: Fraction | int, size: int, canvas: int) -> int:
    return half_up(Fraction(value) * canvas / size)


def widest_circle(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) by brute force: every mask pixel against every other, outside included."""
    height, width = mask.shape
    inside = [(y, x) for y in range(height) for x in range(width) if mask[y, x]]
    framed = np.pad(mask, 1)
    by, bx = np.nonzero(~framed)
    best, at = -1, (-1, -1)
    for y, x in inside:
        near = int(((by - 1 - y) ** 2 + (bx - 1 - x) ** 2).min())
        if near > best:
            best, at = near, (x, y)
    return at


def item_of(mask: np.ndarray, canvas: int) -> dict[str, list[int]]:
    height, width = mask.shape
    rows = [y for y in range(height) if mask[y].any()]
    columns = [x for x in range(width) if mask[:, x].any()]
    x, y = widest_circle(mask)
    half = Fraction(1, 2)
    return {
        "bbox_2d": [
            on_canvas(columns[0], width, canvas),
            on_canvas(rows[0], height, canvas),
            on_canvas(columns[-1] + 1, width, canvas),
            on_canvas(rows[-1] + 1, height, canvas),
        ],
        "point_2d": [on_canvas(x + half, width, canvas), on_canvas(y + half, height, canvas)],
    }


def kernel(size: int, canvas: int) -> np.ndarray:
    """Return float64 [canvas, size]: area means to shrink, linear interpolation to grow."""
    out = np.zeros((canvas, size))
    for i in range(canvas):
        if size > canvas:
            low, high = i * size / canvas, (i + 1) * size / canvas
            for j in range(size):
                out[i, j] = max(0.0, min(high, j + 1) - max(low, j)) * canvas / size
        else:
            at = min(max((i + 0.5) * size / canvas - 0.5, 0.0), size - 1.0)
            j = min(int(at), max(size - 2, 0))
            out[i, j] += 1 - (at - j)
            out[i, min(j + 1, size - 1)] += at - j
    return out


def resized(path: Path, canvas: int) -> np.ndarray:
    """Return float64 [canvas, canvas, 3]: a frame on the canvas, to the hundredth."""
    with Image.open(path) as image:
        frame = np.asarray(image.convert("RGB"), dtype=np.float64)
    height, width = frame.shape[:2]
    across = np.einsum("xw,hwc->hxc", kernel(width, canvas), frame)
    return np.einsum("yh,hxc->yxc", kernel(height, canvas), across)


# The check.


@pytest.fixture(scope="module")
def disks(tmp_path_factory) -> dict[str, Disk]:
    out = {}
    for layout in LAYOUTS:
        root = tmp_path_factory.mktemp("corpora") / layout
        write_corpus(root, layout, n_videos=21)
        out[layout] = Disk(layout, root)
    return out


def facts(disk: Disk, info: dict[str, Any]) -> tuple[list[np.ndarray | None], list[int]]:
    """Return the targets' masks in the row's frame, and their union's area in every frame."""
    name, expression = info["video"], info["expression_id"]
    objects = disk.objects(name, expression)
    areas = []
    for t in range(len(disk.video(name)["frames"])):
        masks = [disk.mask(name, expression, o, t) for o in objects]
        seen = [m for m in masks if m is not None]
        areas.append(int(np.count_nonzero(np.any(seen, axis=0))) if seen else 0)
    return [disk.mask(name, expression, o, info["frame_index"]) for o in objects], areas


def absent(disk: Disk) -> set[tuple[str, str]]:
    """Return (video, expression) of objects that were painted over in every label image."""
    return {
        (name, e)
        for name, video in disk.document("meta_expressions/train/meta_expressions.json")[
            "videos"
        ].items()
        for e in video["expressions"]
        for o in disk.objects(name, e)
        if not any(disk.mask(name, e, o, t).any() for t in range(len(video["frames"])))
    }


def truth_from(disk: Disk, info: dict[str, Any], truth: Any, canvas: int) -> Any:
    """Return the row's expected ground truth; assert that its frame may be shown."""
    masks, areas = facts(disk, info)
    t = info["frame_index"]
    first_largest = areas.index(max(areas)) if max(areas) else None
    if info["task"] == "aks":
        if t == first_largest:
            return "A"
        assert areas[t] == 0 and truth == "B"
        return "B"
    assert t == first_largest or not masks
    return [item_of(m, canvas) for m in masks if m is not None and m.any()]


@pytest.mark.parametrize(("canvas", "zero", "scale"), [(112, 0.2, 5), (840, 0.0, 2)])
def test_every_row_equals_an_independent_recomputation(
    disks, tmp_path, canvas, zero, scale, parquet_rows
):
    section = DataSection(
        corpora=[CorpusRef(dataset=d, root=str(disk.root)) for d, disk in disks.items()],
        sets=sets_of(scale),
        val_fraction=0.2,
        zero_target_share=zero,
        rows_per_shard=17,
        max_per_video=6,
        allow_smaller=True,
    )
    built = build(section, tmp_path / "out", "qwen", seed=11, canvas=canvas)
    prompts = load_prompts("qwen")
    hidden = absent(disks["ref-youtube-vos"])
    seen: Counter[str] = Counter()
    instances: Counter[tuple] = Counter()
    shown: dict[str, set] = {"train": set(), "val": set()}
    pictures: dict[Path, np.ndarray] = {}
    for name in section.sets:
        folder = tmp_path / "out" / name
        defects = built["sets"][name]["dropped"]["defects"]
        assert {(d["video"], d["expression_id"]) for d in defects} == hidden
        of_set = set()
        for split in ("train", "val"):
            for index, row in enumerate(parquet_rows(folder, split)):
                info = row["extra_info"]
                disk, t = disks[info["dataset"]], info["frame_index"]
                video = disk.video(info["video"])
                entry = video["expressions"][info["expression_id"]]
                objects = disk.objects(info["video"], info["expression_id"])
                truth = json.loads(row["reward_model"]["ground_truth"])
                assert truth == truth_from(disk, info, truth, canvas)
                sidecar = disk.document("toy.json")["videos"][info["video"]]
                with Image.open(disk.jpeg(info["video"], t)) as image:
                    width, height = image.size
                counted = {
                    "index": index,
                    "expression": entry["exp"],
                    "object_ids": objects,
                    "frame": video["frames"][t],
                    "source_size": [height, width],
                    "canvas": [canvas, canvas],
                    "target": ("none", "single", "multi", "multi")[len(objects)],
                    "description": sidecar["description"],
                    "split": split,
                }
                assert {k: info[k] for k in counted} == counted
                assert row["data_source"] == f"rcot/{info['task']}"
                assert row["reward_model"]["style"] == "rule"

                texts = (sidecar["description"], entry["exp"])
                asked = prompts.aks(*texts)
                if info["task"] == "ktg":
                    asked = prompts.ktg(*texts, zero_target=zero > 0, canvas=canvas)
                    assert all(
                        x1 < x2 and y1 < y2 for x1, y1, x2, y2 in (i["bbox_2d"] for i in truth)
                    )
                (turn,) = row["prompt"]
                assert turn == {"role": "user", "content": "<image>" + asked}
                assert turn["content"].count("<image>") == 1
                if name == "sft-x":
                    answer_text = truth if isinstance(truth, str) else json.dumps(truth)
                    assert row["messages"][0] == turn
                    answer = row["messages"][1]["content"].split("<answer>")[1]
                    assert answer == f"{answer_text}</answer>"

                (image,) = row["images"]
                assert (folder / info["media"]).read_bytes() == image["bytes"]
                assert image["path"] == info["media"]
                source = disk.jpeg(info["video"], t)
                if source not in pictures:
                    pictures[source] = resized(source, canvas)
                with Image.open(io.BytesIO(image["bytes"])) as opened:
                    pixels = np.asarray(opened)
                assert pixels.shape == (canvas, canvas, 3)
                # decoders of JPEG and integer kernels round by a level or two
                assert np.abs(pixels - pictures[source]).max() < 3
                digest = built["sets"][name]["files"][info["media"]]
                assert hashlib.sha256(image["bytes"]).hexdigest() == digest

                kind = truth if info["task"] == "aks" else info["target"]
                seen[f"{info['task']} {kind}"] += 1
                seen[info["dataset"]] += 1
                of_set.add((info["dataset"], info["video"], info["expression_id"], t))
                shown[split].add((info["dataset"], info["video"]))
        instances.update(of_set)
    assert max(instances.values()) == 1
    assert not shown["train"] & shown["val"]
    kinds = {"aks A", "aks B", "ktg single", "ktg multi"} | ({"ktg none"} if zero else set())
    assert {k for k in seen if " " in k} == kinds
    assert all(seen[layout] > 5 * scale for layout in LAYOUTS)
