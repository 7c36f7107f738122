"""Hostile responses: no crash, no reward out of bounds, no changing keys, nothing slow.

Responses are valid ones that are cut, spliced, repeated and salted (tags, brackets, numbers of all
sizes, control characters, half surrogate pairs), or raw bytes. The slow test runs a million.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from rcot_rl.protocol.control_tokens import neutralize
from reward_fns import load_reward
from reward_fns.score import Reward

LIMIT_S = 0.025
"""A quadratic step over 20,000 characters exceeds this; the slowest core does not. An ordinary core
takes at most 5 ms (docs/results/rewards.md)."""
TRUTHS = {
    "aks": ["A", "B"],
    "ktg": [
        [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}],
        [
            {"bbox_2d": [10 * k, 10, 10 * k + 60, 90], "point_2d": [10 * k + 30, 50]}
            for k in range(3)
        ],
    ],
    "ktg-zero-target": [[], [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]],
    "visionreasoner": [[{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]],
    "seg-zero": ["<box>(10,20),(200,210)</box><points>(30,40),(50,60)</points>"],
}
SEEDS = [
    "<think>left of the tree</think><answer>A</answer>",
    '<think>x</think>\n<answer>[{"bbox_2d": [101, 99, 305, 290], "point_2d": [200, 199]}]</answer>',
    '<think>1.5 2.5</think><answer>[{"bbox_2d": [10, 10, 70, 90], "point_2d": [40, 50]}, '
    '{"bbox_2d": [2.5e1, 1e1, 85.0, 90], "point_2d": [50, 50]}]</answer>',
    "<think></think><answer>[]</answer>",
    '<think>a</think><answer>{"bbox": [10,20,200,210], "points_1": [30,40], '
    '"points_2": [50,60]}</answer>',
    "",
]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "</think><answer>", "<box>", "```json", "<"]
BRACKETS = [*'[]{},:"\\', "\\u", "[" * 200, "{" * 200, '{"a":' * 90, "(1,2)"]
VALUES = ["NaN", "-Infinity", "1e999", "-0", "9" * 400, "1" * 5000, "1_000", "null", "true", "٣"]
CHARACTERS = ["\x00", "\u2028", "\ud800", "é", "𝔸", " " * 400, "\n", ".", "A", "B"]
SALT = [*TAGS, *BRACKETS, *VALUES, *CHARACTERS, '"bbox_2d"', '"point_2d"']


def mutate(rng: np.random.Generator) -> str:
    """Return a hostile response of at most 20,000 characters."""
    text = SEEDS[rng.integers(len(SEEDS))]
    for kind in rng.integers(0, 7, rng.integers(0, 7)):
        a, b = sorted(rng.integers(0, len(text) + 1, 2).tolist())
        salt = SALT[rng.integers(len(SALT))]
        if kind == 0:
            text = text[:a] + text[b:]
        elif kind == 1:
            text = text[:a] + salt + text[a:]
        elif kind == 2:
            text = text[:a] + text[a:b] * int(rng.integers(2, 30)) + text[b:]
        elif kind == 3:
            text = text[:a] + salt * int(rng.integers(1, 40)) + text[b:]
        elif kind == 4:
            other = SEEDS[rng.integers(len(SEEDS))]
            text = text[:a] + other[rng.integers(len(other) + 1) :]
        elif kind == 5:
            text = text[:a] + str(rng.integers(-(2**62), 2**62)) + text[b:]
        else:
            raw = rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8).tobytes()
            text = text[:a] + raw.decode("utf-8", "replace" if a % 2 else "surrogateescape")
    return text[:20_000]


def fastest(reward: Reward, response: str, truth: object) -> float:
    """Return the seconds of the fastest of five runs, so that other load does not count."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        reward.score(response, truth)
        times.append(time.perf_counter() - started)
    return min(times)


def fuzz(name: str, count: int, seed: int) -> None:
    """Check `count` hostile responses."""
    reward = load_reward(name)
    truths = TRUTHS[name]
    rng = np.random.default_rng([5, seed])
    earned = set()
    for number in range(count):
        response, truth = mutate(rng), truths[number % len(truths)]
        started = time.perf_counter()
        score = reward.score(response, truth)
        seconds = time.perf_counter() - started
        if seconds > LIMIT_S:
            seconds = fastest(reward, response, truth)
        assert seconds <= LIMIT_S, f"{seconds:.4f} s: {response!r}"
        assert math.isfinite(score.reward), response
        assert -1e-9 <= score.reward <= (reward.max_reward or 0) + 1e-9, response
        assert tuple(score.components) == reward.component_names
        assert score.reasons or score.reward >= (reward.max_reward or 0) - 1e-9, response
        json.dumps(score.reasons)
        earned.add(score.reward)
    assert len(earned) > 2  # some mutations still earn something


@pytest.mark.parametrize("name", ["aks", "ktg"])
@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|image_pad|>", "<tool_call>", "<image>", "[SEG]"]
)
def test_control_tokens_in_reasoning_change_no_score(name: str, token: str) -> None:
    """SFT targets are neutralized, responses are not; both must earn the same."""
    reward, truth = load_reward(name), TRUTHS[name][0]
    answer = truth if isinstance(truth, str) else json.dumps(truth)
    response = f"<think>left {token}of the{token} tree</think>\n<answer>{answer}</answer>"
    plain = neutralize(response, ("[SEG]",), keep_tags=True)
    assert plain != response and token not in plain
    scores = [reward.score(text, json.dumps(truth)) for text in (response, plain)]
    assert scores[0] == scores[1]
    assert scores[0].reasons == [] and scores[0].reward > 0
    outside = reward.score(response + token, json.dumps(truth))
    assert outside.reasons[0] == "text_outside_tags", "outside the tags it is text"


@pytest.mark.parametrize("name", TRUTHS)
def test_hostile_responses_score_within_bounds_and_time(name: str) -> None:
    fuzz(name, 4_000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUTHS)
def test_a_million_hostile_responses_score_within_bounds_and_time(name: str) -> None:
    fuzz(name, 200_000, 1)
