"""Write the files of a toy clip, and make its entries of the split's metadata.

Ids have the types of the published files: strings in Ref-YouTube-VOS and Ref-DAVIS17, integers
elsewhere. Masks are palette PNGs or COCO run lengths. `write_clip` can run in any process and
returns what the metadata needs.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as coco
from PIL import Image

from data_pipelines.toy.clips import ToyClip

# full colour resolution too: otherwise small objects differ from the rendered scene
_JPEG = (
    cv2.IMWRITE_JPEG_QUALITY,
    98,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)

# the colours of DAVIS and YouTube-VOS: bits of the index spread over the channels' high bits
_PALETTE = np.zeros((256, 3), np.uint8)
for _i in range(256):
    for _bit in range(8):
        _PALETTE[_i, _bit % 3] |= ((_i >> _bit) & 1) << (7 - _bit // 3)
_PALETTE_BYTES = _PALETTE.tobytes()

Rle = dict[str, Any]


@dataclass(frozen=True)
class ClipRecord:
    """What a clip's metadata needs after its files are written."""

    clip: ToyClip
    seen: tuple[tuple[str, ...], ...]
    """Per object, the frames in which it is visible."""
    rles: tuple[tuple[Rle | None, ...], ...] = ()
    """Per object and frame; only for layouts with run lengths."""
    foreground: tuple[tuple[Rle, float], ...] = ()
    """Per frame, the union of all objects and its share of the frame; ReVOS only."""


@dataclass(frozen=True)
class SplitPaths:
    """Paths of a split's parts, relative to the corpus' root."""

    images: str
    labels: str = ""
    parts: tuple[str, ...] = ()
    """Files and folders that belong to this split alone."""


def save_json(path: Path, value: Any) -> None:
    """Write compact JSON with a line break at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def label_image(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return uint8 [H, W]: object id (index + 1) at the pixels of its mask; masks are disjoint."""
    label = np.zeros(masks[0].shape, np.uint8)
    for index, mask in enumerate(masks):
        label[mask] = index + 1
    return label


def save_labels(path: Path, label: np.ndarray) -> None:
    """Write uint8 [H, W] as a palette PNG."""
    image = Image.fromarray(label)
    image.putpalette(_PALETTE_BYTES)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    path.write_bytes(buffer.getvalue())


def save_frame(path: Path, rgb: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB as a JPEG."""
    done, data = cv2.imencode(".jpg", rgb[..., ::-1], _JPEG)
    if not done:
        raise OSError(f"{path}: the JPEG encoder failed")
    path.write_bytes(data.tobytes())


def encode_rle(mask: np.ndarray) -> Rle:
    """Encode bool [H, W] as COCO compressed run lengths."""
    done = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = done["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(s) for s in mask.shape], "counts": text}


def write_clip(root: Path, layout: str, paths: SplitPaths, clip: ToyClip) -> ClipRecord:
    """Write a clip's frames, and its masks if they are files, below `root`."""
    images = root / paths.images / clip.name
    images.mkdir(parents=True)
    labels = root / paths.labels
    if layout == "reasonvos":
        for i in range(len(clip.scene.objects)):
            (labels / f"{clip.source}_{clip.name}_{i + 1}").mkdir(parents=True)
    elif paths.labels:
        (labels / clip.name).mkdir(parents=True)
    seen: list[list[str]] = [[] for _ in clip.scene.objects]
    rles: list[list[Rle | None]] = [[] for _ in clip.scene.objects]
    foreground = []
    for t, frame in enumerate(clip.frames):
        save_frame(images / f"{frame}.jpg", clip.scene.render(t))
        masks = clip.scene.masks(t)
        for i, mask in enumerate(masks):
            visible = bool(mask.any())
            if visible:
                seen[i].append(frame)
            if layout == "reasonvos":
                folder = labels / f"{clip.source}_{clip.name}_{i + 1}"
                save_labels(folder / f"{frame}.png", mask.astype(np.uint8))
            elif layout in ("mevis", "revos"):
                rles[i].append(encode_rle(mask) if visible else None)
        if layout in ("ref-youtube-vos", "davis17") and paths.labels:
            save_labels(labels / clip.name / f"{frame}.png", label_image(masks))
        elif layout == "revos":
            union = np.logical_or.reduce(masks)
            foreground.append((encode_rle(union), round(float(union.mean()), 6)))
    return ClipRecord(clip, tuple(map(tuple, seen)), tuple(map(tuple, rles)), tuple(foreground))


def expression_folders(labels: Path, record: ClipRecord) -> None:
    """Replace the label images of a clip by a folder of masks, 0 or 255, for each expression."""
    clip = record.clip
    shutil.rmtree(labels / clip.name)
    for t, frame in enumerate(clip.frames):
        masks = clip.scene.masks(t)
        for name, query in clip.expressions:
            folder = labels / clip.name / name
            folder.mkdir(parents=True, exist_ok=True)
            union = np.logical_or.reduce([masks[i] for i in query.targets])
            Image.fromarray(union.astype(np.uint8) * 255).save(folder / f"{frame}.png")


def label_expressions(record: ClipRecord, with_ids: bool) -> dict[str, Any]:
    """Return a video entry of Ref-YouTube-VOS or Ref-DAVIS17; `with_ids`: with object ids."""
    expressions = {}
    for name, query in record.clip.expressions:
        expressions[name] = {"exp": query.text}
        if with_ids:
            expressions[name]["obj_id"] = str(query.targets[0] + 1)
    return {"expressions": expressions, "frames": list(record.clip.frames)}


def label_objects(record: ClipRecord, with_expressions: bool) -> dict[str, Any]:
    """Return a video entry of meta.json: each object's category and the frames that show it.

    Args:
        with_expressions: Also list the expressions of each object, if those have no object ids.
    """
    out: dict[str, Any] = {}
    for i, item in enumerate(record.clip.scene.objects):
        out[str(i + 1)] = {"category": item.shape, "frames": list(record.seen[i])}
        if with_expressions:
            means = [e for e, q in record.clip.expressions if q.targets == (i,)]
            out[str(i + 1)]["expressions"] = means
    return {"objects": out}


def rle_video(record: ClipRecord, first_anno: int, layout: str) -> dict[str, Any]:
    """Return a video entry of MeViS or ReVOS; object `i` has the annotation `first_anno + i`."""
    clip = record.clip
    expressions = {}
    for name, query in clip.expressions:
        entry: dict[str, Any] = {
            "exp": query.text,
            "obj_id": [i + 1 for i in query.targets],
            "anno_id": [first_anno + i for i in query.targets],
        }
        if layout == "revos":
            entry["type_id"] = type_id(query.kind)
        expressions[name] = entry
    out: dict[str, Any] = {"expressions": expressions, "frames": list(clip.frames)}
    if layout == "revos":
        height, width = clip.scene.size
        out |= {"vid_id": clip.index, "height": height, "width": width}
    return out


def type_id(kind: str) -> int:
    """Return ReVOS' type: 0 referring, 1 reasoning over time or place, 2 no target."""
    return {"attribute": 0, "several": 0, "absent": 2}.get(kind, 1)


def reasonvos_video(record: ClipRecord) -> dict[str, Any]:
    """Return a video entry of ReasonVOS."""
    clip = record.clip
    return {
        "source": clip.source,
        "frames": list(clip.frames),
        "expressions": [
            {
                "obj_id": query.targets[0] + 1,
                "exp_id": int(name),
                "exp_text": query.text,
                "is_sent": True,
            }
            for name, query in clip.expressions
        ],
    }
