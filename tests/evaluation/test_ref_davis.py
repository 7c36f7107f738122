"""The official route of Ref-DAVIS17, against a direct implementation and the public code's values.

The golden values were computed once with VideoLISA's post_process_davis.py (146f2bc), which merges
the masks, and davis2017-evaluation (ac7c43f).
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

from rcot_rl.evaluation.benchmarks import evaluate, evaluate_all, evaluate_masks
from rcot_rl.evaluation.mask_baselines import BASELINES
from rcot_rl.evaluation.ref_davis import ANNOTATORS, assign_objects
from rcot_rl.monitoring.terminal.run_summary import public_lines

HEIGHT, WIDTH, FRAMES = 40, 60, 6
STEMS = [f"{t:05d}" for t in range(FRAMES)]
PUBLIC = {
    "J": (42.218664486949535, 38.55279860901847, 52.89822135082757, 56.62726868788944),
    "F": (45.55134862518854, 42.88991013616782, 62.31802203149835, 63.82799250061583),
}
"""Per annotator, in percent, for the corpus and predictions of `four`."""


@dataclass
class FourAnnotators:
    """A corpus of clips with two and three objects and four expressions for each object."""

    root: Path
    predictions: Path
    labels: dict[str, np.ndarray]
    """video -> uint8 [T, H, W], 255 void"""
    masks: dict[tuple[str, str], np.ndarray]
    """(video, expression) -> bool [T, H, W]"""

    @property
    def expressions_file(self) -> Path:
        return self.root / "meta_expressions" / "valid" / "meta_expressions.json"

    def official(self, **options: int) -> dict:
        return evaluate("davis17", self.root, "valid", self.predictions, **options)["official"]

    def save(self, video: str, expression: str) -> None:
        folder = self.predictions / video / expression
        folder.mkdir(parents=True, exist_ok=True)
        for stem, mask in zip(STEMS, self.masks[video, expression], strict=True):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{stem}.png")


def draw(rng: np.random.Generator, n_objects: int) -> np.ndarray:
    """Return labels of moving boxes, of which the last object leaves, and a void strip."""
    labels = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for k in range(n_objects):
        y, x, h, w = rng.integers(1, 12), 4 + 18 * k, rng.integers(8, 20), rng.integers(8, 15)
        for t in range(FRAMES - 2 if k == n_objects - 1 else FRAMES):
            labels[t, y + 2 * t : y + 2 * t + h, x + t : x + t + w] = k + 1
    labels[:, 18:21, 10:50] = 255
    return labels


@pytest.fixture
def four(tmp_path: Path, save_json: Callable[[Path, object], None]) -> FourAnnotators:
    world = FourAnnotators(tmp_path / "davis17", tmp_path / "predictions", {}, {})
    videos = {}
    for v, n_objects in enumerate((2, 3)):
        rng, name = np.random.default_rng([7, v]), f"clip-{v}"
        world.labels[name] = draw(rng, n_objects)
        entries = {}
        for k, a in itertools.product(range(n_objects), range(4)):
            entries[str(4 * k + a)] = {"exp": f"object {k + 1}", "obj_id": str(k + 1)}
            shift = tuple(int(s) for s in rng.integers(-6, 7, 2))
            target = np.roll(world.labels[name] == k + 1, shift, axis=(1, 2))
            if rng.random() < 0.3:
                target[1::2] = False
            world.masks[name, str(4 * k + a)] = target
        videos[name] = {"expressions": entries, "frames": STEMS}
        folder = world.root / "valid" / "Annotations" / name
        folder.mkdir(parents=True)
        for stem, label in zip(STEMS, world.labels[name], strict=True):
            image = Image.fromarray(label, mode="P")
            image.putpalette([*range(256)] * 3)  # a shorter one would be saved with fewer bits
            image.save(folder / f"{stem}.png")
    save_json(world.expressions_file, {"videos": videos})
    for pair in world.masks:
        world.save(*pair)
    return world


def edges(mask: np.ndarray) -> np.ndarray:
    """Return pixels that differ from the right, lower or lower-right neighbour in the image."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here, right, below = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1]
    return (here != right) | (here != below) | (here != padded[1:, 1:])


def frame_jf(truth: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    union = (truth | mask).sum()
    jaccard = (truth & mask).sum() / union if union else 1.0
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    of_truth, of_mask = edges(truth), edges(mask)
    if not of_truth.any() or not of_mask.any():
        return jaccard, float(of_truth.any() == of_mask.any())
    precision = (distance_transform_edt(~of_truth)[of_mask] <= radius).mean()
    recall = (distance_transform_edt(~of_mask)[of_truth] <= radius).mean()
    both = precision + recall
    return jaccard, 2 * precision * recall / both if both else 0.0


def directly(labels: np.ndarray, masks: list[np.ndarray]) -> list[tuple[float, float]]:
    """Return (J, F) of each object: every assignment is tried, pixels are merged one by one."""
    scores = np.stack([np.full(labels.shape, 0.1), *(m.astype(float) for m in masks)])
    merged = np.argmax(scores, axis=0)
    known = labels != 255
    objects = [(labels == k) & known for k in range(1, int((labels[0] * known[0]).max()) + 1)]
    proposals = [(merged == k) & known for k in range(1, merged.max() + 1)]
    proposals += [np.zeros(labels.shape, bool)] * (len(objects) - len(proposals))
    table = {
        (k, p): tuple(np.mean([frame_jf(*pair) for pair in zip(o, q, strict=True)], axis=0))
        for (k, o), (p, q) in itertools.product(enumerate(objects), enumerate(proposals))
    }
    choices = itertools.permutations(range(len(proposals)), len(objects))
    best = max(choices, key=lambda chosen: sum(sum(table[k, p]) for k, p in enumerate(chosen)))
    return [table[k, p] for k, p in enumerate(best)]


def test_figures_equal_a_direct_implementation(four: FourAnnotators) -> None:
    official = four.official()
    means = []
    for a in range(4):
        scores = []
        for video, labels in four.labels.items():
            ids = [e for v, e in four.masks if v == video and int(e) % 4 == a]
            scores += directly(labels, [four.masks[video, e] for e in ids])
        assert len(scores) == 5
        means.append(100 * np.mean(scores, axis=0))
        found = official["per_annotator"][a]
        assert found["annotator"] == ANNOTATORS[a]
        assert (found["J"], found["F"]) == pytest.approx(tuple(means[-1]), abs=1e-9)
        assert (found["n_objects"], found["n_unusable"]) == (5, 0)
    overall = np.mean(means, axis=0)
    assert (official["J"], official["F"]) == pytest.approx(tuple(overall), abs=1e-9)
    assert official["J&F"] == pytest.approx(overall.mean(), abs=1e-9)
    assert official["reason"] is None
    (line,) = public_lines({"official": official})
    assert line.endswith(f"J&F {official['J&F']:.1f}, J {official['J']:.1f}, F {official['F']:.1f}")


def test_figures_equal_the_public_code(four: FourAnnotators) -> None:
    found = four.official()["per_annotator"]
    for key, expected in PUBLIC.items():
        assert [a[key] for a in found] == pytest.approx(expected, abs=1e-9)


def test_first_object_wins_where_masks_overlap(four: FourAnnotators) -> None:
    truth = four.labels["clip-0"]
    for a in range(4):
        four.masks["clip-0", str(a)] = truth == 1
        four.masks["clip-0", str(4 + a)] = (truth == 1) | (truth == 2)
        four.save("clip-0", str(a))
        four.save("clip-0", str(4 + a))
    for video, expression in four.masks:
        if video == "clip-1":
            k = int(expression) // 4
            four.masks[video, expression] = four.labels[video] == k + 1
            four.save(video, expression)
    result = evaluate("davis17", four.root, "valid", four.predictions)
    assert result["official"]["J&F"] == 100
    assert result["J"] < 95  # alone, the expressions of object 2 have surplus pixels


def test_order_of_the_objects_and_void_pixels_do_not_matter(four: FourAnnotators) -> None:
    before = four.official()
    for a in range(4):  # masks of one annotator overlap at most in void, so no pixel changes owner
        pair = ("clip-0", str(a)), ("clip-0", str(4 + a))
        for key in pair:
            four.masks[key] = four.masks[key] & (four.labels["clip-0"] != 255)
        four.masks[pair[1]] &= ~four.masks[pair[0]]
        four.masks[pair[0]], four.masks[pair[1]] = four.masks[pair[1]], four.masks[pair[0]]
        for key in pair:
            four.masks[key] |= four.labels["clip-0"] == 255
            four.save(*key)
    after = four.official()
    assert (after["J"], after["F"]) == pytest.approx((before["J"], before["F"]), abs=1e-9)


def test_missing_masks_count_zero_also_where_the_object_is_absent(four: FourAnnotators) -> None:
    for video, expression in four.masks:
        k = int(expression) // 4
        four.masks[video, expression] = four.labels[video] == k + 1
        four.save(video, expression)
    assert four.official()["J&F"] == 100
    # object 2 is absent from the last frame
    (four.predictions / "clip-0" / "5" / f"{STEMS[-1]}.png").unlink()
    shutil.rmtree(four.predictions / "clip-1" / "2")
    annotators = four.official()["per_annotator"]
    assert [a["n_unusable"] for a in annotators] == [0, 1, FRAMES, 0]
    assert [a["J"] for a in annotators] == pytest.approx([100, 100 - 100 / 30, 80, 100])
    shutil.rmtree(four.predictions)
    four.predictions.mkdir()
    assert four.official()["J&F"] == 0


def test_objects_are_those_of_the_first_frame() -> None:
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[:, 1:4, 1:4] = 1
    truth[1:, 5:7, 5:7] = 2
    late = assign_objects(truth, truth, np.ones((2, 3), bool))
    assert late.jaccard.tolist() == [1.0]
    early = assign_objects(truth[1:], truth[1:], np.ones((2, 2), bool))
    assert early.jaccard.tolist() == early.boundary.tolist() == [1.0, 1.0]
    # fewer proposals than objects: the missing one is empty, which is right in no frame
    alone = assign_objects(truth[1:], np.where(truth == 2, 0, truth)[1:], np.ones((2, 2), bool))
    assert sorted(alone.jaccard.tolist()) == [0.0, 1.0]


def test_workers_and_methods_give_the_same_figures(four: FourAnnotators) -> None:
    assert four.official(workers=2) == four.official()
    by_method = evaluate_masks(
        "davis17", four.root, "valid", lambda c, v, e: four.masks[v.id, e.id]
    )
    assert by_method["official"] == four.official()
    frame = evaluate_masks("davis17", four.root, "valid", BASELINES["whole-frame"])["official"]
    assert 0 < frame["J"] < 20
    json.dumps(by_method, allow_nan=False)


def test_each_method_of_one_pass_has_its_own_figures(four: FourAnnotators) -> None:
    worse = four.predictions.with_name("worse")
    shutil.copytree(four.predictions, worse)
    shutil.rmtree(worse / "clip-0" / "3")
    methods = {"good": four.predictions, "worse": worse, **BASELINES}
    results = evaluate_all("davis17", four.root, "valid", methods, workers=2)
    assert results["good"]["official"] == four.official()
    lost = [a["n_unusable"] for a in results["worse"]["official"]["per_annotator"]]
    assert lost == [0, 0, 0, FRAMES]
    for name, masks in BASELINES.items():
        alone = evaluate_masks("davis17", four.root, "valid", masks)
        assert results[name]["official"] == alone["official"]


def test_label_images_of_another_size_than_the_masks_leave_the_figures_out(
    four: FourAnnotators,
) -> None:
    """Expressions without a readable mask have the size of the JPEGs."""
    for expression in ("0", "1", "2", "3"):
        edit(four, lambda v, e=expression: v["expressions"][e].update(obj_id="999"))
    jpeg = four.root / "valid" / "JPEGImages" / "clip-1" / f"{STEMS[0]}.jpg"
    jpeg.parent.mkdir(parents=True)
    Image.new("RGB", (WIDTH + 10, HEIGHT)).save(jpeg)
    methods = {"files": four.predictions, "frame": BASELINES["whole-frame"]}
    for result in evaluate_all("davis17", four.root, "valid", methods).values():
        assert result["official"]["J&F"] is None and result["J&F"] > 0
        assert "another size than the masks of expression 0" in result["official"]["reason"]


def edit(four: FourAnnotators, change: Callable[[dict], object]) -> None:
    document = json.loads(four.expressions_file.read_text())
    change(document["videos"]["clip-1"])
    four.expressions_file.write_text(json.dumps(document))


ENTRY = {"exp": "object 1", "obj_id": "1"}
INCOMPLETE: dict[str, tuple[Callable[[FourAnnotators], object], str]] = {
    "eleven expressions": (
        lambda w: edit(w, lambda v: v["expressions"].pop("11")),
        "videos.clip-1.expressions: 11 expressions are not four per object",
    ),
    "an annotator describes another object": (
        lambda w: edit(w, lambda v: v["expressions"]["9"].update(obj_id="1")),
        "videos.clip-1.expressions: the four annotators do not describe the same objects",
    ),
    "too many objects": (
        lambda w: edit(
            w,
            lambda v: v.update(expressions={str(n): {"exp": "", "obj_id": "1"} for n in range(84)}),
        ),
        "more than 20 objects",
    ),
    "no frames": (
        lambda w: edit(w, lambda v: v.update(frames=[])),
        "videos.clip-1.frames: the video has no frames",
    ),
    "a label image is missing": (
        lambda w: (w.root / "valid/Annotations/clip-0/00003.png").unlink(),
        "00003.png: missing_mask",
    ),
    "label images of two sizes": (
        lambda w: Image.new("P", (60, 41)).save(w.root / "valid/Annotations/clip-0/00003.png"),
        "label images of several sizes",
    ),
    "no object in the first frames": (
        lambda w: [
            Image.new("P", (60, 40)).save(path)
            for path in (w.root / "valid/Annotations").rglob("00000.png")
        ],
        "no first frame shows an object",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_corpora_have_no_figures_but_a_reason(name: str, four: FourAnnotators) -> None:
    change, reason = INCOMPLETE[name]
    change(four)
    result = evaluate("davis17", four.root, "valid", four.predictions)
    official = result["official"]
    assert (official["J"], official["F"], official["J&F"]) == (None, None, None)
    assert official["per_annotator"] == [] and reason in official["reason"]
    assert result["J&F"] > 0
    (line,) = public_lines(result)
    assert "J&F unknown" in line and reason in line


def test_a_limit_leaves_the_figures_out(four: FourAnnotators) -> None:
    assert four.official(limit=20)["reason"] is None
    official = four.official(limit=19)
    assert official["J&F"] is None and "limit" in official["reason"]
