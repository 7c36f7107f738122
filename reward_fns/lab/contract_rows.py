"""Inputs of the contract check: rows as in training, answers to them, hostile texts.

Rows are verl rows, so the ground truth is JSON text. Each has a right, a wrong and an empty answer.
The hostile texts are outputs that models produce under reinforcement learning: blanks, endless
brackets, tags that never close. They test whether a reward survives; `exploits.py` tests what it
pays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reward_fns.lab.exploits import well_formed
from reward_fns.registry import REFERENCE_CANVAS

THINK = (
    "The query asks for something that moves through the scene and is partly hidden at times. "
    "Comparing the candidates by colour, size and place, the one that fits stands a little left "
    "of the middle; it is whole in this frame, and nothing else answers the words of the query."
)
_OBJECTS = {
    "one object": [([120, 200, 360, 560], [240, 380])],
    "three objects": [
        ([40, 60, 200, 300], [120, 180]),
        ([300, 420, 520, 800], [410, 610]),
        ([600, 90, 820, 330], [710, 210]),
    ],
}


@dataclass(frozen=True)
class SampleRow:
    """One row with three answers."""

    name: str
    task: str
    data_source: str
    truth: Any
    """Ground truth as a value."""
    right: str
    wrong: str
    empty: str
    canvas: int

    @property
    def ground_truth(self) -> str:
        """Ground truth as the JSON text that training passes."""
        return json.dumps(self.truth)

    @property
    def row(self) -> dict[str, Any]:
        """Other keys that training passes."""
        extra = {
            "index": 0,
            "task": self.task,
            "dataset": "sample",
            "video": "v0",
            "expression_id": "0",
            "expression": "the one that moves",
            "object_ids": [1],
            "frame": "00000",
            "frame_index": 0,
            "source_size": [480, 854],
            "canvas": [self.canvas, self.canvas],
            "target": "single",
            "description": "Several things move through a room.",
            "split": "train",
        }
        return {"data_source": self.data_source, "extra_info": extra}


def response(answer: str) -> str:
    """Return a well-formed response of usual length."""
    return well_formed(answer, THINK)


def sample_rows(task: str, data_source: str, canvas: int | None = None) -> list[SampleRow]:
    """Return the built-in rows of `aks`, `ktg` or `seg-zero`; empty for another task."""
    side = canvas or REFERENCE_CANVAS
    if task == "aks":
        return [
            SampleRow(
                f"aks, {a} is right", task, data_source, a, response(a), response(b), "", side
            )
            for a, b in ("AB", "BA")
        ]
    if task == "ktg":
        return [_ktg(name, objects, data_source, side) for name, objects in _OBJECTS.items()]
    return [_seg_zero(data_source, side)] if task == "seg-zero" else []


def _scaled(values: list[int], side: int) -> list[int]:
    return [round(v * side / REFERENCE_CANVAS) for v in values]


def _ktg(name: str, objects: list[Any], source: str, side: int) -> SampleRow:
    truth = [
        {"bbox_2d": _scaled(box, side), "point_2d": _scaled(point, side)} for box, point in objects
    ]
    corner = {"bbox_2d": _scaled([1, 820, 21, 839], side), "point_2d": _scaled([11, 830], side)}
    wrong = json.dumps([corner] * len(truth))
    return SampleRow(
        f"ktg, {name}", "ktg", source, truth, response(json.dumps(truth)), response(wrong), "", side
    )


def _seg_zero(source: str, side: int) -> SampleRow:
    x1, y1, x2, y2 = _scaled([120, 200, 360, 560], side)
    a, b = _scaled([200, 300], side), _scaled([280, 440], side)
    truth = f"<box>({x1},{y1}),({x2},{y2})</box><points>({a[0]},{a[1]}),({b[0]},{b[1]})</points>"
    right = {"bbox": [x1, y1, x2, y2], "points_1": a, "points_2": b}
    wrong = {"bbox": _scaled([1, 820, 21, 839], side), "points_1": [2, 2], "points_2": [3, 3]}
    answers = response(json.dumps(right)), response(json.dumps(wrong))
    return SampleRow("seg-zero", "seg-zero", source, truth, *answers, "", side)


def hostile_texts() -> dict[str, str]:
    """Return hostile responses by their description."""
    item = '{"bbox_2d": [1, 2, 300, 400], "point_2d": [10, 20]}'
    return {
        "empty": "",
        "one blank": " ",
        "100,000 blanks": " " * 100_000,
        "1 MB of words": "word " * 200_000,
        "1 MB of one letter": "a" * 1_000_000,
        "answer tag, 20,000 blanks, never closed": "<answer>" + " " * 20_000,
        "10,000 open think tags": "<think>" * 10_000,
        "answer inside think": "<think><answer>A</answer></think>",
        "two answers": "<think>x</think><answer>A</answer><answer>B</answer>",
        "answer before think": "<answer>A</answer><think>x</think>",
        "tag in other letters": "<THINK>x</THINK><ANSWER>A</ANSWER>",
        "nested brackets": response("[" * 100_000),
        "nested objects": response('{"a":' * 50_000),
        "NaN and Infinity": response('[{"bbox_2d": [NaN, -Infinity, Infinity, 1e999]}]'),
        "a number of 5,000 digits": response("9" * 5_000),
        "10,000 items": response("[" + ", ".join([item] * 10_000) + "]"),
        "items that are no objects": response('[1, null, "x", [], true, {}]'),
        "wrong types": response('[{"bbox_2d": "abcd", "point_2d": {"x": 1}}]'),
        "an object, not a list": response(item),
        "half a surrogate pair": response("\ud800"),
        "NUL and control characters": "<think>\0\x1b[2J</think>\u2028<answer>\u202eA</answer>",
        "a digit of another script": response("٣"),
        "code": response("__import__('os').system('true')"),
    }
