"""Users' functions: how a spec names one, and the supported signatures."""

from __future__ import annotations

import sys

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.user import sources

FUNCTIONS = """
import asyncio, functools, json, time
import numpy as np
from neighbour import LETTER

def plain(response, ground_truth, extra_info=None, canvas=None):
    return {"reward": 1, "index": extra_info["index"], "canvas": canvas or 0}

async def waits(response, ground_truth):
    if response == "slow":
        await asyncio.sleep(60)
    if response == "blocks":
        time.sleep(60)
    if response == "raise":
        raise KeyError("x")
    await asyncio.sleep(0.05)
    return len(response)

def promise(response, ground_truth):
    return waits(response, ground_truth)

def batch(responses, ground_truths, index=None, canvas=None):
    assert isinstance(responses, list) and len(responses) == len(ground_truths)
    if "whole" in responses and len(responses) > 1:
        raise ValueError("together")
    if "short" in responses:
        return []
    return [{"reward": len(responses), "index": i, "canvas": canvas} for i in index]

async def batch_waits(responses, ground_truths):
    await asyncio.sleep(60 if "slow" in responses else 0)
    return np.array([len(r) for r in responses])

def marked(texts, truths):
    return [float(t == u) for t, u in zip(texts, truths)]
marked.REWARD_TYPE = "batch"

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": len(solution_str), "index": extra_info.get("index", -1),
            "ktg": data_source == "rcot/ktg"}

def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": len(s), "index": e["index"]} for s, e in zip(solution_strs, extra_infos)]

def easy(reward_inputs, weight=0.5):
    return [{"overall": weight * len(i["response"]), "truth": i["ground_truth"]}
            for i in reward_inputs]

def declared(response, ground_truth):
    return {"reward": 1.0, "a": 1 / len(response), "b": 0.0}
declared.COMPONENTS = ("b", "a")

half = functools.partial(easy, weight=0.25)
late = functools.partial(waits)

class Called:
    async def __call__(self, response, ground_truth):
        await asyncio.sleep(0)
        return 4.0
called = Called()

def numpy(response, ground_truth):
    return {"reward": np.float32(0.5), "a": np.int64(3), "b": np.bool_(True)}

def three(a, b, c):
    return 0.0 if c is None else c

not_a_function = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "neighbour.py").write_text("LETTER = 'A'\n")
    (folder / "fn.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture
def load(folder):
    loaded = []

    def load(name, **kwargs):
        loaded.append(load_reward(f"{folder}/fn.py:{name}", **{"deadline_s": 3.0} | kwargs))
        return loaded[-1]

    yield load
    for reward in loaded:
        reward.close()


def rows(*texts):
    return [
        (t, 7, {"index": i, "data_source": "rcot/ktg", "extra_info": {"index": i}})
        for i, t in enumerate(texts)
    ]


def rewards(scores):
    return [s.reward for s in scores]


def test_a_plain_function_gets_only_the_row_keys_it_names(load):
    score = load("plain", canvas=112).score("", "", extra_info={"index": 5}, other=object())
    assert score.components == {"index": 5.0, "canvas": 112.0}


def test_an_async_function_is_awaited_and_its_calls_overlap(load):
    import time

    for name in ("waits", "late"):
        reward = load(name)
        assert reward.score("abc", "").reward == 3.0
        start = time.monotonic()
        assert rewards(reward.score_batch(rows(*["x"] * 40))) == [1.0] * 40
        assert time.monotonic() - start < 1.5  # sequential calls take 2 s
    assert load("promise").score("abc", "").reward == 3.0
    assert load("called").score("abc", "").reward == 4.0


@pytest.mark.parametrize("bad", ["slow", "blocks", "raise"])
def test_only_the_failing_async_call_fails(load, bad):
    scores = load("waits").score_batch(rows("a", bad, "abc"))
    assert rewards(scores) == [1.0, 0.0, 3.0]
    code = "raised" if bad == "raise" else "timeout"
    assert scores[1].reasons[0] == f"reward_function_{code}"


def test_a_batch_function_gets_lists(load):
    reward = load("batch", canvas=5)
    scores = reward.score_batch(rows("a", "b", "c"))
    assert rewards(scores) == [3.0, 3.0, 3.0]
    assert [s.components for s in scores] == [{"index": float(i), "canvas": 5.0} for i in range(3)]
    assert reward.score("a", 7, index=4).components["index"] == 4.0


def test_a_failed_batch_is_scored_again_one_by_one(load):
    scores = load("batch", canvas=0).score_batch(rows("a", "whole", "short"))
    assert rewards(scores) == [1.0, 1.0, 0.0]
    assert scores[2].reasons == ["reward_function_bad_result"]
    scores = load("batch_waits").score_batch(rows("a", "slow", "bcd"))
    assert rewards(scores) == [1.0, 0.0, 3.0]
    assert scores[1].reasons == ["reward_function_timeout"]


def test_signatures_of_verl_and_easyr1_are_supported(load):
    assert rewards(load("marked").score_batch([("a", "a", {}), ("a", "b", {})])) == [1.0, 0.0]
    score = load("verl").score_batch(rows("abc"))[0]
    assert (score.reward, score.components) == (3.0, {"index": 0.0, "ktg": 1.0})
    assert load("verl").score("abc", None).components == {"index": -1.0, "ktg": 0.0}
    assert [s.components["index"] for s in load("verl_batch").score_batch(rows("", ""))] == [0, 1]
    assert load("easy").score("abcd", 7).components == {"truth": 7.0}
    assert rewards(load("half").score_batch(rows("abcd", "ab"))) == [1.0, 0.5]
    assert load("numpy").score("", 0).components == {"a": 3.0, "b": 1.0}
    assert load("three").score("", 0, c=2.5).reward == 2.5


def test_declared_components_are_known_before_the_first_valid_result(load):
    reward = load("declared")
    assert reward.component_names == ("b", "a")
    failed = reward.score("", None)  # divides by zero
    assert failed.components == {"b": 0.0, "a": 0.0}
    assert list(reward.score("ab", None).components.items()) == [("b", 0.0), ("a", 0.5)]


def test_module_constants_apply_to_all_its_functions(tmp_path):
    (tmp_path / "m.py").write_text(
        "REWARD_TYPE = 'batch'\nCOMPONENTS = ('n',)\n"
        "def f(texts, truths):\n    return [{'reward': 1, 'n': len(texts)} for _ in texts]\n"
    )
    reward = load_reward(f"{tmp_path}/m.py:f")
    assert reward.guard.traits.batch and reward.component_names == ("n",)
    reward.close()


def test_a_module_function_is_loaded_by_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sources, "_entry_points", lambda: {"mine": [("dist", "fn:numpy")]})
    for spec in ("pkg://fn:numpy", "mine"):
        reward = load_reward(spec)
        assert reward.score("", 0).reward == 0.5
        reward.close()
    for spec, message in [
        ("pkg://fn", "compute_score: no such function"),
        ("pkg://fn:not_a_function", "no such function"),
        ("pkg://no_such_module", "pkg://no_such_module: cannot be imported"),
        ("pkg://no-module", "must be pkg://"),
        ("pkg://", "must be pkg://"),
    ]:
        with pytest.raises(InputError, match=message):
            load_reward(spec)
    assert "fn" not in sys.modules  # user code runs only in the child process


def test_the_hash_of_a_module_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    hashes = []
    for value in ("1.0", "1.00", "1.0"):
        (tmp_path / "one_module.py").write_text(f"def compute_score(r, t):\n    return {value}\n")
        reward = load_reward("pkg://one_module")
        reward.close()
        hashes.append(reward.hash)
    assert hashes[0] == hashes[2] != hashes[1]
    resized = load_reward("pkg://one_module", canvas=112)
    resized.close()
    assert resized.hash != hashes[0]


def test_ambiguous_names_raise(monkeypatch):
    points = {"aks": [("rival", "m:f")], "two": [("a", "m:f"), ("b", "m:f")]}
    monkeypatch.setattr(sources, "_entry_points", lambda: points)
    with pytest.raises(InputError, match=r"aks: is a shipped recipe and an entry point .* rival"):
        load_reward("aks")
    with pytest.raises(InputError, match="in a and b"):
        load_reward("two")
    assert load_reward("ktg").score("", []).reward == 0.0


def test_installed_entry_points_are_found(tmp_path, monkeypatch):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rcot_rl.rewards]\ntheirs = their_module : f\n")
    (tmp_path / "their_module.py").write_text("def f(r, t):\n    return 2.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources._entry_points.cache_clear()
    try:
        reward = load_reward("theirs")
        assert reward.score("", None).reward == 2.5
        reward.close()
    finally:
        sources._entry_points.cache_clear()


def test_load_errors_name_file_and_line(tmp_path):
    (tmp_path / "raises.py").write_text("def g():\n    return 1 / 0\n\n\nx = g()\n")
    (tmp_path / "leaves.py").write_text("import os, sys\nprint('bye', flush=True)\nos._exit(7)\n")
    (tmp_path / "imports.py").write_text("\nimport no_such_thing\n")
    (tmp_path / "two.py").write_text("def f(response, /):\n    return 1\n")
    (tmp_path / "declares.py").write_text("COMPONENTS = 'a'\ndef f(r, t):\n    return 1\n")
    for spec, message in [
        (f"{tmp_path}/raises.py:f", "raises.py:2: does not run: ZeroDivisionError"),
        (f"{tmp_path}/imports.py:f", "imports.py:2: does not run: ModuleNotFoundError"),
        (f"{tmp_path}/leaves.py:f", "exited with status 7; it printed: bye"),
        (
            f"{tmp_path}/two.py:f",
            r"two.py: f: must be callable as f\(response, ground_truth\): too many",
        ),
        (f"{tmp_path}/declares.py:f", "COMPONENTS must be"),
        (f"{tmp_path}/two.py", "name the function too"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)


def test_a_deadline_must_be_positive():
    for deadline_s in (0, -1, float("nan")):
        with pytest.raises(InputError, match="deadline_s: must be greater than 0"):
            load_reward("aks", deadline_s=deadline_s)


def test_absolute_makes_file_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.absolute("f.py:g") == f"{tmp_path}/f.py:g"
    assert sources.absolute("r/x.yaml") == f"{tmp_path}/r/x.yaml"
    assert [sources.absolute(s) for s in ("aks", "pkg://a.b:c")] == ["aks", "pkg://a.b:c"]
