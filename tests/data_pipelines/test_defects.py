"""Every defect planted in the three training layouts is reported, and costs nothing else."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.build import build as build_shards
from data_pipelines.planning.candidates import POOLS, candidates
from data_pipelines.planning.scan import VideoFacts
from data_pipelines.planning.survey import open_corpora, scan
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

build = partial(build_shards, canvas=56)

LAYOUTS = ("ref-youtube-vos", "mevis", "revos")
VIDEOS = {"ref-youtube-vos": 24, "mevis": 24, "revos": 20}
SINGLE = ("0", "1", "2")


@dataclass(frozen=True)
class Place:
    """The files and documents of one video of a corpus."""

    layout: str
    root: Path
    video: str
    meta: dict[str, Any]
    """The whole document of expressions; changed in place."""
    masks: dict[str, Any] | None
    """mask_dict.json, where the layout has one."""

    @property
    def entry(self) -> dict[str, Any]:
        return self.meta["videos"][self.video]

    @property
    def base(self) -> Path:
        return self.root if self.layout == "revos" else self.root / "train"

    def jpeg(self, index: int) -> Path:
        return self.base / "JPEGImages" / self.video / f"{self.entry['frames'][index]}.jpg"

    def png(self, index: int) -> Path:
        return self.base / "Annotations" / self.video / f"{self.entry['frames'][index]}.png"

    def key(self, rest: str = "") -> str:
        """Return the dotted key of this video's entry, or of a part of it."""
        return f"videos.{self.video}" + (f".{rest}" if rest else "")

    def anno(self, k: int) -> str:
        """Return the k-th object's annotation: expressions k, 3 (of 0 and 1) and 4 (all)."""
        return str(self.entry["expressions"][str(k)]["anno_id"][0])

    def seen(self, k: int) -> int:
        """Return a frame in which the k-th object has a mask."""
        assert self.masks is not None
        return next(t for t, m in enumerate(self.masks[self.anno(k)]) if m is not None)


@dataclass(frozen=True)
class Planted:
    """The manifest's expected entry of a defect, and what it may cost."""

    reason: str
    where: str
    """Part of the defect's place."""
    expressions: tuple[str, ...] = ()
    """Each must be reported once. Empty if the defect is a frame's or the video's."""
    frame: int | None = None
    """The lost frame; None without expressions: the whole video is lost."""
    video: str | None = None
    """The video's name, if planting changed it."""


Plant = Callable[[Place], Planted]


def _of_object(k: int) -> tuple[str, ...]:
    return tuple(sorted({str(k), "4", *(("3",) if k < 2 else ())}))


def _frame(change: Callable[[Path], Any], reason: str, index: int = 2) -> Plant:
    def plant(place: Place) -> Planted:
        path = place.jpeg(index)
        change(path)
        return Planted(reason, str(path), frame=index)

    return plant


def _label(change: Callable[[Path], Any], reason: str, index: int = 3) -> Plant:
    def plant(place: Place) -> Planted:
        path = place.png(index)
        change(path)
        where = f"{place.video} {path.stem} object" if reason == "mask_size" else str(path)
        return Planted(reason, where, SINGLE)

    return plant


def _rle(change: Callable[[dict], Any], reason: str = "bad_rle", k: int = 0) -> Plant:
    """Replace one mask of the k-th object by the result of `change`."""

    def plant(place: Place) -> Planted:
        assert place.masks is not None
        anno, at = place.anno(k), place.seen(k)
        mask = place.masks[anno][at]
        changed = change(dict(mask))
        assert changed != mask
        place.masks[anno][at] = changed
        stem = place.entry["frames"][at]
        size = f"{place.video} {stem} object {anno}"
        where = size if reason == "mask_size" else f"mask_dict.json {anno}[{at}]"
        return Planted(reason, where, _of_object(k))

    return plant


def _listed(change: Callable[[dict, str], Any], reason: str, k: int = 1) -> Plant:
    """Change mask_dict.json at the annotation of the k-th object."""

    def plant(place: Place) -> Planted:
        assert place.masks is not None
        anno = place.anno(k)
        change(place.masks, anno)
        return Planted(reason, f"mask_dict.json {anno}", _of_object(k))

    return plant


def _expression(change: Callable[[dict, str], Any], key: str = "", absent: str = "") -> Plant:
    """Change the entry of expression 1.

    Args:
        change: Changes the entry, in place.
        key: What the place of the defect must name below the entry.
        absent: The place to expect if the entry then names an object that does not exist.
    """

    def plant(place: Place) -> Planted:
        change(place.entry["expressions"], "1")
        if absent:
            return Planted("absent_object", absent.format(place.video), ("1",))
        return Planted("bad_metadata", place.key(f"expressions.1{key}"), ("1",))

    return plant


def _video(change: Callable[[dict, str], Any], key: str) -> Plant:
    """Change the entry of a video."""

    def plant(place: Place) -> Planted:
        change(place.meta["videos"], place.video)
        return Planted("bad_metadata", place.key() + key)

    return plant


def _renamed(to: str) -> Plant:
    def plant(place: Place) -> Planted:
        place.meta["videos"][to] = place.meta["videos"].pop(place.video)
        return Planted("bad_metadata", f"videos.{to}", video=to)

    return plant


def _resized(place: Place) -> Planted:
    """Change the size of an image.

    The image or its masks have the wrong size, so the masks are dropped.
    """
    assert place.masks is not None
    at = place.seen(0)
    cv2.imwrite(str(place.jpeg(at)), np.zeros((35, 52, 3), np.uint8))
    seen = [k for k in range(3) if place.masks[place.anno(k)][at] is not None]
    touched = tuple(sorted({e for k in seen for e in _of_object(k)}))
    return Planted("mask_size", f"{place.video} {place.entry['frames'][at]} object", touched)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _save(array: np.ndarray) -> Callable[[Path], Any]:
    return lambda path: Image.fromarray(array).save(path)


def _set(key: str, value: Any) -> Callable[[dict, str], Any]:
    return lambda entries, name: entries[name].__setitem__(key, value)


def _replace(value: Any) -> Callable[[dict, str], Any]:
    return lambda entries, name: entries.__setitem__(name, value)


def _remove(key: str) -> Callable[[dict, str], Any]:
    return lambda entries, name: entries[name].pop(key)


def _counts(change: Callable[[str], Any]) -> Callable[[dict], dict]:
    return lambda rle: {**rle, "counts": change(rle["counts"])}


def _huge_png(path: Path) -> None:
    """Return a label image that declares 65,000 x 65,000 pixels."""
    data = bytearray(path.read_bytes())
    data[16:24] = (65000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)


_WORDS = b"this is not an image"
_DEFECTS: dict[str, dict[str, Plant]] = {
    "ref-youtube-vos": {
        "missing JPEG": _frame(Path.unlink, "missing_frame"),
        "truncated JPEG": _frame(_cut, "truncated_frame"),
        "JPEG of no bytes": _frame(lambda p: p.write_bytes(b""), "unreadable_frame"),
        "text for a JPEG": _frame(lambda p: p.write_bytes(_WORDS), "unreadable_frame"),
        "folder for a JPEG": _frame(_as_folder, "unreadable_frame"),
        "missing PNG": _label(Path.unlink, "missing_mask"),
        "truncated PNG": _label(_cut, "unreadable_mask"),
        "PNG of no bytes": _label(lambda p: p.write_bytes(b""), "unreadable_mask"),
        "text for a PNG": _label(lambda p: p.write_bytes(_WORDS), "unreadable_mask"),
        "folder for a PNG": _label(_as_folder, "unreadable_mask"),
        "PNG of a huge size": _label(_huge_png, "unreadable_mask"),
        "RGB PNG": _label(_save(np.zeros((36, 52, 3), np.uint8)), "not_a_palette_png"),
        "16-bit PNG": _label(_save(np.zeros((36, 52), np.uint16)), "not_a_palette_png"),
        "PNG of another size": _label(_save(np.zeros((36, 51), np.uint8)), "mask_size"),
        "object of another kind": _expression(_set("obj_id", True), ".obj_id"),
        "object beyond the palette": _expression(_set("obj_id", "256"), absent="{} 256"),
        "object is the background": _expression(_set("obj_id", "0"), absent="{} 0"),
        "object in no label image": _expression(_set("obj_id", "77"), absent="{} 77"),
        "object that is no number": _expression(_set("obj_id", "²"), absent="{} ²"),
        "no object": _expression(_remove("obj_id"), ".obj_id"),
        "frames listed twice": _video(lambda v, n: v[n]["frames"].append("00000"), ".frames"),
    },
    "mevis": {
        "bad digits": _rle(_counts(lambda c: "~" + c)),
        "digits beyond ASCII": _rle(_counts(lambda c: c + "é")),
        "cut inside a number": _rle(_counts(lambda c: c + "P")),
        "runs too short": _rle(_counts(lambda c: c + "O1")),
        "runs too long": _rle(lambda r: {**r, "counts": [36 * 52, 1]}),
        "negative run": _rle(lambda r: {**r, "counts": [36 * 52 + 1, -1]}),
        "negative run in text": _rle(_counts(lambda c: "O" + c)),
        "huge size": _rle(lambda r: {**r, "size": [1 << 31, 1 << 31]}),
        "size of words": _rle(lambda r: {**r, "size": ["36", "52"]}),
        "one number as size": _rle(lambda r: {**r, "size": 36}),
        "counts not text": _rle(_counts(lambda c: 3.5)),
        "no counts": _rle(lambda r: {"size": r["size"]}),
        "no size": _rle(lambda r: {"counts": r["counts"]}),
        "text for a mask": _rle(lambda r: r["counts"]),
        "mask on its side": _rle(lambda r: {**r, "size": [52, 36]}, "mask_size"),
        "too few masks": _listed(lambda m, a: m[a].pop(), "mask_count"),
        "too many masks": _listed(lambda m, a: m[a].append(None), "mask_count"),
        "null for masks": _listed(_replace(None), "absent_object"),
        "no such annotation": _listed(lambda m, a: m.pop(a), "absent_object"),
        "JPEG of another size": _resized,
    },
    "revos": {
        "no sentence": _expression(_remove("exp"), ".exp"),
        "empty sentence": _expression(_set("exp", " \n")),
        "sentence that is no text": _expression(_set("exp", ["a", "b"]), ".exp"),
        "half a character": _expression(_set("exp", "a \ud800 b"), ".exp"),
        "lists of two lengths": _expression(_set("obj_id", [0, 1])),
        "object with two annotations": _expression(
            lambda e, n: e[n].update(
                obj_id=[1, 1], anno_id=[e["0"]["anno_id"][0]] + e[n]["anno_id"]
            )
        ),
        "annotation of two objects": _expression(
            lambda e, n: e[n].update(obj_id=[0, 1], anno_id=e[n]["anno_id"] * 2)
        ),
        "object that is a list": _expression(_set("obj_id", [[0]]), ".obj_id[0]"),
        "no annotation": _expression(_remove("anno_id"), ".anno_id"),
        "type that is text": _expression(_set("type_id", "0"), ".type_id"),
        "null for an expression": _expression(_replace(None)),
        "annotation nobody has": _expression(
            lambda e, n: e[n].update(anno_id=[777777]), absent="mask_dict.json 777777"
        ),
        "no frames": _video(_set("frames", []), ".frames"),
        "no list of frames": _video(_remove("frames"), ".frames"),
        "frame outside": _video(lambda v, n: v[n]["frames"].append("../a"), ".frames[6]"),
        "list of expressions": _video(_set("expressions", []), ".expressions"),
        "null for a video": _video(_replace(None), ""),
        "name that leads out": _renamed("UVO/../../x"),
    },
}
"""Layout -> kind of defect -> how it is planted; each in a different video."""

PLANTS = [(layout, kind) for layout, kinds in _DEFECTS.items() for kind in kinds]


def test_more_than_forty_kinds_of_defects_are_planted():
    assert len(PLANTS) >= 40
    assert all(len(_DEFECTS[d]) < VIDEOS[d] for d in LAYOUTS)


def _paths(layout: str, root: Path) -> tuple[Path, Path | None]:
    """Return the documents of expressions and of masks."""
    if layout == "ref-youtube-vos":
        return root / "meta_expressions" / "train" / "meta_expressions.json", None
    if layout == "mevis":
        return root / "train" / "meta_expressions.json", root / "train" / "mask_dict.json"
    return root / "meta_expressions_train_.json", root / "mask_dict.json"


def plant(layout: str, root: Path, kinds: Iterable[str]) -> dict[str, tuple[str, Planted]]:
    """Plant one defect per video, from the second on; return kind -> (video, expectation)."""
    meta_path, masks_path = _paths(layout, root)
    meta = json.loads(meta_path.read_text())
    masks = json.loads(masks_path.read_text()) if masks_path else None
    done = {}
    for kind, video in zip(kinds, list(meta["videos"])[1:], strict=False):
        expected = _DEFECTS[layout][kind](Place(layout, root, video, meta, masks))
        done[kind] = (video, expected)
    meta_path.write_text(json.dumps(meta))
    if masks_path is not None:
        masks_path.write_text(json.dumps(masks))
    return done


@pytest.fixture
def section(corpus_maker) -> DataSection:
    corpora = [
        CorpusRef(dataset=d, root=str(corpus_maker(d, "train", n_videos=VIDEOS[d]).root))
        for d in LAYOUTS
    ]
    sets = {"sft-x": SetSize(ktg=24, aks=16, val=4), "grpo-ktg-x": SetSize(ktg=16, val=4)}
    return DataSection(
        corpora=corpora,
        sets=sets,
        val_fraction=0.2,
        allow_smaller=True,
        zero_target_share=0.2,
        max_fault_share=1.0,
    )


def facts_of(section: DataSection) -> list[VideoFacts]:
    return scan(open_corpora(section), section.workers, 56, lambda label, done, total: None)


Available = set[tuple[str, str, str, str, int]]


def available(facts: list[VideoFacts], mode: str = "any_visible") -> Available:
    """Yield (pool, dataset, video, expression, frame) of all that a plan could draw."""
    out = set()
    for pool in POOLS:
        for c in candidates(facts, range(len(facts)), pool, mode, [0]):
            video = facts[c.video]
            name = video.expressions[c.expression].id
            out.add((pool, video.dataset, video.video, name, c.frame))
    return out


def lost(defect: Planted, expression: str, frame: int) -> bool:
    """Return True if a defect may cost this instance of its video."""
    if defect.expressions:
        return expression in defect.expressions
    return defect.frame is None or defect.frame == frame


def _expected(dataset: str, planted: dict[str, tuple[str, Planted]]) -> Iterator[tuple]:
    for video, defect in planted.values():
        for expression in defect.expressions or ("",):
            yield (
                dataset,
                defect.video or video,
                expression,
                defect.reason,
                defect.where,
            )


@pytest.fixture
def planted(section) -> dict[str, dict[str, tuple[str, Planted]]]:
    """Plant all defects at once, after the clean corpora were scanned."""
    done = {}
    for ref in section.corpora:
        done[ref.dataset] = plant(ref.dataset, Path(ref.root), _DEFECTS[ref.dataset])
    return done


def _compare(defects: list[dict[str, Any]], planted: dict) -> None:
    """Assert that exactly the planted defects are reported, with places, once per expression."""
    expected = [e for dataset, of in planted.items() for e in _expected(dataset, of)]
    counts = Counter((d["dataset"], d["video"], d["expression_id"], d["reason"]) for d in defects)
    assert counts == Counter(e[:4] for e in expected)
    places = {(d["dataset"], d["video"], d["expression_id"]): d["place"] for d in defects}
    for dataset, video, expression, _, where in expected:
        assert where in places[dataset, video, expression]


def test_every_defect_is_named_and_nothing_else_is_lost(section, request):
    clean = facts_of(section)
    assert not [d for f in clean for d in f.defects]
    planted = request.getfixturevalue("planted")
    assert sum(map(len, planted.values())) == len(PLANTS)
    facts = facts_of(section)
    _compare([vars(d) for f in facts for d in f.defects], planted)
    of_video = {(d, v): defect for d, of in planted.items() for v, defect in of.values()}
    for mode in ("any_visible", "largest"):
        kept = {
            (pool, dataset, video, expression, frame)
            for pool, dataset, video, expression, frame in available(clean, mode)
            if (dataset, video) not in of_video
            or not lost(of_video[dataset, video], expression, frame)
        }
        assert available(facts, mode) == kept
        assert len(kept) > 500 or mode == "largest"


def test_a_build_quarantines_defects_and_lists_them_in_the_manifest(section, planted, tmp_path):
    built = build(section, tmp_path / "out", "qwen", seed=3)
    of_video = {(d, v): defect for d, of in planted.items() for v, defect in of.values()}
    for name, manifest in built["sets"].items():
        _compare(manifest["dropped"]["defects"], planted)
        assert manifest["rows"]["train"] > 0
        rows = [
            row["extra_info"]
            for path in sorted((tmp_path / "out" / name).glob("*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        assert len(rows) == sum(manifest["rows"].values())
        for info in rows:
            defect = of_video.get((info["dataset"], info["video"]))
            at = (info["expression_id"], info["frame_index"])
            assert defect is None or not lost(defect, *at)


def test_too_many_defects_stop_the_build_before_it_writes(section, planted, tmp_path):
    strict = section.model_copy(update={"max_fault_share": 0.05})
    with pytest.raises(InputError, match=r"\d+ of \d+ expressions are defective"):
        build(strict, tmp_path / "out", "qwen")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layout", "kind"), PLANTS)
def test_a_single_defect_costs_only_what_it_affects(corpus_maker, layout, kind):
    root = corpus_maker(layout, "train", n_videos=2).root
    section = DataSection(
        corpora=[CorpusRef(dataset=layout, root=str(root))],
        sets={"grpo-x": SetSize(ktg=1)},
    )
    clean = available(facts_of(section))
    done = {layout: plant(layout, root, [kind])}
    facts = facts_of(section)
    _compare([vars(d) for f in facts for d in f.defects], done)
    ((video, defect),) = done[layout].values()
    kept = {c for c in clean if c[2] != video or not lost(defect, c[3], c[4])}
    assert available(facts) == kept < clean


@pytest.mark.parametrize("images", [5, 0])
def test_masks_of_two_sizes_without_an_image_are_defects(corpus_maker, images):
    root = corpus_maker("mevis", "train", n_videos=1).root
    meta_path, masks_path = _paths("mevis", root)
    masks = json.loads((masks_path or root).read_text())
    video, entry = next(iter(json.loads(meta_path.read_text())["videos"].items()))
    first, second = (str(entry["expressions"][k]["anno_id"][0]) for k in "01")
    masks[first][2] = {"size": [36, 52], "counts": [0, 36 * 52]}
    masks[second][2] = {"size": [3, 5], "counts": [0, 15]}
    (masks_path or root).write_text(json.dumps(masks))
    folder = root / "train" / "JPEGImages" / video
    for k, stem in enumerate(entry["frames"]):
        if k == 2 or not images:
            (folder / f"{stem}.jpg").unlink()
    section = DataSection(
        corpora=[CorpusRef(dataset="mevis", root=str(root))],
        sets={"grpo-x": SetSize(ktg=1)},
    )
    (facts,) = facts_of(section)
    counts = Counter((d.expression_id, d.reason) for d in facts.defects)
    sized = {(e, "mask_size"): 1 for e in _of_object(1)}
    assert counts == {("", "missing_frame"): 6 - images, **sized}
    assert [e.id for e in facts.expressions] == ["0", "2", "5"]
