"""Figures of a step's rollouts, against values derived by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rcot_rl.monitoring.run_files.rollout_figures import rollout_figures
from rcot_rl.monitoring.run_files.rollout_files import read_rollouts
from reward_fns.components.chosen_area import KEY

BOX = {"bbox_2d": [10, 10, 30, 30], "point_2d": [20, 20]}


def formed(answer):
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>t</think><answer>{text}</answer>"


@pytest.fixture
def figures(tmp_path):
    """Return a function: rows (prompt, response, truth, reward, other keys) -> figures."""

    def compute(rows, task="ktg", maximum=6.0):
        lines = [
            {
                "prompt_id": prompt,
                "sample": number,
                "data_source": f"rcot/{task}",
                "response": response,
                "ground_truth": json.dumps(truth),
                "reward": reward,
                **(rest[0] if rest else {}),
            }
            for number, (prompt, response, truth, reward, *rest) in enumerate(rows)
        ]
        file = tmp_path / "rollouts" / "1.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return rollout_figures(read_rollouts(tmp_path, 1), maximum)

    return compute


def test_groups_without_variance_are_too_easy_at_the_maximum_and_else_too_hard(figures):
    rows = [("easy", "", [BOX], 6.0)] * 2 + [("hard", "", [BOX], 0.0)] * 2
    rows += [("stuck", "", [BOX], 3.0)] * 2 + [("good", "", [BOX], r) for r in (1.0, 6.0)]
    values = figures(rows)
    assert values["group/too_easy_fraction"] == 1 / 4
    assert values["group/too_hard_fraction"] == 2 / 4


def test_aks_group_in_which_all_are_right_is_too_easy_below_the_maximum(figures):
    # right letters without a format point: all rewards are equal, and there is nothing to learn
    rows = [("p", "<answer>A</answer>", "A", 2.0)] * 3 + [("q", formed("A"), "B", 1.0)] * 3
    values = figures(rows, task="aks", maximum=3.0)
    assert values["group/too_easy_fraction"] == values["group/too_hard_fraction"] == 1 / 2
    assert figures(rows, task="aks", maximum=None)["group/too_easy_fraction"] == 1 / 2
    assert "group/too_easy_fraction" not in figures([("p", "", [BOX], 1.0)] * 2, maximum=None)


def test_confusion_adds_up_to_the_responses(figures):
    answers = [("A", "A")] * 3 + [("A", "B")] * 2 + [("B", "A")] + [("B", "B")] * 4
    rows = [("p", formed(given), truth, 1.0) for truth, given in answers]
    rows += [("p", "no answer", "A", 0.0), ("p", formed("C"), "B", 0.0), ("p", "", "B", 0.0)]
    values = {k: v for k, v in figures(rows, task="aks").items() if k.startswith("aks/")}
    assert values == {
        "aks/A_as_A": 3,
        "aks/A_as_B": 2,
        "aks/A_as_none": 1,
        "aks/B_as_A": 1,
        "aks/B_as_B": 4,
        "aks/B_as_none": 2,
    }
    assert sum(values.values()) == len(rows)


def test_boxes_are_compared_with_the_true_ones(figures):
    twice = {"bbox_2d": [10, 10, 30, 50], "point_2d": [20, 20]}
    rows = [
        ("p", formed([BOX]), [BOX], 6.0),  # IoU 1, area ratio 1
        ("p", formed([twice]), [BOX], 4.0),  # IoU 1/2, area ratio 2
        ("p", formed([twice, BOX]), [BOX], 4.0),  # best IoU 1, area ratio 3
        ("p", "none", [BOX], 0.0),  # no box: IoU 0, no ratio
    ]
    values = figures(rows)
    assert values["ktg/box_area_ratio"] == 2
    assert values["ktg/box_iou"] == (1 + 1 / 2 + 1 + 0) / 4
    assert values["ktg/objects_predicted"] == 1 and values["ktg/objects_true"] == 1
    assert values["ktg/right_count_fraction"] == 1 / 2


def test_length_is_correlated_within_groups_only(figures):
    # within both groups longer responses earn more; across groups the longer group earns less
    rows = [
        ("short", "", [BOX], reward, {"response_tokens": tokens})
        for tokens, reward in ((10, 4.0), (20, 5.0))
    ] + [
        ("long", "", [BOX], reward, {"response_tokens": tokens})
        for tokens, reward in ((110, 0.0), (120, 1.0))
    ]
    values = figures(rows)
    assert values["response_length/reward_correlation"] == pytest.approx(1.0)
    across = np.corrcoef([10, 20, 110, 120], [4, 5, 0, 1])[0, 1]
    assert across < 0
    assert "response_length/reward_correlation" not in figures([r[:4] for r in rows])


def test_episodes_have_means_of_area_and_rounds(figures):
    extra, agentic, _ = KEY.split(".")  # where the reward reads the same outcome
    outcomes = [{"area": 1.0, "judgements": 1}, {"area": 0.5, "judgements": 4}, {"area": "?"}]
    rows = [("p", formed("A"), "A", 3.0, {extra: {agentic: outcome}}) for outcome in outcomes]
    values = figures(rows, task="aks")
    assert values["agentic/keyframe_area_ratio"] == 0.75
    assert values["agentic/rounds"] == 2.5


def test_broken_rows_leave_finite_figures(figures):
    rows = [
        ("p", formed([{"bbox_2d": [0, 0, 1e308, 1e308], "point_2d": "x"}] * 99), [BOX, 7], 1.0),
        ("p", formed([BOX]), [{"bbox_2d": "far"}], 1.0),
        ("p", "\ud800<answer>", None, 0.0),
    ]
    values = figures(rows)
    assert values["ktg/objects_predicted"] == (99 + 1 + 0) / 3
    assert not any(math.isnan(value) for value in values.values())
