"""Costs and AKS verdicts of traces on small corpora, against sums and counts worked out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcot_rl.evaluation.benchmarks import evaluate

TRACE: dict[str, Any] = {
    "keyframe": 2,
    "initial_keyframe": 2,
    "rounds": 1,
    "boxes_source": [],
    "segmenter": "flow",
}


def step(task: str, prompt: str = "", seconds: float | None = 1.0, **more: Any) -> dict[str, Any]:
    tokens = {"prompt_tokens": 100, "cached_tokens": 30, "tokens": 7}
    frame = 2 if task in ("aks", "ktg") else None
    return {"task": task, "frame": frame, "response": "", "prompt": prompt, "seconds": seconds} | (
        tokens | more
    )


def judged(frame: int, option: str, chance: float | None) -> dict[str, Any]:
    response = f"<think>x \ud800</think><answer>{option}</answer>"
    chances = None if chance is None else {"A": chance, "B": 1 - chance}
    return step("aks", f"{frame}", response=response, frame=frame, option_probabilities=chances)


@pytest.fixture
def scored(make_world, make_predictions):
    """Return a function that scores traces, (video, expression) -> changes of TRACE."""

    def score(traces: dict[tuple[str, str], dict[str, Any]], dataset: str = "mevis"):
        world = make_world(dataset)
        root, _ = make_predictions(world)
        for (video, expression), changes in traces.items():
            path = Path(root) / video / expression / "trace.json"
            path.write_text(json.dumps(TRACE | changes))
        result = evaluate(dataset, world.root, world.split, root)
        json.dumps(result, allow_nan=False)
        return world, result

    return score


QUERY = [
    step("vdg", "describe", 2.0),
    step("kfg", "choose 0", 3.0),
    step("aks", "judge 0", 4.0),
    step("kfg_again", "again 0", 5.0, tokens=8),
    step("aks", "judge 0", 6.0, frame=4),
    step("ktg", "boxes 0", 10.0),
]
OTHER = [step("vdg", "describe", 2.0), step("kfg", "choose 1", 1.0), step("ktg", "boxes 1", 20.0)]


def test_a_request_that_queries_of_a_video_share_is_summed_once(scored) -> None:
    _, result = scored(
        {
            ("clip-0", "0"): {"steps": QUERY, "segment_seconds": 30.0},
            ("clip-0", "1"): {"steps": OTHER, "segment_seconds": 40.0},
            ("clip-1", "0"): {"steps": OTHER, "segment_seconds": 0.0},
        }
    )
    costs = result["pipeline_costs"]
    stages = costs["stages"]
    seconds = {"vdg": 2 + 2, "kfg": 3 + 1 + 1, "aks": 4 + 5 + 6, "ktg": 10 + 20 + 20, "sam2": 70}
    assert {name: stage["seconds"] for name, stage in stages.items()} == seconds
    assert {name: stage["requests"] for name, stage in stages.items()} == {
        "vdg": 2,
        "kfg": 3,
        "aks": 3,
        "ktg": 3,
        "sam2": 3,
    }
    for name in ("vdg", "kfg", "aks", "ktg"):
        count = stages[name]["requests"]
        assert stages[name]["prompt_tokens"] == 100 * count
        assert stages[name]["uncached_tokens"] == 70 * count
        assert stages[name]["generated_tokens"] == 7 * count + (name == "aks")
        assert stages[name]["relative"] == pytest.approx(seconds[name] / 120)
    assert stages["ktg"]["relative"] + stages["sam2"]["relative"] == pytest.approx(1)
    assert costs["aks_extra"] == pytest.approx(100 * 15 / (4 + 5 + 50 + 70))
    # a query needs all requests of its trace
    assert costs["n_queries"] == 3
    assert costs["keyframe_seconds"] == pytest.approx((20 + 3 + 3) / 3)
    assert costs["segmentation_seconds"] == pytest.approx((40 + 60 + 20) / 3)
    first, second = result["per_expression"][:2]
    assert (first["keyframe_seconds"], first["segmentation_seconds"]) == (20, 40)
    assert (second["keyframe_seconds"], second["segmentation_seconds"]) == (3, 60)
    assert "requests" not in first


def test_masks_that_queries_share_are_summed_once_and_cost_each_query_their_seconds(scored) -> None:
    """Shared masks have equal prompts and the seconds of one pass."""
    prompts = {"boxes_source": [[1, 2, 3, 4]], "points_source": [[2, 3]]}
    shared = {"steps": [step("ktg", "boxes", 10.0)], "segment_seconds": 30.0, **prompts}
    _, result = scored(
        {
            ("clip-0", "0"): shared,
            ("clip-0", "1"): shared | {"steps": [step("ktg", "others", 20.0)]},
            ("clip-0", "2"): shared | {"segment_seconds": 31.0},  # a pass of its own
            ("clip-0", "3"): shared | {"points_source": [[2, 2]]},
            ("clip-1", "0"): shared,
        }
    )
    costs = result["pipeline_costs"]
    assert costs["stages"]["sam2"]["requests"] == 4
    assert costs["stages"]["sam2"]["seconds"] == 30 + 31 + 30 + 30
    assert costs["n_queries"] == 5
    assert costs["segmentation_seconds"] == pytest.approx((40 + 50 + 41 + 40 + 40) / 5)


def test_requests_about_other_frames_of_one_text_are_different(scored) -> None:
    steps = [
        step("kfg", "same", frames=[0, 2]),
        step("kfg", "same", frames=[0, 3]),
        step("aks", "same", frame=0),
        step("aks", "same", frame=1),
    ]
    _, result = scored({("clip-0", "0"): {"steps": steps}})
    stages = result["pipeline_costs"]["stages"]
    assert (stages["kfg"]["requests"], stages["aks"]["requests"]) == (2, 2)


def test_figures_that_need_unrecorded_seconds_are_none(scored) -> None:
    _, result = scored(
        {
            ("clip-0", "0"): {"steps": QUERY, "segment_seconds": 1.0},
            ("clip-0", "1"): {"steps": OTHER},
            ("clip-0", "2"): {"steps": [step("ktg", seconds=None)], "segment_seconds": 1.0},
            ("clip-0", "3"): {},
        }
    )
    costs = result["pipeline_costs"]
    assert costs["n_queries"] == 2 and result["n_traces"] == 4
    assert costs["keyframe_seconds"] == pytest.approx((20 + 3) / 2)
    assert costs["segmentation_seconds"] is None is costs["aks_extra"]
    assert costs["stages"]["sam2"]["seconds"] is None is costs["stages"]["vdg"]["relative"]
    assert costs["stages"]["ktg"]["seconds"] == 30


def test_masks_without_requests_have_only_their_own_cost(scored) -> None:
    """As the upper bound with true keyframe and boxes, which asks nothing."""
    _, result = scored({("clip-0", "0"): {"steps": [], "segment_seconds": 5.0}})
    costs = result["pipeline_costs"]
    assert (costs["keyframe_seconds"], costs["segmentation_seconds"]) == (0, 5)
    assert costs["stages"]["sam2"]["seconds"] == 5 and costs["aks_extra"] is None


def test_traces_without_steps_have_no_figures_of_steps(scored) -> None:
    _, result = scored({("clip-0", "0"): {}, ("clip-0", "1"): {"steps": "of another program"}})
    assert result["n_traces"] == 2 and not result["faults"]
    assert result["pipeline_costs"] is None is result["aks_verdicts"]


def test_verdicts_are_counted_against_the_visibility_of_the_target(scored) -> None:
    """Every object is hidden in frame 0 and visible in frames 1 to 4; expression 2 has none."""
    judgements = {
        ("clip-0", "0"): [(0, "B", 0.2), (1, "A", 0.9), (2, "B", 0.4)],
        ("clip-0", "1"): [(0, "A", 0.8), (3, "A", 0.7), (4, "A.", None)],
        ("clip-1", "2"): [(2, "B", 0.1), (3, "A", 1.0)],
    }
    steps = {
        pair: {"steps": [judged(*judgement) for judgement in of_pair]}
        for pair, of_pair in judgements.items()
    }
    world, result = scored(steps)
    rows = [
        (world.truth(*pair)[frame].any(), option, chance)
        for pair, of_pair in judgements.items()
        for frame, option, chance in of_pair
    ]
    visible = np.array([row[0] for row in rows])
    assert visible.sum() == 4 and len(rows) == 8
    verdicts = result["aks_verdicts"]
    assert (verdicts["n"], verdicts["n_unknown"]) == (8, 0)
    assert verdicts["confusion"] == {
        "A": {"visible": 2, "absent": 2},
        "B": {"visible": 1, "absent": 2},
        "none": {"visible": 1, "absent": 0},
    }
    assert (verdicts["precision_A"], verdicts["recall_A"]) == (50, 50)
    assert verdicts["precision_B"] == pytest.approx(200 / 3) and verdicts["recall_B"] == 50
    assert verdicts["accuracy"] == 50
    assert verdicts["n_probabilities"] == 7
    assert verdicts["probability_visible"] == pytest.approx((0.9 + 0.4 + 0.7) / 3)
    assert verdicts["probability_absent"] == pytest.approx((0.2 + 0.8 + 0.1 + 1.0) / 4)
    errors = [chance - seen for seen, _, chance in rows if chance is not None]
    assert verdicts["brier"] == pytest.approx(np.square(errors).mean())
    assert result["per_expression"][0]["aks_verdicts"][2] == {
        "frame": 2,
        "option": "B",
        "probability": 0.4,
        "visible": True,
    }


def test_verdicts_on_frames_without_ground_truth_are_only_counted(
    make_world, make_predictions
) -> None:
    world = make_world("reasonvos", n_videos=1)
    root, _ = make_predictions(world)
    (world.root / "Annotations" / "MOSE_clip-0_1" / "00010.png").unlink()
    steps = [judged(2, "B", 0.5), judged(1, "A", 0.5)]
    (root / "clip-0" / "0" / "trace.json").write_text(json.dumps(TRACE | {"steps": steps}))
    verdicts = evaluate("reasonvos", world.root, world.split, root)["aks_verdicts"]
    assert (verdicts["n"], verdicts["n_unknown"], verdicts["accuracy"]) == (1, 1, 100)
    assert verdicts["recall_B"] is None is verdicts["precision_B"]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"},
        {"task": ["aks"]},
        {"frame": 5},
        {"frame": -1},
        {"frame": "0"},
        {"prompt": 3},
        {"response": None},
        {"tokens": 10**400},
        {"tokens": -1},
        {"seconds": 1e300},
        {"seconds": float("nan")},
        {"option_probabilities": {"A": 2.0}},
        {"option_probabilities": [0.5]},
    ],
)
def test_bad_steps_are_a_fault_of_the_trace(change: dict[str, Any], scored) -> None:
    _, result = scored({("clip-0", "0"): {"steps": [step("vdg"), step("aks") | change]}})
    (fault,) = result["faults"]
    assert fault["place"] == "clip-0/0/trace.json" and "step" in fault["reason"]
    assert result["n_traces"] == 0 and result["J"] > 0
