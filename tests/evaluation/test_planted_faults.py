"""Faults of many kinds, planted together, are each listed and counted, and change no other score.

Every fault has a clip of its own. An expression that no fault touches must keep its scores to the
last bit.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from rcot_rl.evaluation.benchmarks import evaluate

Kind = Literal["unusable", "unexpected", "trace", "defective"]
COUNTERS = {"unusable": "n_unusable", "unexpected": "n_unexpected", "defective": "n_defective"}


@dataclass
class Site:
    """Where a fault is planted: a clip, and its expression 0."""

    world: Any
    root: Path
    video: str
    number: int

    @property
    def folder(self) -> Path:
        return self.root / self.video / "0"

    def mask(self, t: int = 2) -> Path:
        return self.folder / f"{self.world.frames[t]}.png"

    def pixels(self, t: int = 2) -> np.ndarray:
        return np.asarray(Image.open(self.mask(t)))

    def each(self, change: Callable[[Path], object]) -> None:
        for path in sorted(self.folder.glob("*.png")):
            change(path)

    def values(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the values of all masks; an object is True."""
        self.each(lambda p: Image.fromarray(change(np.asarray(Image.open(p)) > 0)).save(p))

    def rename(self, name: Callable[[str], str]) -> None:
        for path in sorted(self.folder.glob("*.png"), reverse=True):
            path.rename(path.with_name(name(path.stem)))

    def trace(self, **change: Any) -> None:
        trace = {"keyframe": 2, "initial_keyframe": 0, "rounds": 3, "boxes_source": []}
        self.write_trace(json.dumps({**trace, "segmenter": "sam2", **change}).encode())

    def write_trace(self, content: bytes) -> None:
        (self.folder / "trace.json").write_bytes(content)

    @property
    def annotation(self) -> str:
        """The annotation of object 1 of the clip."""
        return str(2 * self.number)

    def masks(self, change: Callable[[list[Any]], object]) -> None:
        self.world.edit_masks(lambda m: change(m[self.annotation]))

    def entry(self, change: Callable[[dict[str, Any]], object]) -> None:
        self.world.edit_expressions(lambda d: change(d["videos"][self.video]))

    def jpeg(self, t: int = 2) -> Path:
        return self.world.jpeg(t, self.number)

    def label(self, t: int = 2) -> Path:
        folder = f"MOSE_{self.video}_1" if self.world.dataset == "reasonvos" else self.video
        return self.world.base / "Annotations" / folder / f"{self.world.frames[t]}.png"


@dataclass
class Fault:
    """One fault, and what the result must say of it."""

    layout: str
    name: str
    kinds: tuple[Kind, ...]
    listed: str
    """missing, faults, unexpected or defects."""
    text: str
    """Part of an entry that also names the clip or its file."""
    plant: Callable[[Site], object]
    expressions: tuple[str, ...] = ("0",)


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def damaged(data: bytes) -> bytes:
    """Flip a byte of the pixel data."""
    at = data.index(b"IDAT") + 8
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def huge() -> bytes:
    """Return a PNG that says it has 3.6 billion pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def palette(path: Path) -> None:
    image = Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8), mode="P")
    image.putpalette([9, 9, 9, 255, 0, 0])
    image.save(path)


def labels(mask: np.ndarray) -> np.ndarray:
    values = mask.astype(np.uint8)
    values[:, : mask.shape[1] // 2] *= 2
    values[0, :2] = (1, 2)
    return values


def soft(mask: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 1, mask.size).reshape(mask.shape)
    return (255 * (0.6 * mask + 0.4 * ramp)).astype(np.uint8)


def png(name: str, change: Callable[[Site], bytes], text: str) -> Fault:
    """A mask that cannot be used."""
    return Fault(
        "mevis",
        name,
        ("unusable",),
        "faults",
        text,
        lambda s: s.mask().write_bytes(change(s)),
    )


def mode(name: str) -> Fault:
    return png(
        f"{name} mask",
        lambda s: encoded(Image.open(s.mask()).convert(name), "PNG"),
        f"has mode {name}",
    )


def value(name: str, change: Callable[[np.ndarray], np.ndarray], text: str) -> Fault:
    """Improper values of masks."""
    return Fault("mevis", name, ("unexpected",), "unexpected", text, lambda s: s.values(change))


def file_name(name: str, change: Callable[[str], str], text: str) -> Fault:
    kinds: tuple[Kind, ...] = ("unusable", "unexpected")
    return Fault("mevis", name, kinds, "unexpected", text, lambda s: s.rename(change))


def trace(name: str, plant: Callable[[Site], object], text: str) -> Fault:
    return Fault("mevis", f"trace: {name}", ("trace",), "faults", text, plant)


def rle(name: str, change: Callable[[list[Any]], object], text: str) -> Fault:
    """A fault of object 1, which expressions 0 and 1 describe."""
    plant: Callable[[Site], object] = lambda s: s.masks(change)  # noqa: E731
    return Fault("mevis", name, ("defective",), "defects", text, plant, ("0", "1"))


def label(layout: str, name: str, plant: Callable[[Site], object], text: str) -> Fault:
    """A fault of object 1, which expressions 0, 1 and 2 describe, or of all objects."""
    shared = () if layout == "reasonvos" else ("3", "4")
    expressions = ("0", "1", "2", *shared)
    return Fault(layout, name, ("defective",), "defects", text, plant, expressions)


def jpeg_fault(name: str, plant: Callable[[Site], object], text: str) -> Fault:
    every = ("0", "1", "2", "3", "4")
    return Fault("mevis", f"JPEG: {name}", ("defective",), "defects", text, plant, every)


def set_entry(index: int, key: str, content: Any) -> Callable[[list[Any]], None]:
    def change(masks: list[Any]) -> None:
        masks[index][key] = content

    return change


def set_mask(content: Any) -> Callable[[list[Any]], None]:
    def change(masks: list[Any]) -> None:
        masks[2] = content

    return change


def white(path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(path)


def revos_entry(expression: str, **values: Any) -> Callable[[Site], object]:
    return lambda s: s.entry(lambda v: v["expressions"][expression].update(values))


FAULTS = [
    # predictions
    Fault("mevis", "no folder", ("unusable",), "missing", "/0", lambda s: shutil.rmtree(s.folder)),
    Fault("mevis", "a frame", ("unusable",), "missing", "/0/00010", lambda s: s.mask().unlink()),
    Fault(
        "mevis",
        "a folder instead of a mask",
        ("unusable",),
        "missing",
        "/0/00010",
        lambda s: (s.mask().unlink(), s.mask().mkdir()),
    ),
    Fault(
        "mevis",
        "a link to nowhere",
        ("unusable",),
        "missing",
        "/0/00010",
        lambda s: (s.mask().unlink(), s.mask().symlink_to("nowhere")),
    ),
    png("empty file", lambda s: b"", "cannot be read"),
    png("truncated", lambda s: s.mask().read_bytes()[:50], "cannot be read"),
    png("no image", lambda s: b"\x89PNG\r\n\x1a\nnot really", "cannot be read"),
    png("a JPEG", lambda s: encoded(Image.open(s.mask()), "JPEG"), "cannot be read"),
    png("damaged pixels", lambda s: damaged(s.mask().read_bytes()), "cannot be read"),
    png("a decompression bomb", lambda s: huge(), "DecompressionBombError"),
    png("a row too many", lambda s: encoded(Image.new("L", (44, 31)), "PNG"), "is 31 x 44"),
    png("transposed", lambda s: encoded(Image.new("L", (30, 44)), "PNG"), "is 44 x 30"),
    mode("RGB"),
    mode("RGBA"),
    mode("LA"),
    value("inverted", lambda m: np.where(m, 0, 255).astype(np.uint8), "inverted masks"),
    value("grey objects", lambda m: (128 * m).astype(np.uint8), "objects are 128"),
    value("soft", soft, "soft mask"),
    value("lossy", lambda m: np.where(m, 250, 3).astype(np.uint8), "JPEG-compressed"),
    value("labels", labels, "labels of several objects"),
    value("16 bits", lambda m: (65535 * m).astype(np.uint16), "16-bit"),
    Fault(
        "mevis",
        "palette",
        ("unexpected",),
        "unexpected",
        "colours count",
        lambda s: s.each(palette),
    ),
    file_name("shifted", lambda s: f"{int(s) + 1:05d}.png", "shifted by one"),
    file_name("counted", lambda s: f"{int(s) // 5 + 1:05d}.png", "frames are counted"),
    file_name("padding", lambda s: f"{int(s):04d}.png", "zero padding"),
    file_name("upper case", lambda s: f"{s}.PNG", "must be .png files, not .PNG"),
    file_name("JPEG names", lambda s: f"{s}.jpg", "must be .png files, not .jpg"),
    file_name("prefix", lambda s: f"mask_{s}.png", "names have an addition"),
    Fault(
        "mevis",
        "too many frames",
        ("unexpected",),
        "unexpected",
        "more frames than the corpus has",
        lambda s: shutil.copy(s.mask(), s.folder / "00025.png"),
    ),
    Fault(
        "mevis",
        "arrays",
        ("unexpected",),
        "unexpected",
        "not .npy",
        lambda s: np.save(s.folder / "masks.npy", np.zeros(3)),
    ),
    Fault(
        "mevis",
        "unknown expression",
        (),
        "unexpected",
        "17",
        lambda s: shutil.copytree(s.folder, s.folder.with_name("17")),
        (),
    ),
    Fault(
        "mevis",
        "mask beside the expressions",
        (),
        "unexpected",
        "masks lie in",
        lambda s: shutil.copy(s.mask(), s.root / s.video / "00000.png"),
        (),
    ),
    # traces
    trace("no JSON", lambda s: s.write_trace(b"{not json"), "JSONDecodeError"),
    trace("not UTF-8", lambda s: s.write_trace(b"\xff\xfe\x00"), "cannot be read"),
    trace("nested", lambda s: s.write_trace(b"[" * 100_000), "RecursionError"),
    trace("long number", lambda s: s.write_trace(b"9" * 9_999), "cannot be read"),
    trace("a list", lambda s: s.write_trace(b"[]"), "valid dictionary"),
    trace("no keys", lambda s: s.write_trace(b"{}"), "Field required"),
    trace("keyframe beyond the end", lambda s: s.trace(keyframe=5), "beyond the video's 5 frames"),
    trace("first keyframe beyond", lambda s: s.trace(initial_keyframe=99), "beyond the video's"),
    trace("negative keyframe", lambda s: s.trace(keyframe=-1), "keyframe"),
    trace("NaN keyframe", lambda s: s.trace(keyframe=float("nan")), "keyframe"),
    trace("boolean keyframe", lambda s: s.trace(keyframe=True), "keyframe"),
    trace("text for rounds", lambda s: s.trace(rounds="3"), "rounds"),
    trace("short box", lambda s: s.trace(boxes_source=[[0, 0, 1]]), "boxes_source.0"),
    trace("infinite box", lambda s: s.trace(boxes_source=[[0, 0, 1, 1e999]]), "boxes_source.0.3"),
    trace("boxes by name", lambda s: s.trace(boxes_source={"a": 1}), "boxes_source"),
    trace("no segmenter", lambda s: s.trace(segmenter=None), "segmenter"),
    # ground truth as run lengths
    rle("list too short", lambda m: m.pop(), "mask_count"),
    rle("list too long", lambda m: m.append(None), "mask_count"),
    rle("empty list", lambda m: m.clear(), "mask_count"),
    rle("other size", set_mask({"size": [31, 44], "counts": [31 * 44]}), "mask_size"),
    rle("size of text", set_entry(2, "size", ["30", 44]), "bad_rle"),
    rle("runs too long", set_entry(2, "counts", [1400]), "bad_rle"),
    rle("runs truncated", lambda m: m[2].update(counts=m[2]["counts"][:-2]), "bad_rle"),
    rle("invalid character", set_entry(2, "counts", "0 1"), "bad_rle"),
    rle("negative runs", set_entry(2, "counts", [-5, 1325]), "bad_rle"),
    rle("gigantic size", set_mask({"size": [10**9, 10**9], "counts": [1]}), "bad_rle"),
    rle("text instead of a mask", set_mask("mask"), "bad_rle"),
    Fault(
        "mevis",
        "annotation missing",
        ("defective",),
        "defects",
        "absent_object",
        lambda s: s.world.edit_masks(lambda m: m.pop(s.annotation)),
        ("0", "1"),
    ),
    Fault(
        "mevis",
        "annotation not a list",
        ("defective",),
        "defects",
        "absent_object",
        lambda s: s.world.edit_masks(lambda m: m.update({s.annotation: {"a": 1}})),
        ("0", "1"),
    ),
    jpeg_fault("missing", lambda s: s.jpeg().unlink(), "missing_frame"),
    jpeg_fault("truncated", lambda s: s.jpeg().write_bytes(b"\xff\xd8\xff"), "frame"),
    jpeg_fault("other size", lambda s: Image.new("RGB", (44, 31)).save(s.jpeg()), "frame_size"),
    # ground truth as label images
    label("davis17", "label missing", lambda s: s.label().unlink(), "missing_mask"),
    label("davis17", "label broken", lambda s: s.label().write_bytes(b"x"), "unreadable_mask"),
    label("davis17", "label of another size", lambda s: white(s.label(), (44, 31)), "mask_size"),
    label(
        "davis17",
        "RGB label",
        lambda s: Image.open(s.label()).convert("RGB").save(s.label()),
        "not_a_palette_png",
    ),
    label("davis17", "no labels", lambda s: shutil.rmtree(s.label().parent), "missing_mask"),
    label("reasonvos", "label broken", lambda s: s.label().write_bytes(b""), "unreadable_mask"),
    label(
        "reasonvos",
        "no labels",
        lambda s: shutil.rmtree(s.label().parent),
        "no frame of the video has a mask image",
    ),
    Fault(
        "davis17",
        "object that no frame shows",
        ("defective",),
        "defects",
        "no frame shows the target (9)",
        revos_entry("0", obj_id="9"),
    ),
    Fault(
        "davis17",
        "clip without frames",
        ("defective", "unexpected"),  # no frame has the names of its masks
        "defects",
        "the video has no frames",
        lambda s: s.entry(lambda v: v.update(frames=[])),
        ("0", "1", "2", "3", "4"),
    ),
    Fault(
        "ref-youtube-vos",
        "sentence of no object",
        ("defective",),
        "defects",
        "no file names the object",
        lambda s: s.entry(lambda v: v["expressions"]["0"].pop("obj_id")),
    ),
    Fault(
        "reasonvos",
        "an id twice",
        ("defective",),
        "defects",
        "have this id",
        lambda s: s.entry(lambda v: v["expressions"][1].update(exp_id="0")),
        ("0",),
    ),
    Fault(
        "revos",
        "type without its object",
        ("defective",),
        "defects",
        "there is no object",
        revos_entry("0", obj_id=[], anno_id=[]),
    ),
    Fault(
        "revos",
        "object of an expression without a target",
        ("defective",),
        "defects",
        "type_id is 2",
        revos_entry("0", type_id=2),
    ),
]


def mentions(entry: Any, fault: Fault, site: Site) -> bool:
    """Return True if an entry of a result's list is about the fault's clip and says `text`."""
    shown = entry if isinstance(entry, str) else json.dumps(entry)
    where = (f"{site.video}/", f'"{site.video}"', f"{site.video} ", f".{site.video}.")
    if fault.listed == "defects":
        where = (*where, f'"{site.annotation}"', f'"{site.annotation}[')
    return fault.text in shown and any(name in shown for name in where)


def test_every_planted_fault_is_listed_and_counted_and_no_other_score_changes(
    make_world, make_predictions
) -> None:
    assert len({(f.layout, f.name) for f in FAULTS}) == len(FAULTS) >= 40
    for layout in dict.fromkeys(fault.layout for fault in FAULTS):
        check(layout, [f for f in FAULTS if f.layout == layout], make_world, make_predictions)


def check(layout: str, faults: list[Fault], make_world, make_predictions) -> None:
    world = make_world(layout, n_videos=len(faults) + 1)  # the last clip has no fault
    root, _ = make_predictions(world)
    before = evaluate(layout, world.root, world.split, root)
    assert not any(before[key] for key in ("missing", "faults", "unexpected", "defects"))
    sites = [Site(world, root, world.videos[k], k) for k in range(len(faults))]
    for fault, site in zip(faults, sites, strict=True):
        fault.plant(site)
    after = evaluate(layout, world.root, world.split, root, workers=2)
    unlisted = [
        fault.name
        for fault, site in zip(faults, sites, strict=True)
        if not any(mentions(entry, fault, site) for entry in after[fault.listed])
    ]
    assert not unlisted, layout

    touched: dict[tuple[str, str], tuple[Kind, ...]] = {
        (site.video, e): f.kinds
        for f, site in zip(faults, sites, strict=True)
        for e in f.expressions
    }
    rows = after["per_expression"]
    assert len(rows) == len(before["per_expression"]) == after["n_expressions"]
    for old, new in zip(before["per_expression"], rows, strict=True):
        kinds = touched.get((new["video"], new["expression_id"]), ())
        flags = {
            "unusable": new["n_unusable_frames"] > 0,
            "unexpected": new["unexpected"],
            "trace": "trace_fault" in new,
            "defective": new["defective"],
        }
        name = f"{layout}: {new['video']}/{new['expression_id']}"
        assert {kind for kind, flag in flags.items() if flag} == set(kinds), name
        if kinds in ((), ("trace",)):
            assert {**new, "trace_fault": None} == {**old, "trace_fault": None}, name
    for kind, counter in COUNTERS.items():
        expected = sum(kind in touched.get((r["video"], r["expression_id"]), ()) for r in rows)
        assert after[counter] == expected, f"{layout}: {counter}"


@pytest.mark.parametrize("dataset", ["mevis", "revos"])
def test_a_mask_file_that_is_no_json_names_the_file(
    dataset: str, make_world, make_predictions
) -> None:
    """Without it nothing can be scored: this is an error of the input, not of an expression."""
    from rcot_rl.errors import InputError

    world = make_world(dataset, n_videos=1)
    root, _ = make_predictions(world)
    (world.base / "mask_dict.json").write_text('{"0": [')
    with pytest.raises(InputError, match=r"mask_dict\.json"):
        evaluate(dataset, world.root, world.split, root)
