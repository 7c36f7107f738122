"""Defects of truth and predictions: no expression leaves a mean, and each defect is listed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hotcoco import mask as coco
from PIL import Image

from rcot_rl.evaluation.benchmarks import evaluate, evaluate_masks
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.mask_baselines import BASELINES

DATASETS = ("ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17")
RLE = ("mevis", "revos")
Masks = dict[str, list[Any]]


def published_revos(world, predictions: Path) -> dict[str, float]:
    """Return J and F by ReVOS' protocol: any failure makes the expression 0."""
    videos = json.loads(world.expressions_file.read_text())["videos"]
    masks = json.loads((world.root / "mask_dict.json").read_text())

    def score(name: str, expression: str) -> tuple[float, float]:
        frames = videos[name]["frames"]
        folder = predictions / name / expression
        grey = [cv2.imread(str(folder / f"{f}.png"), cv2.IMREAD_GRAYSCALE) for f in frames]
        if not grey or any(g is None or g.shape != grey[0].shape for g in grey):
            return 0.0, 0.0
        truth = np.zeros((len(frames), *grey[0].shape), np.uint8)
        for t in range(len(frames)):
            for annotation in videos[name]["expressions"][expression]["anno_id"]:
                listed = masks.get(str(annotation))
                if listed is None or t >= len(listed):
                    return 0.0, 0.0
                if listed[t] is None:
                    continue
                if listed[t]["size"] != list(grey[0].shape):
                    return 0.0, 0.0
                try:
                    truth[t] |= coco.decode(listed[t])
                except ValueError:
                    return 0.0, 0.0
        jaccard, boundary = jf_video(truth, np.stack(grey))
        return float(jaccard.mean()), float(boundary.mean())

    halves: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: []}
    for name, video in videos.items():
        for expression, entry in video["expressions"].items():
            pair = [round(100 * s, 2) for s in score(name, expression)]
            halves[entry["type_id"]].append((pair[0], pair[1]))
    jaccard, boundary = np.mean([np.mean(halves[k], axis=0) for k in (0, 1)], axis=0)
    return {"J": jaccard, "F": boundary, "J&F": (jaccard + boundary) / 2}


def drop_last(masks: Masks, annotation: str) -> None:
    masks[annotation].pop()


def other_size(masks: Masks, annotation: str, frame: int = 2) -> None:
    masks[annotation][frame] = {"size": [31, 44], "counts": [31 * 44]}


def too_many_pixels(masks: Masks, annotation: str) -> None:
    masks[annotation][2]["counts"] = [1400]


TRUTH: dict[str, Callable[[Any, str], object]] = {
    "one mask short": lambda w, a: w.edit_masks(lambda m: drop_last(m, a)),
    "one mask long": lambda w, a: w.edit_masks(lambda m: m[a].append(None)),
    "many masks long": lambda w, a: w.edit_masks(lambda m: m[a].extend([m[a][1]] * 4)),
    "no masks": lambda w, a: w.edit_masks(lambda m: m[a].clear()),
    "annotation missing": lambda w, a: w.edit_masks(lambda m: m.pop(a)),
    "mask of another size": lambda w, a: w.edit_masks(lambda m: other_size(m, a)),
    "first mask of another size": lambda w, a: w.edit_masks(lambda m: other_size(m, a, 0)),
    "runs too long": lambda w, a: w.edit_masks(lambda m: too_many_pixels(m, a)),
    "one JPEG missing": lambda w, a: w.jpeg(3).unlink(),
    "first JPEG missing": lambda w, a: w.jpeg(0).unlink(),
    "one JPEG broken": lambda w, a: w.jpeg(1).write_bytes(b"\xff\xd8\xff"),
    "one JPEG of another size": lambda w, a: Image.new("RGB", (44, 31)).save(w.jpeg(2)),
    "no JPEG of a video": lambda w, a: shutil.rmtree(w.jpeg(0).parent),
}
HARMLESS = ("one mask long", "many masks long", *(name for name in TRUTH if "JPEG" in name))


@pytest.mark.parametrize("name", TRUTH)
def test_defective_truth_of_revos_is_scored_as_published(
    name: str, make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    flawless = evaluate("revos", world.root, "valid", root)
    TRUTH[name](world, "0")
    result = evaluate("revos", world.root, "valid", root)
    expected = published_revos(world, root)
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert result["n_expressions"] == flawless["n_expressions"] == len(world.pairs())
    assert result["defects"] and 0 < result["n_defective"] < len(world.pairs())
    assert all(d["file"] and d["key"] and d["reason"] and d["effect"] for d in result["defects"])
    harmless = {d["effect"] for d in result["defects"]} == {"does not change the score"}
    assert harmless == (name in HARMLESS) == (result["J"] == flawless["J"])


PREDICTIONS: dict[str, Callable[[Path, random.Random], object]] = {
    "missing": lambda p, chance: p.unlink(),
    "unreadable": lambda p, chance: p.write_bytes(b"\x89PNG\r\n\x1a\nnot really"),
    "empty": lambda p, chance: p.write_bytes(b""),
    "of another size": lambda p, chance: Image.new("L", (45, 30)).save(p),
    "no expression": lambda p, chance: shutil.rmtree(p.parent),
    "soft": lambda p, chance: Image.fromarray(np.asarray(Image.open(p)) // 2 + 3).save(p),
    "palette": lambda p, chance: (
        Image.fromarray(np.asarray(Image.open(p)) // 255).convert("P").save(p)
    ),
}


@pytest.mark.parametrize("seed", range(12))
def test_random_defects_of_revos_are_scored_as_published(
    seed: int, make_world, make_predictions
) -> None:
    chance = random.Random(seed)
    world = make_world("revos", n_videos=4)
    root, _ = make_predictions(world)
    for _ in range(chance.randint(1, 4)):
        change = chance.choice(list(TRUTH.values()))
        try:
            change(world, str(chance.randrange(8)))
        except (KeyError, IndexError, TypeError, FileNotFoundError):
            continue  # an earlier defect removed what this one would break
    for _ in range(chance.randint(0, 3)):
        path = chance.choice(sorted(root.rglob("*.png")))
        try:
            chance.choice(list(PREDICTIONS.values()))(path, chance)
        except OSError:
            continue
    result = evaluate("revos", world.root, "valid", root)
    expected = published_revos(world, root)
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert result["n_expressions"] == len(world.pairs())


@pytest.mark.parametrize("dataset", DATASETS)
def test_scores_need_no_jpeg(dataset: str, make_world, make_predictions) -> None:
    world = make_world(dataset)
    root, _ = make_predictions(world)
    flawless = evaluate(dataset, world.root, world.split, root)
    shutil.rmtree(world.base / "JPEGImages")
    result = evaluate(dataset, world.root, world.split, root)
    scores = ("J", "F", "J&F", "n_expressions", "n_unusable")
    assert [result[k] for k in scores] == [flawless[k] for k in scores]
    assert result["n_defective"] == len(world.pairs())
    assert {d["reason"].partition(" ")[0] for d in result["defects"]} == {"missing_frame"}
    for method in BASELINES.values():
        result = evaluate_masks(dataset, world.root, world.split, method)
        assert result["n_expressions"] == len(world.pairs())
        assert not any(row["n_frames_without_truth"] for row in result["per_expression"])


@pytest.mark.parametrize("name", [n for n in TRUTH if "JPEG" not in n])
def test_frames_of_mevis_without_usable_truth_count_zero(
    name: str, make_world, make_predictions
) -> None:
    world = make_world("mevis", n_videos=2)
    root, masks = make_predictions(world)
    TRUTH[name](world, "0")  # object 1 of the first clip: expressions 0 and 1
    lost = {
        "one mask short": [4],
        "no masks": range(5),
        "annotation missing": range(5),
        "first mask of another size": [0],
        **{harmless: [] for harmless in HARMLESS},
    }.get(name, [2])
    result = evaluate("mevis", world.root, "valid_u", root)
    scores = []
    for pair in world.pairs():
        jaccard, boundary = jf_video(world.truth(*pair), masks[pair])
        if pair in (("clip-0", "0"), ("clip-0", "1")):
            jaccard[list(lost)] = boundary[list(lost)] = 0
        scores.append((jaccard.mean(), boundary.mean()))
    expected = 100 * np.mean(scores, axis=0)
    assert (result["J"], result["F"]) == pytest.approx(tuple(expected), abs=1e-9)
    (defect,) = result["defects"]
    assert defect["expressions"] == ["clip-0/0", "clip-0/1"]
    assert defect["file"].endswith("mask_dict.json") or defect["key"].startswith("clip-0 ")
    effects = {0: "does not change the score", 1: "1 of 5 frames count 0"}
    assert defect["effect"] == effects.get(len(lost), "the expression counts 0")


def test_truncated_mask_is_unusable(make_world, make_predictions) -> None:
    """The public scripts read memory that nothing has written to."""
    for dataset in RLE:
        world = make_world(dataset, n_videos=2)
        root, _ = make_predictions(world)
        world.edit_masks(lambda m: m["0"][2].update(counts=m["0"][2]["counts"][:-2]))
        result = evaluate(dataset, world.root, world.split, root)
        lost = [row["n_frames_without_truth"] for row in result["per_expression"]]
        assert lost == [1, 1, *[0] * 8]
        (defect,) = result["defects"]
        assert defect["key"] == "0[2]" and defect["reason"].startswith("bad_rle")


@pytest.mark.parametrize("dataset", ["ref-youtube-vos", "davis17", "reasonvos"])
def test_broken_label_images_stay_in_the_mean(dataset: str, make_world, make_predictions) -> None:
    world = make_world(dataset, n_videos=2)
    root, masks = make_predictions(world)
    labels = sorted(p for p in world.base.rglob("*.png") if "clip-0" in str(p))
    labels = [p for p in labels if p.stem == world.frames[2]]
    for path in labels:
        path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    result = evaluate(dataset, world.root, "valid", root)
    scores = []
    for pair in world.pairs():
        jaccard, _ = jf_video(world.truth(*pair), masks[pair])
        if pair[0] == "clip-0":
            jaccard[2] = 0
        scores.append(100 * jaccard.mean())
    assert result["J"] == pytest.approx(np.mean(scores), abs=1e-9)
    assert result["n_defective"] == result["n_expressions"] // 2
    assert {d["file"] for d in result["defects"]} == {str(p) for p in labels}


@pytest.mark.parametrize("dataset", ["ref-youtube-vos", "davis17", "reasonvos"])
def test_videos_without_any_label_count_zero(dataset: str, make_world, make_predictions) -> None:
    world = make_world(dataset, n_videos=2)
    root, _ = make_predictions(world)
    for folder in (world.base / "Annotations").iterdir():
        if "clip-0" in folder.name:
            shutil.rmtree(folder)
    result = evaluate(dataset, world.root, "valid", root)
    gone = [row for row in result["per_expression"] if row["video"] == "clip-0"]
    assert len(gone) == len(result["per_expression"]) / 2
    assert {row["J"] for row in gone} == {0} and all(row["defective"] for row in gone)
    assert result["defects"] and result["J"] > 0


def test_missing_label_of_davis_is_a_defect(make_world, make_predictions) -> None:
    """Unlike those of Ref-YouTube-VOS and ReasonVOS, all of its frames are annotated."""
    world = make_world("davis17", n_videos=1)
    root, _ = make_predictions(world)
    (world.base / "Annotations" / "clip-0" / f"{world.frames[1]}.png").unlink()
    result = evaluate("davis17", world.root, "valid", root)
    assert {row["n_frames"] for row in result["per_expression"]} == {5}
    (defect,) = result["defects"]
    assert (defect["effect"], defect["key"]) == ("1 of 5 frames count 0", "clip-0")


def test_expressions_without_an_object_are_defects(make_world, make_predictions) -> None:
    world = make_world("revos", n_videos=1)
    root, _ = make_predictions(world)

    def empty(document: Any) -> None:
        entry = document["videos"][world.videos[0]]["expressions"]["3"]
        entry["obj_id"] = entry["anno_id"] = []

    world.edit_expressions(empty)
    result = evaluate("revos", world.root, "valid", root)
    (defect,) = result["defects"]
    assert defect["key"] == f"videos.{world.videos[0]}.expressions.3"
    assert result["J&F"] == pytest.approx(published_revos(world, root)["J&F"], abs=1e-9)


def test_expressions_of_an_unknown_object_count_zero(make_world, make_predictions) -> None:
    """Ref-YouTube-VOS' valid: sentences that neither file assigns to an object."""
    world = make_world("ref-youtube-vos", n_videos=1)
    root, _ = make_predictions(world)

    def forget(document: Any) -> None:
        del document["videos"]["clip-0"]["expressions"]["1"]["obj_id"]

    world.edit_expressions(forget)
    result = evaluate("ref-youtube-vos", world.root, "valid", root)
    row = result["per_expression"][1]
    assert (row["J"], row["F"], row["defective"]) == (0, 0, True)
    assert result["defects"][0]["effect"] == "the expression counts 0"


def test_target_that_no_frame_shows_is_a_defect(make_world, make_predictions) -> None:
    world = make_world("davis17", n_videos=1)
    root, _ = make_predictions(world)

    def rename(document: Any) -> None:
        document["videos"]["clip-0"]["expressions"]["0"]["obj_id"] = "9"

    world.edit_expressions(rename)
    result = evaluate("davis17", world.root, "valid", root)
    (defect,) = result["defects"]
    assert defect["expressions"] == ["clip-0/0"] and "(9)" in defect["reason"]


def test_duplicate_ids_are_listed(make_world, make_predictions) -> None:
    listed = make_world("reasonvos", n_videos=1)
    root, _ = make_predictions(listed)

    def repeat(document: Any) -> None:
        document["videos"]["clip-0"]["expressions"][1]["exp_id"] = "0"

    listed.edit_expressions(repeat)
    result = evaluate("reasonvos", listed.root, "valid", root)
    assert result["n_expressions"] == 5 and result["n_defective"] == 2
    assert "have this id" in result["defects"][0]["reason"]

    keyed = make_world("mevis", n_videos=1)
    root, _ = make_predictions(keyed)
    path = keyed.expressions_file
    path.write_text(path.read_text().replace('"expressions": {"0"', '"expressions": {"1"'))
    result = evaluate("mevis", keyed.root, "valid_u", root)
    assert [d["key"] for d in result["defects"]] == ["videos.clip-0.expressions.1"]


def test_clip_without_frames_counts_zero(make_world, make_predictions) -> None:
    for dataset in ("mevis", "revos", "davis17"):
        world = make_world(dataset, n_videos=2)
        root, _ = make_predictions(world)
        name = world.videos[0]
        world.edit_expressions(lambda d, n=name: d["videos"][n].update(frames=[]))
        for result in (
            evaluate(dataset, world.root, world.split, root),
            evaluate_masks(dataset, world.root, world.split, BASELINES["whole-frame"]),
        ):
            assert result["n_expressions"] == 10 and result["n_defective"] == 5
            assert {r["J"] for r in result["per_expression"] if r["video"] == name} == {0}


def test_defects_are_counted_per_subset_and_once_per_file(make_world, make_predictions) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    world.jpeg(2).unlink()
    result = evaluate("revos", world.root, "valid", root, workers=2)
    (defect,) = result["defects"]
    assert defect["file"] == str(world.jpeg(2)) and defect["key"] == world.videos[0]
    assert len(defect["expressions"]) == 5 == result["n_defective"]
    counts = {name: part["n_defective"] for name, part in result["per_subset"].items()}
    assert counts == {"referring": 2, "reasoning": 2, "no_target": 1}
    assert "missing_frame" in defect["reason"]
