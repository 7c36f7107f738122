"""Benchmarks' protocols on small corpora, against means worked out here from the masks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.corpora import open_corpus
from data_pipelines.corpora.mevis import Mevis
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.errors import InputError
from rcot_rl.evaluation import benchmarks
from rcot_rl.evaluation.benchmarks import evaluate, evaluate_all, evaluate_masks
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.mask_baselines import BASELINES, centre_box

DATASETS = ("ref-youtube-vos", "mevis", "revos", "reasonvos", "davis17")
SAMPLE_MEAN = ("ref-youtube-vos", "mevis", "reasonvos", "davis17")


def percent(world, masks: dict, pair: tuple[str, str]) -> tuple[float, float]:
    jaccard, boundary = jf_video(world.truth(*pair), masks[pair])
    return 100 * jaccard.mean(), 100 * boundary.mean()


@pytest.mark.parametrize("dataset", SAMPLE_MEAN)
def test_score_is_the_mean_over_frames_then_expressions(
    dataset: str, make_world, make_predictions
) -> None:
    world = make_world(dataset)
    root, masks = make_predictions(world)
    result = evaluate(dataset, world.root, world.split, root)
    expected = np.mean([percent(world, masks, pair) for pair in world.pairs()], axis=0)
    assert (result["J"], result["F"]) == pytest.approx(tuple(expected), abs=1e-9)
    assert result["J&F"] == pytest.approx(expected.mean(), abs=1e-9)
    assert result["n_expressions"] == len(world.pairs()) == len(result["per_expression"])
    assert result["benchmark"] == dataset
    assert not result["missing"] and not result["faults"]
    assert not result["defects"] and not result["unexpected"] and result["n_defective"] == 0
    assert 0 < result["J"] < 100
    json.dumps(result, allow_nan=False)


def test_revos_is_the_mean_of_rounded_referring_and_reasoning_scores(
    make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, masks = make_predictions(world)
    result = evaluate("revos", world.root, "valid", root)
    halves = []
    for kinds in (("0", "4"), ("1", "3")):
        pairs = [(v, e) for v, e in world.pairs() if e in kinds]
        halves.append(np.mean([np.round(percent(world, masks, p), 2) for p in pairs], axis=0))
    subsets = result["per_subset"]
    for name, half in zip(("referring", "reasoning"), halves, strict=True):
        assert (subsets[name]["J"], subsets[name]["F"]) == pytest.approx(tuple(half), abs=1e-9)
    overall = np.mean(halves, axis=0)
    assert (result["J"], result["F"]) == pytest.approx(tuple(overall), abs=1e-9)
    assert result["J&F"] == pytest.approx(overall.mean(), abs=1e-9)
    # the mean over all expressions would differ, since the subsets have different sizes
    assert subsets["no_target"]["n_expressions"] == len(world.videos)
    assert subsets["no_target"]["N-Acc"] == 100 and subsets["no_target"]["T-Acc"] == 100


def test_n_acc_counts_empty_predictions_of_expressions_without_target(
    make_world, make_predictions
) -> None:
    world = make_world("revos", n_videos=4)
    root, _ = make_predictions(world)
    before = evaluate("revos", world.root, "valid", root)
    path = root / world.videos[0] / "2" / f"{world.frames[3]}.png"
    mask = np.zeros((30, 44), np.uint8)
    mask[4, 4] = 255
    Image.fromarray(mask).save(path)
    shutil.rmtree(root / world.videos[1] / "2")
    after = evaluate("revos", world.root, "valid", root)
    assert after["per_subset"]["no_target"]["N-Acc"] == 50
    assert (after["J"], after["F"]) == (before["J"], before["F"])


def test_perfect_predictions_score_100(make_world) -> None:
    for dataset in DATASETS:
        world = make_world(dataset, n_videos=1)
        result = evaluate_masks(
            dataset, world.root, world.split, lambda c, v, e, w=world: w.truth(v.id, e.id)
        )
        assert (result["J"], result["F"], result["J&F"]) == (100, 100, 100)


def test_youtube_valid_is_scored_alike_in_every_layout_of_its_masks(tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ("meta", "obj_id", "folders")}
    for name, root in roots.items():
        write_corpus(root, "ref-youtube-vos", "valid", 3, 1, "lattice", valid_labels=name)
    perfect = roots["folders"] / "valid" / "Annotations"  # the layout of predictions
    worse = shutil.copytree(perfect, tmp_path / "worse")
    first = sorted(worse.rglob("*.png"))[0].parent
    shutil.rmtree(first)
    results = [
        evaluate_all("ref-youtube-vos", root, "valid", {"perfect": perfect, "worse": worse})
        for root in roots.values()
    ]
    for result in results:
        assert result["perfect"]["J&F"] == 100 and not result["perfect"]["defects"]
        assert result["worse"]["missing"] == [f"{first.parent.name}/{first.name}"]
        for method in ("perfect", "worse"):
            assert result[method]["per_expression"] == results[0][method]["per_expression"]


def test_missing_predictions_count_zero_and_are_listed(make_world, make_predictions) -> None:
    world = make_world("mevis")
    root, masks = make_predictions(world)
    gone = (world.videos[1], "3")
    shutil.rmtree(root / gone[0] / gone[1])
    holed = (world.videos[2], "0")
    (root / holed[0] / holed[1] / f"{world.frames[0]}.png").unlink()
    result = evaluate("mevis", world.root, world.split, root)
    assert result["missing"] == ["clip-1/3", "clip-2/0/00000"]
    scores = []
    for pair in world.pairs():
        jaccard, _ = jf_video(world.truth(*pair), masks[pair])
        if pair == gone:
            jaccard[:] = 0
        if pair == holed:
            assert jaccard[0] == 1  # both are empty in this frame, which must not count as a hit
            jaccard[0] = 0
        scores.append(100 * jaccard.mean())
    assert result["J"] == pytest.approx(np.mean(scores), abs=1e-9)
    assert result["n_expressions"] == len(world.pairs())


def test_empty_folder_scores_zero(make_world, tmp_path: Path) -> None:
    world = make_world("davis17")
    result = evaluate("davis17", world.root, "valid", tmp_path)
    assert (result["J"], result["F"]) == (0, 0)
    assert result["missing"] == [f"{v}/{e}" for v, e in world.pairs()]


def test_unusable_pngs_are_faults_and_count_zero(make_world, make_predictions) -> None:
    world = make_world("davis17", n_videos=1)
    root, _ = make_predictions(world)
    folder = root / world.videos[0] / "0"
    Image.new("L", (44, 31)).save(folder / "00000.png")
    Image.new("RGB", (44, 30)).save(folder / "00005.png")
    (folder / "00010.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (folder / "00015.png").write_bytes((folder / "00020.png").read_bytes()[:60])
    result = evaluate("davis17", world.root, "valid", root)
    assert [f["place"] for f in result["faults"]] == [
        f"clip-0/0/{stem}.png" for stem in ("00000", "00005", "00010", "00015")
    ]
    assert "31 x 44" in result["faults"][0]["reason"]
    assert "single channel" in result["faults"][1]["reason"]
    row = result["per_expression"][0]
    assert row["n_unusable_frames"] == 4 and row["J"] <= 20


def test_damaged_bytes_never_raise(make_world, make_predictions) -> None:
    world = make_world("davis17", n_videos=1)
    root, _ = make_predictions(world)
    files = sorted(root.rglob("*.png"))
    chance = random.Random(3)
    for _ in range(30):
        for path in files[:5]:
            data = bytearray(files[7].read_bytes())
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data[: chance.randint(0, len(data))])
        assert evaluate("davis17", world.root, "valid", root, limit=1)["n_expressions"] == 1


@pytest.mark.parametrize("kind", ["palette", "bits", "ones"])
def test_any_single_channel_png_is_read(kind: str, make_world, make_predictions) -> None:
    world = make_world("reasonvos", n_videos=1)
    root, _ = make_predictions(world)
    before = evaluate("reasonvos", world.root, "valid", root)
    for path in root.rglob("*.png"):
        mask = np.asarray(Image.open(path)) > 0
        if kind == "palette":
            image = Image.fromarray(mask.astype(np.uint8), mode="P")
            image.putpalette([0, 0, 0, 255, 0, 0])
        else:
            image = Image.fromarray(mask if kind == "bits" else mask.astype(np.uint8))
        image.save(path)
    assert evaluate("reasonvos", world.root, "valid", root)["J"] == before["J"]


def test_frames_without_annotation_are_not_scored(make_world, make_predictions) -> None:
    world = make_world("reasonvos", n_videos=1)
    root, masks = make_predictions(world)
    for name in ("1", "2"):
        (world.root / "Annotations" / f"MOSE_clip-0_{name}" / "00010.png").unlink()
    (root / "clip-0" / "0" / "00010.png").unlink()
    result = evaluate("reasonvos", world.root, "valid", root)
    kept = [0, 1, 3, 4]
    rows = [jf_video(world.truth(*p), masks[p])[0][kept].mean() for p in world.pairs()]
    assert result["J"] == pytest.approx(100 * np.mean(rows), abs=1e-9)
    assert not result["missing"] and not result["defects"]


def test_bad_input_raises_input_error(make_world, tmp_path: Path) -> None:
    world = make_world("revos")
    with pytest.raises(InputError, match="limit"):
        evaluate("revos", world.root, "valid", tmp_path, limit=0)
    with pytest.raises(InputError, match="workers"):
        evaluate("revos", world.root, "valid", tmp_path, workers=0)
    with pytest.raises(InputError, match="nowhere"):
        evaluate("revos", world.root, "valid", tmp_path / "nowhere")
    (world.root / "mask_dict.json").unlink()
    with pytest.raises(InputError, match="without masks"):
        evaluate("revos", world.root, "valid", tmp_path)
    untyped = make_world("revos")
    path = untyped.root / "meta_expressions_valid_.json"
    path.write_text(path.read_text().replace('"type_id": 1', '"type_id": 7'))
    with pytest.raises(InputError, match="type_id"):
        evaluate("revos", untyped.root, "valid", tmp_path)


def test_id_that_leads_outside_the_folder_is_refused(make_world, tmp_path: Path) -> None:
    world = make_world("mevis", n_videos=1)
    path = world.root / "valid_u" / "meta_expressions.json"
    path.write_text(path.read_text().replace('"4": {', '"../../4": {'))
    with pytest.raises(InputError, match=r"\.\./\.\./4"):
        evaluate("mevis", world.root, "valid_u", tmp_path)


def test_limit_and_workers_do_not_change_scores_and_progress_is_reported(
    make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    seen: list[tuple[int, int]] = []
    alone = evaluate(
        "revos", world.root, "valid", root, limit=7, progress=lambda *p: seen.append(p)
    )
    assert seen == [(k, 7) for k in range(1, 8)]
    assert evaluate("revos", world.root, "valid", root, limit=7, workers=2) == alone
    names = [(row["video"], row["expression_id"]) for row in alone["per_expression"]]
    assert names == world.pairs()[:7]


@pytest.mark.parametrize("dataset", DATASETS)
def test_methods_scored_together_have_the_scores_of_each_alone(
    dataset: str, make_world, make_predictions
) -> None:
    world = make_world(dataset)
    good, _ = make_predictions(world)
    bad = good.with_name("bad")
    shutil.copytree(good, bad)
    shutil.rmtree(bad / world.videos[0] / "1")
    methods = {"good": good, "bad": bad, **BASELINES}
    place = (dataset, world.root, world.split)
    alone = {
        "good": evaluate(*place, good),
        "bad": evaluate(*place, bad),
        **{name: evaluate_masks(*place, masks) for name, masks in BASELINES.items()},
    }
    for workers in (1, 2, 3):
        assert evaluate_all(*place, methods, workers=workers) == alone
    assert alone["good"]["J&F"] > alone["bad"]["J&F"] > alone["whole-frame"]["J&F"]


def test_equal_masks_of_several_methods_are_scored_once_and_as_alone(
    make_world, make_predictions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    pairs = world.pairs()
    (video, expression), frame = pairs[0], world.frames[0]
    methods: dict[str, Path] = {"first": Path(root)}
    for name in ("same", "traced", "bad-trace", "extra", "lacks-one", "broken", "full"):
        methods[name] = Path(shutil.copytree(root, tmp_path / name))
    trace = {"keyframe": 1, "initial_keyframe": 0, "rounds": 1, "boxes_source": []}
    file = methods["traced"] / video / expression / "trace.json"
    file.write_text(json.dumps(trace | {"segmenter": "s"}))
    (methods["bad-trace"] / video / expression / "trace.json").write_text("{")
    (methods["extra"] / video / expression / "other.png").write_bytes(b"")
    (methods["lacks-one"] / video / expression / f"{frame}.png").unlink()
    (methods["broken"] / video / expression / f"{frame}.png").write_bytes(b"no image")
    full = np.full(world.truth(video, expression).shape[1:], 255, np.uint8)
    Image.fromarray(full).save(methods["full"] / video / expression / f"{frame}.png")
    alone = {
        name: evaluate(world.dataset, world.root, world.split, folder)
        for name, folder in methods.items()
    }
    decoded = []
    real = benchmarks.read_masks
    monkeypatch.setattr(benchmarks, "read_masks", lambda *a: decoded.append(a) or real(*a))
    together = evaluate_all(world.dataset, world.root, world.split, methods)
    assert together == alone
    # one method's masks, and the five other sets of files of one expression
    assert len(decoded) == len(pairs) + 5
    assert len({json.dumps(result["per_expression"]) for result in together.values()}) > 4


def test_ground_truth_is_decoded_once_for_all_methods(
    make_world, make_predictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("mevis")
    root, _ = make_predictions(world)
    decoded: list[int] = []
    read = Mevis.published_mask

    def counted(self, video, anno_id, frame_index):
        decoded.append(1)
        return read(self, video, anno_id, frame_index)

    monkeypatch.setattr(Mevis, "published_mask", counted)
    counts = []
    for methods in ({"one": root}, {"one": root, "two": root, **BASELINES}):
        decoded.clear()
        evaluate_all("mevis", world.root, world.split, methods)
        counts.append(len(decoded))
    assert counts[0] == counts[1] > 0


def test_methods_of_different_sizes_are_kept_apart_where_the_size_is_unknown(
    make_world, make_predictions
) -> None:
    """Without a JPEG or a mask, an expression has the size of its predictions."""
    world = make_world("revos", n_videos=1)
    shutil.rmtree(world.root / "JPEGImages")
    masks_file = world.root / "mask_dict.json"
    listed = json.loads(masks_file.read_text())
    masks_file.write_text(json.dumps({a: [None] * len(m) for a, m in listed.items()}))
    small, _ = make_predictions(world)
    large = small.with_name("large")
    for path in sorted(small.rglob("*.png")):
        target = large / path.relative_to(small)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (80, 60)).save(target)
        Image.new("L", (44, 30)).save(path)
    methods = {"small": small, "large": large}
    results = evaluate_all("revos", world.root, "valid", methods)
    assert [results[name]["J"] for name in methods] == [100, 100]


@pytest.fixture
def traced(make_world, make_predictions) -> tuple:
    world = make_world("mevis", n_videos=1)
    root, _ = make_predictions(world)
    truth = world.truth("clip-0", "1")
    ys, xs = np.nonzero(world.masks["clip-0"]["1"][2])
    exact = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    trace = {
        "keyframe": 2,
        "initial_keyframe": 0,
        "rounds": 3,
        "boxes_source": [exact, [0, 0, 1, 1]],
        "segmenter": "flow",
        "steps": "whatever \ud800",
    }
    return world, root, truth, trace


def put(root: Path, expression: str, trace: object) -> None:
    text = trace if isinstance(trace, str) else json.dumps(trace)
    (root / "clip-0" / expression / "trace.json").write_text(text)


def test_keyframe_figures_of_a_trace(traced) -> None:
    world, root, truth, trace = traced
    put(root, "1", trace)
    result = evaluate("mevis", world.root, "valid_u", root)
    areas = truth.sum(axis=(1, 2))
    assert result["keyframe_area_ratio"] == pytest.approx(100 * areas[2] / areas.max())
    assert result["keyframe_area_ratio_initial"] == 0 == areas[0]
    assert result["aks_rounds"] == 3 and result["n_traces"] == 1
    assert result["segmenter"] == "flow"
    # object 1 has an exact box, object 2 only its overlap with that box
    ys, xs = np.nonzero(world.masks["clip-0"]["2"][2])
    other = np.zeros((30, 44), bool)
    other[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
    x1, y1, x2, y2 = trace["boxes_source"][0]
    mine = np.zeros((30, 44), bool)
    mine[y1:y2, x1:x2] = True
    shares = [(other & box).sum() / (other | box).sum() for box in (mine, _pixel())]
    assert result["box_iou"] == pytest.approx(100 * (1 + max(shares)) / 2)


def _pixel() -> np.ndarray:
    box = np.zeros((30, 44), bool)
    box[0, 0] = True
    return box


def test_keyframe_figures_are_means_and_every_segmenter_is_named(traced) -> None:
    world, root, _, trace = traced
    put(root, "0", {**trace, "rounds": 1})
    put(root, "1", {**trace, "rounds": 4, "keyframe": 0, "segmenter": "sam2"})
    put(root, "2", {**trace, "rounds": 4, "boxes_source": []})  # no target: no ratio, no box
    result = evaluate("mevis", world.root, "valid_u", root)
    assert result["aks_rounds"] == 3 and result["n_traces"] == 3
    assert result["segmenter"] == "flow, sam2"
    first, second, third = result["per_expression"][:3]
    assert second["keyframe_area_ratio"] == 0 == second["box_iou"]
    assert third["keyframe_area_ratio"] is None and third["box_iou"] is None
    assert first["box_iou"] == 100
    assert result["box_iou"] == 50


def test_keyframe_figures_are_none_without_traces(traced) -> None:
    world, root, _, _ = traced
    result = evaluate("mevis", world.root, "valid_u", root)
    assert result["segmenter"] is None and result["aks_rounds"] is None


@pytest.mark.parametrize(
    "change",
    [
        "{not json",
        "[" * 100_000,
        '{"keyframe": NaN}',
        {"keyframe": 99},
        {"keyframe": -1},
        {"keyframe": True},
        {"initial_keyframe": 5},
        {"rounds": "3"},
        {"boxes_source": [[0, 0, 1]]},
        {"boxes_source": [[0, 0, 1, "x"]]},
        {"boxes_source": {"a": 1}},
        {"segmenter": None},
        {"boxes_source": [[0, 0, 1, float("nan")]]},
    ],
)
def test_bad_traces_are_faults(change: object, traced: tuple) -> None:
    world, root, _, trace = traced
    put(root, "1", change if isinstance(change, str) else {**trace, **change})
    result = evaluate("mevis", world.root, "valid_u", root)
    assert [f["place"] for f in result["faults"]] == ["clip-0/1/trace.json"]
    assert result["n_traces"] == 0 and result["J"] > 0


def test_empty_and_inverted_boxes_have_an_iou(traced: tuple) -> None:
    world, root, _, trace = traced
    odd = [[1e308, -1e308, -1e308, 1e308], [-1e308, -1e308, 1e308, 1e308], [5, 5, 5, 5]]
    put(root, "1", {**trace, "boxes_source": odd})
    result = evaluate("mevis", world.root, "valid_u", root)
    assert result["box_iou"] == 0 and not result["faults"]


def test_baselines_score_as_their_masks(make_world) -> None:
    world = make_world("davis17")
    shares = [world.truth(*pair).mean(axis=(1, 2)) for pair in world.pairs()]
    results = {
        name: evaluate_masks("davis17", world.root, "valid", masks)
        for name, masks in BASELINES.items()
    }
    assert results["whole-frame"]["J"] == pytest.approx(100 * np.mean(shares), abs=1e-9)
    assert results["centre-box"]["J"] != results["whole-frame"]["J"]
    assert results["centre-box"]["segmenter"] is None
    corpus = open_corpus("davis17", world.root, "valid")
    video = corpus.videos()[0]
    box = centre_box(corpus, video, video.expressions[0])
    assert box.shape == (5, 30, 44) and box[:, 7:22, 11:33].all() and box.sum() == 5 * 15 * 22


def test_masks_of_another_shape_raise_value_error(make_world) -> None:
    world = make_world("davis17", n_videos=1)
    for shape in ((5, 44, 30), (4, 30, 44)):
        with pytest.raises(ValueError, match="clip-0/0"):
            evaluate_masks(
                "davis17", world.root, "valid", lambda c, v, e, s=shape: np.ones(s, dtype=bool)
            )
