"""Rewards on verl's event loop: nothing waits for a sample that overruns."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from rcot_rl.errors import InputError
from rcot_rl.training import reward_function
from rcot_rl.training.reward_function import compute_score
from reward_fns.score import RecipeReward

RIGHT = "<think>It is there.</think><answer>A</answer>"

FUNCTIONS = """
import asyncio, os, time

def plain(response, ground_truth, extra_info=None, response_length=None):
    if response == "hang":
        time.sleep(60)
    return {"reward": len(response), "index": extra_info["index"], "tokens": response_length or 0}

async def waits(response, ground_truth):
    if response == "hang":
        await asyncio.sleep(60)
    if response == "block":
        time.sleep(60)
    if response == "die":
        os._exit(1)
    await asyncio.sleep(0.2)
    return {"reward": len(response), "a": 1.0}

def batch(responses, ground_truths):
    if "hang" in responses:
        time.sleep(60)
    return [{"reward": len(r), "size": len(responses)} for r in responses]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "fn.py"
    path.write_text(FUNCTIONS)
    return path


def score_all(spec: str, *texts: str, deadline_s: float = 3.0, **row) -> list[dict]:
    """Score all texts at once; fail if the event loop is blocked meanwhile."""
    settings = {"reward": spec, "canvas": 112, "deadline_s": deadline_s, **row}

    async def run() -> list[dict]:
        delays, done = [], asyncio.Event()

        async def measure() -> None:
            while not done.is_set():
                start = time.monotonic()
                await asyncio.sleep(0.01)
                delays.append(time.monotonic() - start)

        monitor = asyncio.create_task(measure())
        calls = [
            compute_score("rcot/aks", text, '"A"', {"index": i}, **settings)
            for i, text in enumerate(texts)
        ]
        try:
            return await asyncio.gather(*calls)
        finally:
            done.set()
            await monitor
            assert max(delays) < 10  # a sample that hangs does so for 60

    return asyncio.run(run())


def test_a_recipe_scores_with_components_reasons_and_seconds() -> None:
    scores = score_all("aks", RIGHT, "nonsense")
    assert [f["score"] for f in scores] == [3.0, 0.0]
    assert scores[0].keys() == scores[1].keys()
    assert scores[0]["component/accuracy"] == 1.0
    assert scores[0]["reasons"] == "" != scores[1]["reasons"]
    assert 0 < scores[0]["reward_seconds"] < 1


def test_a_plain_function_loses_only_the_sample_that_hangs(file) -> None:
    scores = score_all(f"{file}:plain", "a", "hang", "abc", response_length=9)
    assert [f["score"] for f in scores] == [1.0, 0.0, 3.0]
    assert scores[1]["reasons"].split(";") == ["reward_function_timeout", "deadline"]
    assert scores[2] == scores[2] | {"component/index": 2.0, "component/tokens": 9.0, "reasons": ""}
    assert scores[1]["component/index"] == 0.0 and scores[0].keys() == scores[1].keys()
    # the wait of the next sample does not count
    assert scores[2]["reward_seconds"] < 2.9 <= scores[1]["reward_seconds"]


@pytest.mark.parametrize(
    ("bad", "reasons"),
    [
        ("hang", "reward_function_timeout;deadline"),
        ("block", "reward_function_timeout;deadline"),
        ("die", "reward_function_died"),
    ],
)
def test_only_the_bad_one_of_overlapping_calls_is_lost(file, bad, reasons) -> None:
    texts = ["a", "ab", bad, *["abc"] * 20]
    scores = score_all(f"{file}:waits", *texts)
    assert [f["score"] for f in scores] == [0.0 if t == bad else len(t) for t in texts]
    assert scores[2]["reasons"] == reasons


def test_calls_of_an_async_function_overlap(file) -> None:
    score_all(f"{file}:waits", "a")  # loads it
    start = time.monotonic()
    assert [f["score"] for f in score_all(f"{file}:waits", *["ab"] * 64)] == [2.0] * 64
    assert time.monotonic() - start < 10  # one after another: 12.8


def test_a_batch_function_gets_all_waiting_samples(file) -> None:
    scores = score_all(f"{file}:batch", *["ab"] * 10)
    assert [f["component/size"] for f in scores] == [10.0] * 10
    scores = score_all(f"{file}:batch", "a", "hang", "abc")
    assert [f["score"] for f in scores] == [1.0, 0.0, 3.0]
    assert "deadline" in scores[1]["reasons"]


def test_a_recipe_that_overruns_is_abandoned(monkeypatch) -> None:
    """`mask_iou` can overrun: it waits for another process."""
    release, score = threading.Event(), RecipeReward.score

    def stuck(self, response, ground_truth, **row):
        if response == "hang":
            release.wait(30)
        return score(self, response, ground_truth, **row)

    monkeypatch.setattr(RecipeReward, "score", stuck)
    try:
        scores = score_all("aks", RIGHT, "hang", RIGHT, deadline_s=2.0)
    finally:
        release.set()
    assert [f["score"] for f in scores] == [3.0, 0.0, 3.0]
    assert scores[1]["reasons"] == "deadline"
    assert scores[1]["component/format"] == 0.0 and scores[0].keys() == scores[1].keys()


def test_a_broken_ground_truth_is_an_input_error() -> None:
    with pytest.raises(InputError, match="ground_truth"):
        asyncio.run(compute_score("rcot/ktg", "", "{", reward="ktg", canvas=112))


def test_rehearsed_rows_are_scored_with_the_reward_of_their_stage(file) -> None:
    async def run(source: str) -> dict:
        spec, others = f"{file}:waits", {"rcot/aks": "aks"}
        return await compute_score(
            source, RIGHT, "A", reward=spec, canvas=112, deadline_s=3.0, rehearsed=others
        )

    rehearsed, own = asyncio.run(run("rcot/aks")), asyncio.run(run("rcot/ktg"))
    assert (rehearsed["score"], rehearsed["component/accuracy"]) == (3.0, 1.0)
    assert (own["score"], own["component/a"]) == (len(RIGHT), 1.0)
    assert "component/accuracy" not in own


def test_separators_in_a_functions_reasons_are_escaped(tmp_path) -> None:
    (tmp_path / "r.py").write_text(
        "def f(r, t):\n    return {'reward': 0, 'reasons': ['a;b', 'c']}\n"
    )
    assert score_all(f"{tmp_path}/r.py:f", "x")[0]["reasons"] == "a,b;c"


def test_rewards_are_loaded_once_per_process(monkeypatch, tmp_path) -> None:
    (tmp_path / "r.py").write_text("def f(r, t):\n    return 1\n")
    loads = []
    load_reward = reward_function.load_reward
    monkeypatch.setattr(
        reward_function, "load_reward", lambda *a, **k: loads.append(a) or load_reward(*a, **k)
    )
    for _ in range(2):
        score_all(f"{tmp_path}/r.py:f", "x", "y")
    assert len(loads) == 1
