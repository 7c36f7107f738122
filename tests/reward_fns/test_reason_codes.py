"""The listed reason codes against those that the rewards give to many faulty responses."""

from __future__ import annotations

import itertools
import json

import pytest

from reward_fns.lab import exploits
from reward_fns.reason_codes import CODES, reason_codes
from reward_fns.registry import modules
from reward_fns.reward_recipe import load_reward_recipe
from reward_fns.score import load_reward

TARGETS = [
    {"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]},
    {"bbox_2d": [400, 400, 500, 500], "point_2d": [450, 450]},
]
OVERSIZED = {"response_too_long", "too_many_blocks", "json_too_deep", "items_too_many"}
NOT_FINITE = {"box_not_finite", "point_not_finite"}
ITEMS = [
    {"bbox_2d": [100, 100, 300, 300]},
    {"bbox_2d": [100, 100, 300], "point_2d": [1]},
    {"bbox_2d": [300, 100, 100, 300], "point_2d": [1, 1]},
    {"point_2d": [200, 200]},
    {},
]
BLOCKS = ("<think>", "</think>", "<answer>", "</answer>", "A", '[{"bbox_2d": [1]}]')


def responses(truth):
    """Return responses with all orders of a few tags, and with faulty items."""
    for parts in itertools.product(BLOCKS, repeat=4):
        yield "".join(parts)
        yield "<think>x</think>" + "".join(parts) + "</answer>"
    for answer in ("A", "B", "C", "", "{}", "[]", "[1]", "[", json.dumps(TARGETS)):
        yield exploits.well_formed(answer)
        yield f"<answer>{answer}</answer>"
    for items in itertools.combinations_with_replacement(ITEMS, 2):
        yield exploits.well_formed(list(items))
    attacks = exploits.AKS if isinstance(truth, str) else exploits.KTG
    yield from (attack(truth) for attack in attacks)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("aks", "A"),
        ("ktg", TARGETS),
        ("ktg-soft", TARGETS),
        ("aks-answer-only", "B"),
        ("ktg-answer-only", TARGETS),
    ],
)
def test_listed_codes_are_those_of_faulty_responses(name, truth):
    reward, listed = load_reward(name), set(reason_codes(load_reward_recipe(name)))
    given = {code for text in responses(truth) for code in reward.score(text, truth).reasons}
    assert given - OVERSIZED - NOT_FINITE <= listed
    assert listed <= given, "a listed code that no response earns would be a chart of zeros"


def test_modules_and_tasks_exist():
    known = modules()
    assert all(set(tasks) <= known[module].tasks for module, tasks in CODES.items())


def test_routed_reward_has_the_codes_of_its_routes():
    joint = set(reason_codes(load_reward_recipe("joint")))
    assert joint >= {"option_wrong", "iou_low"}
