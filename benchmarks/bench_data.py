"""`rcot data build` against its limit: decoding the masks that decide and the chosen frames.

    python benchmarks/bench_data.py [--videos 60] [--rows 480] [--side 720]

Makes corpora in the three training layouts with frames `side` pixels high (toy clips, enlarged),
builds shards at the paper's canvas in one process, and decodes alone what the build had to decode:
every mask once, since the largest decides (section 3.4), and the frame and the targets' masks
of every row. Prints both, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from hotcoco import mask as coco
from PIL import Image

from data_pipelines.build import build, open_corpora
from data_pipelines.corpora.base import read_labels
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.data import CorpusRef, DataSection, SetSize

LAYOUTS = ("ref-youtube-vos", "mevis", "revos")


def enlarge(root: Path, layout: str, height: int) -> None:
    """Frames and masks of a toy corpus, `height` pixels high."""
    for path in root.rglob("*.jpg"):
        image = cv2.imread(str(path))
        size = (round(image.shape[1] * height / image.shape[0]), height)
        noise = np.random.default_rng(0).integers(-6, 7, (size[1], size[0], 3))
        big = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(int) + noise
        cv2.imwrite(str(path), np.clip(big, 0, 255).astype(np.uint8))
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            size = (round(image.width * height / image.height), height)
            image.resize(size, Image.Resampling.NEAREST).save(path)
    for path in root.rglob("mask_dict.json"):
        masks = json.loads(path.read_text())
        big = {a: [_big_rle(m, height) for m in listed] for a, listed in masks.items()}
        path.write_text(json.dumps(big))


def _big_rle(rle: dict | None, height: int) -> dict | None:
    if rle is None:
        return None
    mask = coco.decode(rle)
    size = (round(mask.shape[1] * height / mask.shape[0]), height)
    big = cv2.resize(np.ascontiguousarray(mask), size, interpolation=cv2.INTER_NEAREST)
    done = coco.encode(np.asfortranarray(big))
    return {"size": list(done["size"]), "counts": done["counts"].decode()}


def limit(data: DataSection, shards: Path) -> tuple[float, float]:
    """(seconds of decoding every mask, of decoding the rows' frames and masks)."""
    import pyarrow.parquet as pq

    corpora = {c.dataset: c for c in open_corpora(data)}
    started = time.perf_counter()
    for corpus in corpora.values():
        for video in corpus.videos():
            annos = {a for e in video.expressions for a in e.anno_ids}
            for t in range(len(video.frames)):
                for anno in annos:
                    corpus.object_mask(video.id, anno, t)
    masks = time.perf_counter() - started
    read_labels.cache_clear()
    started = time.perf_counter()
    for shard in sorted(shards.rglob("*.parquet")):
        for row in pq.read_table(shard, columns=["extra_info"]).to_pylist():
            info = row["extra_info"]
            corpus = corpora[info["dataset"]]
            video = corpus.video(info["video"])
            cv2.imread(str(corpus.frame_path(video.id, info["frame"])))
            if info["task"] == "ktg":
                expression = next(e for e in video.expressions if e.id == info["expression_id"])
                for anno in expression.anno_ids:
                    corpus.object_mask(video.id, anno, info["frame_index"])
    return masks, time.perf_counter() - started


def main() -> None:
    """Prints one line a measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--side", type=int, default=720)
    parser.add_argument("--format", default="jpeg", choices=("jpeg", "png"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        for layout in LAYOUTS:
            root = folder / layout
            write_corpus(root, layout, "train", options.videos // 3, 1, "rich", workers=2)
            enlarge(root, layout, options.side)
        data = DataSection(
            corpora=[CorpusRef(dataset=d, root=str(folder / d)) for d in LAYOUTS],
            sets={
                "sft-x": SetSize(ktg=options.rows // 4, aks=options.rows // 4),
                "grpo-x": SetSize(ktg=options.rows // 4, aks=options.rows // 4),
            },
            image_format=options.format,
            allow_smaller=True,
        )
        limit(data, folder / "none")  # the page cache holds all files, for both
        started = time.perf_counter()
        built = build(data, folder / "out", "qwen")
        whole = time.perf_counter() - started
        rows = sum(m["rows"]["train"] for m in built["sets"].values())
        masks, chosen = limit(data, folder / "out")
        print(f"{rows} rows, frames {options.side} high, canvas 840, {options.format}, one process")
        print(f"build                          {whole:8.2f} s")
        print(f"limit: all masks               {masks:8.2f} s")
        print(f"limit: rows' frames and masks  {chosen:8.2f} s")
        print(f"ratio                          {whole / (masks + chosen):8.2f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
