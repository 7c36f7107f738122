"""Misplaced labels are suspect and sound ones are not, for moving shapes on textures."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.build import build as build_shards
from data_pipelines.corpora import Corpus, Video, open_corpus
from data_pipelines.planning.mask_alignment import Outline, fit_table, sam2_suspects, suspects
from data_pipelines.planning.scan import scan_video
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.data_section import AlignmentSection, CorpusRef, DataSection, SetSize
from rcot_rl.segmentation.segmenter import visiting_order

build = partial(build_shards, canvas=56)

SECTION = AlignmentSection(level="frames")
VIDEOS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, "revos", "train", VIDEOS, 11, "rich")
    return folder


def shifted(masks: list, by: int) -> list:
    return [masks[min(max(t - by, 0), len(masks) - 1)] for t in range(len(masks))]


PLANTS = {
    "shift": lambda masks: shifted(masks, 4),
    "back": lambda masks: shifted(masks, -3),
    "reverse": lambda masks: masks[::-1],
    "slow": lambda masks: [masks[t // 2] for t in range(len(masks))],
    "fast": lambda masks: [masks[min(2 * t, len(masks) - 1)] for t in range(len(masks))],
}


def _objects(corpus: Corpus, video) -> dict[str, np.ndarray]:
    annos = {a for e in video.expressions for a in e.anno_ids}
    return {
        a: np.array([corpus.object_area(video, a, t, None) for t in range(len(video.frames))])
        for a in sorted(annos)
    }


def _planted(root: Path, tmp_path: Path, change) -> Corpus:
    copy = tmp_path / "planted"
    copy.mkdir()
    for path in root.iterdir():
        if path.name != "mask_dict.json":
            (copy / path.name).symlink_to(path)
    masks = json.loads((root / "mask_dict.json").read_text())
    (copy / "mask_dict.json").write_text(json.dumps({a: change(m) for a, m in masks.items()}))
    return open_corpus("revos", copy, "train")


def _there(video: Video) -> np.ndarray:
    return np.arange(len(video.frames))


def _count_suspects(corpus: Corpus) -> tuple[int, int]:
    """Return (suspect objects, all objects)."""
    n_suspects = total = 0
    for video in corpus.videos():
        objects = _objects(corpus, video)
        total += len(objects)
        n_suspects += len(suspects(corpus, video, objects, SECTION, _there(video)))
    return n_suspects, total


def test_sound_labels_are_not_suspect(root):
    n_suspects, total = _count_suspects(open_corpus("revos", root, "train"))
    assert total > 30 and n_suspects == 0


@pytest.mark.parametrize("kind", PLANTS)
def test_masks_of_other_frames_are_suspect(root, tmp_path, kind):
    n_suspects, total = _count_suspects(_planted(root, tmp_path, PLANTS[kind]))
    assert n_suspects >= 0.75 * total


def test_drifting_masks_are_suspect(root, tmp_path, monkeypatch):
    corpus = open_corpus("revos", root, "train")
    original = type(corpus).object_mask

    def drifted(self, video_id, anno_id, t):
        mask = original(self, video_id, anno_id, t)
        return None if mask is None else np.roll(mask, (2 * t, t), (0, 1))

    monkeypatch.setattr(type(corpus), "object_mask", drifted)
    n_suspects, total = _count_suspects(corpus)
    assert n_suspects >= 0.7 * total


class Follows:
    """A propagator that returns the sound labels."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.video = None

    def segment(self, frames, key, boxes_source, points_source):
        x1, y1, x2, y2 = boxes_source[0].astype(int)
        for t in visiting_order(len(frames), key):
            masks = np.zeros((1, *frames[t].shape[:2]), dtype=bool)
            masks[0, y1:y2, x1:x2] = True
            yield t, masks


def test_sam2_disagrees_with_labels_that_move_off(root, tmp_path):
    """The box stays fixed: labels that move away from it are not confirmed, others are."""
    corpus = open_corpus("revos", root, "train")
    video = corpus.videos()[0]
    objects = _objects(corpus, video)
    strict = SECTION.model_copy(update={"min_iou": 0.99})
    lenient = SECTION.model_copy(update={"min_iou": 0.001})
    seen = [a for a, areas in objects.items() if np.count_nonzero(areas) >= 4]
    disagreeing = sam2_suspects(corpus, video, objects, strict, Follows(corpus), _there(video))
    # few sampled frames can show an object that is seen in four
    assert disagreeing and {s.anno_id for s in disagreeing} <= set(seen)
    assert all(s.code == "sam2_disagrees" and "IoU" in s.detail for s in disagreeing)
    assert len(
        sam2_suspects(corpus, video, objects, lenient, Follows(corpus), _there(video))
    ) < len(disagreeing)


def test_the_build_quarantines_suspects_and_counts_them_by_source(root, tmp_path):
    corpus = _planted(root, tmp_path, PLANTS["shift"])
    sound = tmp_path / "sound"
    write_corpus(sound, "mevis", "train", VIDEOS, 3, "rich")
    data = DataSection(
        corpora=[
            CorpusRef(dataset="revos", root=str(corpus.root)),
            CorpusRef(dataset="mevis", root=str(sound)),
        ],
        sets={"grpo-ktg-x": SetSize(ktg=24)},
        alignment=SECTION,
        max_fault_share=0.9,
        allow_smaller=True,
    )
    manifest = build(data, tmp_path / "out", "qwen")["sets"]["grpo-ktg-x"]
    dropped = manifest["dropped"]
    assert set(dropped["defects_by_reason"]) >= {"misaligned_shift"}
    assert all(source.startswith("revos/") for source in dropped["defects_by_source"])
    assert manifest["counts"]["train"].get("dataset/mevis", 0) >= 12
    assert "better, in" in dropped["defects"][0]["detail"]


def test_outlines_beyond_the_remap_limit_are_read_in_pieces(monkeypatch):
    """OpenCV accepts fewer than 2^15 points per row; the outlines of a crowd have more."""
    rng = np.random.default_rng(0)
    frames = [rng.random((60, 80, 3), np.float32) * 255 for _ in range(2)]
    unit = np.full((160, 2), np.sqrt(0.5), np.float32)
    lines = [Outline((rng.random((160, 2)) * 50).astype(np.float32), unit) for _ in range(230)]
    whole = fit_table(lines, frames)
    monkeypatch.setattr("data_pipelines.planning.mask_alignment._REMAP_POINTS", 1000)
    np.testing.assert_array_equal(fit_table(lines, frames), whole)
    assert 230 * 160 > 1 << 15


def test_missing_frames_do_not_hide_misaligned_masks(root, tmp_path):
    """Reversed labels are suspect if the first frame is missing and the last does not decode."""
    corpus = _planted(root, tmp_path, PLANTS["reverse"])
    (corpus.root / "JPEGImages").unlink()
    shutil.copytree(root / "JPEGImages", corpus.root / "JPEGImages")
    for video in corpus.videos():
        corpus.frame_path(video.id, video.frames[0]).unlink()
        last = corpus.frame_path(video.id, video.frames[-1])
        last.write_bytes(last.read_bytes()[:400] + b"\xff\xd9")
    scanned = [scan_video(corpus, 0, video, 56, SECTION) for video in corpus.videos()]
    codes = [d.reason for facts in scanned for d in facts.defects]
    assert sum(code.startswith("misaligned") for code in codes) > 20
    assert codes.count("missing_frame") == len(corpus.videos())


def test_too_few_readable_frames_are_reported(root, tmp_path):
    corpus = _planted(root, tmp_path, PLANTS["reverse"])
    (corpus.root / "JPEGImages").unlink()
    shutil.copytree(root / "JPEGImages", corpus.root / "JPEGImages")
    video = corpus.videos()[0]
    for frame in video.frames[3:]:
        corpus.frame_path(video.id, frame).unlink()
    reasons = [d.reason for d in scan_video(corpus, 0, video, 56, SECTION).defects]
    assert "alignment_not_checked" in reasons
