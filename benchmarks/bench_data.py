"""Compare `rcot data build` with its lower bound: decoding the necessary frames and masks once.

    python benchmarks/bench_data.py [--side 720] [--published] [--videos 60] [--rows 400]

Writes corpora in the three training layouts with frames `side` pixels high (enlarged toy clips of
about one bit per pixel, like published ones), builds shards at the paper's canvas in one process,
and then only decodes, each once, what the build had to read: all masks, since the largest one
decides (section 3.4), and the frames of rows. The baseline decodes with the usual libraries: JPEG
with OpenCV, label images with Pillow, run-length masks with hotcoco. `strict` is a lower bound:
label images with the build's own reader, and only the run-length masks of rows, since areas need no
decoding. Times are CPU seconds, the smallest of `--repeats`, so that other processes change little.
The other work of the build is timed too. At full size:

    python benchmarks/bench_data.py --videos 576 --copies 10 --rows 38000 --repeats 1 [--published]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as coco
from PIL import Image

from data_pipelines.build import build
from data_pipelines.corpora import Corpus
from data_pipelines.corpora.label_png import read_labels
from data_pipelines.geometry import ground, to_canvas
from data_pipelines.planning.survey import open_corpora
from data_pipelines.rows import encode
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

TOY = {"ref-youtube-vos": (1 / 3, 0), "mevis": (1 / 3, 0), "revos": (1 / 3, 0)}
PUBLISHED = {"ref-youtube-vos": (0.60, 27), "mevis": (0.29, 79), "revos": (0.11, 27)}
"""Layout -> (share of the videos, frames per clip; 0 for those of the toy clip).

Of 5,759 training videos, 3,471 are from Ref-YouTube-VOS and 1,662 from MeViS; clips of ReVOS come
from several sources.
"""


def enlarge(root: Path, height: int) -> None:
    """Enlarge frames and masks of a toy corpus to `height` pixels."""
    for path in root.rglob("*.jpg"):
        image = cv2.imread(str(path))
        assert image is not None, path
        size = (round(image.shape[1] * height / image.shape[0]), height)
        noise = np.random.default_rng(0).integers(-4, 5, (size[1], size[0], 3))
        big = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(int) + noise
        quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
        cv2.imwrite(str(path), np.clip(big, 0, 255).astype(np.uint8), quality)
    for path in root.rglob("*.png"):
        with Image.open(path) as label:
            size = (round(label.width * height / label.height), height)
            label.resize(size, Image.Resampling.NEAREST).save(path)
    for path in root.rglob("mask_dict.json"):
        masks = json.loads(path.read_text())
        enlarged = {a: [_big_rle(m, height) for m in listed] for a, listed in masks.items()}
        path.write_text(json.dumps(enlarged))


def _big_rle(rle: dict | None, height: int) -> dict | None:
    if rle is None:
        return None
    mask = coco.decode(rle)
    size = (round(mask.shape[1] * height / mask.shape[0]), height)
    big = cv2.resize(np.ascontiguousarray(mask), size, interpolation=cv2.INTER_NEAREST)
    encoded = coco.encode(np.asfortranarray(big, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def lengthen(root: Path, frames: int) -> None:
    """Lengthen clips to `frames` frames by playing them backwards and forwards, as links."""
    for path in root.rglob("meta_expressions*.json"):
        document = json.loads(path.read_text())
        for name, video in document["videos"].items():
            stems = video["frames"]
            order = _there_and_back(len(stems), frames)
            longer = stems + [f"again{k:05d}" for k in range(len(stems), frames)]
            for kind in ("JPEGImages", "Annotations"):
                for folder in root.rglob(f"{kind}/{name}"):
                    end = next(folder.iterdir()).suffix
                    for k in range(len(stems), frames):
                        (folder / (longer[k] + end)).symlink_to(stems[order[k]] + end)
            video["frames"] = longer[:frames]
        path.write_text(json.dumps(document))
    for path in root.rglob("mask_dict.json"):
        masks = json.loads(path.read_text())
        longer = {a: [m[t] for t in _there_and_back(len(m), frames)] for a, m in masks.items()}
        path.write_text(json.dumps(longer))


def multiply(root: Path, copies: int) -> None:
    """Give every clip `copies` names, as links."""
    tables = [*root.rglob("meta_expressions*.json"), root / "toy.json"]
    for path in tables:
        document = json.loads(path.read_text())
        videos = document["videos"]
        document["videos"] = {f"{n}{_copy(k)}": v for k in range(copies) for n, v in videos.items()}
        path.write_text(json.dumps(document))
    for name in videos:
        for kind in ("JPEGImages", "Annotations"):
            for folder in root.rglob(f"{kind}/{name}"):
                for k in range(1, copies):
                    link = folder.with_name(f"{folder.name}{_copy(k)}")
                    link.symlink_to(folder.name, target_is_directory=True)


def _copy(number: int) -> str:
    return f"-copy{number}" if number else ""


def _there_and_back(n: int, length: int) -> list[int]:
    period = max(2 * n - 2, 1)
    return [min(k % period, period - k % period) for k in range(length)]


@dataclass
class RowContent:
    """Frames and masks in the rows of a build, each once."""

    frames: list[tuple[Corpus, str, str]]
    masks: list[tuple[Corpus, str, str, int]]
    """(corpus, video, annotation, frame index) of KTG rows."""


def row_content(corpora: dict[str, Corpus], shards: Path) -> RowContent:
    """Read the content of rows from the parquet files."""
    import pyarrow.parquet as pq

    frames: dict[Any, None] = {}
    masks: dict[Any, None] = {}
    for shard in sorted(shards.rglob("*.parquet")):
        for row in pq.read_table(shard, columns=["extra_info"]).to_pylist():
            info = row["extra_info"]
            corpus = corpora[info["dataset"]]
            video = corpus.video(info["video"])
            frames[corpus, video.id, info["frame"]] = None
            if info["task"] == "ktg":
                expression = corpus.expression(video, info["expression_id"])
                for anno in expression.anno_ids:
                    masks[corpus, video.id, anno, info["frame_index"]] = None
    return RowContent(list(frames), sorted(masks, key=lambda m: (m[0].dataset, m[1], m[3], m[2])))


def cpu(work: Callable[[], object], repeats: int) -> float:
    """Return the smallest CPU seconds of `work` in this process."""
    best = float("inf")
    for _ in range(repeats):
        read_labels.cache_clear()
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def each(work: Callable[[Any], object], items: Sequence[Any]) -> None:
    """Call `work` on each item without keeping results, which would need new memory."""
    for item in items:
        work(item)


def by_pillow(path: str) -> np.ndarray:
    """Read a label image with Pillow."""
    with Image.open(path) as image:
        return np.asarray(image)


def all_masks(corpus: Corpus, labels: Callable[[str], np.ndarray] = read_labels) -> None:
    """Decode every mask that an expression needs; each label image once."""
    root = getattr(corpus, "annotations_root", None)
    for video in corpus.videos():
        annos = sorted({a for e in video.expressions for a in e.anno_ids})
        for t in range(len(video.frames)):
            for anno in annos:
                if not corpus.disjoint:
                    corpus.object_mask(video.id, anno, t)
            if corpus.disjoint and annos:
                labels(f"{root}/{video.id}/{video.frames[t]}.png")


def row_masks(masks: list[tuple[Corpus, str, str, int]]) -> None:
    """Decode the masks of KTG rows."""
    for corpus, video, anno, index in masks:
        corpus.object_mask(video, anno, index)


def report(data: DataSection, out: Path, repeats: int) -> None:
    """Build, decode and print one line per measure."""
    built: dict[str, Any] = {}

    def whole() -> None:
        shutil.rmtree(out, ignore_errors=True)
        built.update(build(data, out, "qwen"))

    cpu(whole, 1)  # warm up imports and the page cache
    seconds = cpu(whole, repeats)
    corpora = {c.dataset: c for c in open_corpora(data)}
    content = row_content(corpora, out)
    images = [c for c in corpora.values() if c.disjoint]
    others = [c for c in corpora.values() if not c.disjoint]
    labels = cpu(lambda: each(all_masks, images), repeats)
    pillow = cpu(lambda: each(lambda c: all_masks(c, by_pillow), images), repeats)
    runs = cpu(lambda: each(all_masks, others), repeats)
    in_rows = [m for m in content.masks if not m[0].disjoint]
    runs_in_rows = cpu(lambda: row_masks(in_rows), repeats)
    frames = cpu(lambda: each(lambda f: f[0].frame(*f[1:]), content.frames), repeats)
    literal = frames + cpu(lambda: row_masks(content.masks), repeats)
    print(f"build                                    {seconds:8.2f} s")
    print(f"decoding {len(content.frames):6} frames of rows           {frames:8.2f} s")
    print(f"decoding label images                    {pillow:8.2f} s ({labels:.2f} as the build)")
    print(f"decoding run-length masks                {runs:8.2f} s ({runs_in_rows:.2f} of rows)")
    strict = frames + labels + runs_in_rows
    print(f"ratio to all masks and rows' frames      {seconds / (frames + pillow + runs):8.2f}")
    print(f"  strict (see above)                     {seconds / strict:8.2f}")
    print(f"  to rows' masks and frames alone        {seconds / literal:8.2f}")
    rows = sum(m["rows"]["train"] for m in built["sets"].values())
    _rest(content, data, rows, seconds, strict, repeats)


def _rest(
    content: RowContent, data: DataSection, rows: int, seconds: float, limit: float, repeats: int
) -> None:
    """Print the seconds of the build's other work, and what remains."""
    some = [c.frame(v, f) for c, v, f in content.frames[:100]]
    share = len(content.frames) / len(some)
    images = [to_canvas(f, 840) for f in some]
    files = [encode(i, data.image_format) for i in images]
    resizing = share * cpu(lambda: each(lambda f: to_canvas(f, 840), some), repeats)
    encoding = share * cpu(lambda: each(lambda i: encode(i, data.image_format), images), repeats)
    hashing = cpu(lambda: each(lambda f: hashlib.sha256(f).digest(), files), repeats) / len(files)
    hashing *= 2 * rows  # once for the row, once inside its parquet file
    masks = [c.object_mask(v, a, t) for c, v, a, t in content.masks[:200]]
    masks = [m for m in masks if m is not None and m.any()]
    circles = cpu(lambda: each(lambda m: ground(m, 840), masks), repeats) / len(masks)
    circles *= len(content.masks)
    left = seconds - limit - resizing - encoding - hashing - circles
    print(
        f"beyond decoding, {rows} rows: resizing {resizing:.2f}, encoding {encoding:.2f}, "
        f"sha256 {hashing:.2f}, boxes and points {circles:.2f}, all else {left:.2f} s"
    )


def main() -> None:
    """Write corpora and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument(
        "--rows", type=int, default=400, help="38,000 rows of 5,759 videos are 6.6 per video"
    )
    parser.add_argument("--copies", type=int, default=1, help="names of each clip")
    parser.add_argument("--side", type=int, default=720)
    parser.add_argument(
        "--published", action="store_true", help="use the proportions of the published corpora"
    )
    parser.add_argument("--format", default="jpeg", choices=("jpeg", "png"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        for layout, (share, frames) in (PUBLISHED if options.published else TOY).items():
            root = folder / layout
            write_corpus(root, layout, "train", round(options.videos * share), 1, "rich", workers=2)
            enlarge(root, options.side)
            if frames:
                lengthen(root, frames)
            if options.copies > 1:
                multiply(root, options.copies)
        # the paper's proportions: KTG 26,000, AKS 12,000
        ktg, aks = round(options.rows * 0.684), round(options.rows * 0.316)
        data = DataSection(
            corpora=[
                CorpusRef.model_validate({"dataset": d, "root": str(folder / d)}) for d in TOY
            ],
            sets={
                "sft-x": SetSize(ktg=round(ktg * 0.77), aks=round(aks * 0.67)),
                "grpo-x": SetSize(ktg=round(ktg * 0.23), aks=round(aks * 0.33)),
            },
            image_format=options.format,
            allow_smaller=True,
        )
        proportions = "published" if options.published else "toy"
        print(f"frames {options.side} high, canvas 840, {options.format}, {proportions} clips")
        report(data, folder / "out", options.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
