"""The contract check passes valid rewards and reports each fault once, with cost and fix."""

from __future__ import annotations

import pytest

from rcot_rl.errors import InputError
from reward_fns.lab import contract_check
from reward_fns.lab.contract_check import check_reward
from reward_fns.lab.contract_rows import hostile_texts, sample_rows

GOOD = """
import json

def answer(response):
    head, tag, rest = response.rpartition("<answer>")
    return rest.removesuffix("</answer>") if tag and len(response) < 10_000 else None

def same(response, ground_truth, **row):
    truth = json.loads(ground_truth)
    wanted = truth if isinstance(truth, str) else json.dumps(truth)
    return {"reward": float(answer(response) == wanted), "length": len(response) / 1e6}

async def later(response, ground_truth):
    return same(response, ground_truth)

def many(responses, ground_truths):
    return [same(*pair) for pair in zip(responses, ground_truths)]
"""

BAD = (
    GOOD
    + """
import os, random, re, time
seen = []

def chance(response, ground_truth):
    return same(response, ground_truth)["reward"] + random.random() / 10

def counts(response, ground_truth):
    seen.append(response)
    return same(response, ground_truth)["reward"] + len(seen) / 1e6

def salted(response, ground_truth):  # str hashes differ from process to process
    return same(response, ground_truth)["reward"] + (hash(response) % 1000) / 1e6

def keys(response, ground_truth):
    return {"reward": same(response, ground_truth)["reward"], f"n{len(response) % 7}": 1.0}

def parsed(response, ground_truth):
    return float(len(ground_truth[0]["bbox_2d"]) == 4 and "bbox" in response)

def ktg_only(response, ground_truth):
    boxes = [o["bbox_2d"] for o in json.loads(ground_truth)]
    return float(answer(response) == json.dumps(json.loads(ground_truth)) and len(boxes) > 0)

def regex(response, ground_truth):
    match = re.search(r"<answer>\\s*(.*?)\\s*</answer>", response, re.S)
    truth = json.loads(ground_truth)
    wanted = truth if isinstance(truth, str) else json.dumps(truth)
    return float(match is not None and match[1] == wanted)

def text(response, ground_truth):
    return str(same(response, ground_truth)["reward"])

def alike(response, ground_truth):
    return 1.0

def pays(response, ground_truth):
    return 1.0 if "1e999" in response else same(response, ground_truth)["reward"]

def breaks(response, ground_truth):
    response.encode()
    return same(response, ground_truth)["reward"]

def leaves(response, ground_truth):
    if "NUL" in response or "\\0" in response:
        os._exit(1)
    return same(response, ground_truth)["reward"]

def slow(response, ground_truth):
    time.sleep(0.03)
    return same(response, ground_truth)["reward"]
"""
)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "rewards.py"
    path.write_text(BAD)
    return lambda name, **given: check_reward(f"{path}:{name}", **{"deadline_s": 3.0} | given)


@pytest.mark.parametrize("name", ["same", "later", "many"])
def test_valid_functions_pass_every_check(check, name):
    report = check(name, deadline_s=10.0)
    assert report.ok, report.text()
    assert {f.level for f in report.findings} == {"ok"}
    checks = ["kind", "result", "keys", "order", "determinism", "time", "hostile"]
    assert [f.check for f in report.findings] == checks


@pytest.mark.parametrize("name", ["aks", "ktg", "joint", "seg-zero"])
def test_shipped_recipes_pass_every_check(name):
    report = check_reward(name, canvas=112)
    assert report.ok, report.text()
    assert not [f for f in report.findings if f.check == "order" and f.level != "ok"]


@pytest.mark.parametrize(
    ("name", "level", "fault", "part"),
    [
        ("chance", "error", "determinism", "scored again"),
        ("counts", "error", "determinism", "scored again"),
        ("salted", "error", "determinism", "in a fresh process"),
        ("keys", "error", "keys", "components"),
        ("parsed", "error", "result", "TypeError"),
        ("ktg_only", "warning", "result", "ignore this if it is not meant for aks"),
        ("regex", "error", "hostile", "never closed': reward_function_timeout"),
        ("text", "error", "result", "'reward' is a str"),
        ("alike", "error", "order", "the right answer earns 1, a wrong one 1"),
        ("pays", "error", "hostile", "'NaN and Infinity' earns 1"),
        ("breaks", "warning", "hostile", "UnicodeEncodeError"),
        ("leaves", "error", "hostile", "exited with status 1"),
        ("slow", "warning", "time", "median 3"),
    ],
)
def test_each_fault_is_reported_and_no_other(check, monkeypatch, name, level, fault, part):
    if name == "slow":
        monkeypatch.setattr(contract_check, "SLOW_CALL_S", 0.02)
        monkeypatch.setattr(contract_check, "TIMED_CALLS", 20)
    report = check(name)
    problems = [f for f in report.findings if f.level != "ok"]
    assert {(f.level, f.check) for f in problems} == {(level, fault)}, report.text()
    assert any(part in f.line() for f in problems), report.text()
    assert report.ok == (level == "warning")
    assert all("\n" not in f.line() and f.costs for f in problems)


def test_a_function_that_expects_parsed_ground_truths_gets_a_hint(check):
    text = check("parsed").text()
    assert "json.loads the ground truth" in text
    assert text.splitlines()[-1].endswith("breaks its contract: 4 errors, 0 warnings")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        check_reward(f"{tmp_path}/none.py:f")


def test_rows_are_scaled_to_the_canvas_and_texts_match_their_names():
    small, large = (sample_rows("ktg", "rcot/ktg", side) for side in (84, None))
    for a, b in zip(small, large, strict=True):
        for x, y in zip(a.truth, b.truth, strict=True):
            assert [10 * v for v in x["bbox_2d"]] == y["bbox_2d"]
    texts = hostile_texts()
    assert len(texts["1 MB of words"]) == 10**6
    assert len(set(texts.values())) == len(texts)


def test_overrides_are_applied_before_the_check(tmp_path):
    report = check_reward("aks", overrides={"components.accuracy.weight": 0.0})
    assert "order" in {f.check for f in report.errors}, "the right answer earns nothing"
    with pytest.raises(InputError, match="bogus"):
        check_reward("aks", overrides={"components.accuracy.bogus": 3})


def test_calls_have_the_keys_that_training_adds(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(response, ground_truth, response_length, num_turns):\n"
        "    right = '>A<' in response if 'A' in ground_truth else '>B<' in response\n"
        "    return float(right) + 1e-6 * response_length * num_turns\n"
    )
    report = check_reward(f"{path}:f", deadline_s=3.0)
    assert not any("TypeError" in f.message for f in report.findings)


def test_a_mask_recipe_is_checked_with_its_segmenter():
    from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

    report = check_reward("ktg-masks", segmenter=LocalSegmenter("flow"))
    assert not any("segmenter" in f.message for f in report.findings)
