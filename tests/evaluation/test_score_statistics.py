"""Micro and macro means, their intervals, and paired differences of methods."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from rcot_rl.evaluation.benchmarks import benchmark_document, evaluate, evaluate_all
from rcot_rl.evaluation.mask_baselines import BASELINES
from rcot_rl.evaluation.score_statistics import SCORES, score_differences


def level(result: dict, mean: str) -> list[float]:
    return [result["statistics"][mean][score]["mean"] for score in SCORES]


@pytest.mark.parametrize("dataset", ["mevis", "reasonvos"])
def test_means_over_expressions_and_videos(dataset: str, make_world, make_predictions) -> None:
    world = make_world(dataset)
    path = world.root / ("valid_u" if dataset == "mevis" else "") / "meta_expressions.json"
    document = json.loads(path.read_text())
    expressions = document["videos"]["clip-0"]["expressions"]
    for name in ("3", "4"):  # videos of different size, so that micro and macro differ
        expressions.pop(name) if isinstance(expressions, dict) else expressions.pop()
    path.write_text(json.dumps(document))
    root, _ = make_predictions(world)
    result = evaluate(dataset, world.root, world.split, root)
    rows = result["per_expression"]
    expected = [np.mean([r[score] for r in rows]) for score in SCORES]
    assert level(result, "micro") == level(result, "protocol") == pytest.approx(expected)
    by_video = [
        [np.mean([r[score] for r in rows if r["video"] == v]) for score in SCORES]
        for v in world.videos
    ]
    assert level(result, "macro") == pytest.approx(np.mean(by_video, axis=0))
    assert level(result, "macro") != pytest.approx(level(result, "micro"), abs=1e-3)
    assert result["statistics"]["n_videos"] == 3


def test_intervals_of_the_protocol_surround_its_own_scores(make_world, make_predictions) -> None:
    world = make_world("revos", n_videos=6)
    root, _ = make_predictions(world)
    result = evaluate("revos", world.root, "valid", root)
    assert level(result, "protocol") == pytest.approx([result[score] for score in SCORES])
    for mean in ("protocol", "micro", "macro"):
        for score in SCORES:
            one = result["statistics"][mean][score]
            assert one["low"] < one["mean"] < one["high"]
    counted = [r for r in result["per_expression"] if r["subset"] != "no_target"]
    assert level(result, "micro")[0] == pytest.approx(np.mean([r["J"] for r in counted]))


def test_differences_are_paired_and_cover_every_two_checkpoints(
    make_world, make_predictions
) -> None:
    world = make_world("mevis", n_videos=4)
    root, _ = make_predictions(world)
    worse = root.with_name("worse")
    shutil.copytree(root, worse)
    for video in world.videos:
        shutil.rmtree(worse / video / "0")
    methods = {"sft": worse, "aks": root, "ktg": root}
    results = evaluate_all("mevis", world.root, world.split, {**methods, **BASELINES})
    checkpoints = {name: results.pop(name) for name in methods}
    document = benchmark_document(checkpoints, results)
    changes = {(d["before"], d["after"]): d for d in document["differences"]}
    assert list(changes)[:3] == [("sft", "aks"), ("sft", "ktg"), ("aks", "ktg")]
    assert list(changes)[3:] == [(name, "ktg") for name in BASELINES]
    same, gain = changes["aks", "ktg"], changes["sft", "aks"]
    assert same["protocol"]["J&F"] == {"mean": 0, "low": 0, "high": 0}
    lost = [r["J"] for r in document["per_expression"] if r["expression_id"] == "0"]
    for mean in ("protocol", "micro", "macro"):
        for at, score in enumerate(SCORES):
            expected = level(checkpoints["aks"], mean)[at] - level(checkpoints["sft"], mean)[at]
            assert gain[mean][score]["mean"] == pytest.approx(expected)
        # one of the five expressions of each video lost all that it had
        assert min(lost) / 5 <= gain[mean]["J"]["low"] <= gain[mean]["J"]["high"] <= max(lost) / 5


def test_one_video_has_means_without_intervals(make_world, make_predictions) -> None:
    world = make_world("davis17", n_videos=1)
    root, _ = make_predictions(world)
    statistics = evaluate("davis17", world.root, "valid", root)["statistics"]
    assert statistics["micro"]["J"]["low"] is None and statistics["micro"]["J"]["mean"] > 0


def test_benchmark_without_counted_expressions_has_no_statistics(
    make_world, make_predictions
) -> None:
    world = make_world("revos", n_videos=1)
    path = world.root / "meta_expressions_valid_.json"
    document = json.loads(path.read_text())
    expressions = document["videos"][world.videos[0]]["expressions"]
    document["videos"][world.videos[0]]["expressions"] = {"2": expressions["2"]}
    path.write_text(json.dumps(document))
    root, _ = make_predictions(world)
    result = evaluate("revos", world.root, "valid", root)
    assert result["statistics"] is None and result["J"] is None
    assert score_differences("revos", {"a": result, "b": result}, [("a", "b")]) == [
        {"before": "a", "after": "b"}
    ]


def test_methods_that_scored_different_expressions_have_no_difference(
    make_world, make_predictions
) -> None:
    world = make_world("mevis", n_videos=1)
    root, _ = make_predictions(world)
    some, every = (
        evaluate("mevis", world.root, world.split, root, limit=limit) for limit in (2, None)
    )
    with pytest.raises(ValueError, match="different expressions"):
        score_differences("mevis", {"a": some, "b": every}, [("a", "b")])
