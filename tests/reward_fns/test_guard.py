"""Any failure of a user's function costs only its own sample, within the deadline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward

MISCHIEF = """
import json, os, re, signal, sys, threading, time

def f(response, ground_truth, **row):
    if response == "raise":
        raise ValueError("no\\nsecond line")
    if response == "deep":
        return f(response, ground_truth)
    if response == "regex":  # C code that keeps the interpreter
        re.match(r"(a+)+$", "a" * 64 + "b")
    if response == "sleep":
        time.sleep(60)
    if response == "exit":
        sys.exit(3)
    if response == "_exit":
        os._exit(3)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "print":
        print('{"id": 1, "results": [[99.0, {}, []]]}', flush=True)
        os.write(1, b"x" * 300000)
        sys.stderr.write("y" * 300000)
    if response == "close":
        os.close(0), os.close(1), os.close(2)
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "keys":
        return {"reward": 1.0, "other": 1.0}
    if response == "thread":
        threading.Thread(target=time.sleep, args=(60,)).start()
    if response == "fork":
        os.system("sleep 60 &")
    return {"reward": 2.0, "a": 1.0, "b": len(response)}
"""

RAISED, BAD = "reward_function_raised", "reward_function_bad_result"
TIMEOUT, DIED = "reward_function_timeout", "reward_function_died"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "mischief.py"
    path.write_text(MISCHIEF)
    return path


@pytest.fixture
def reward(file):
    reward = load_reward(f"{file}:f", deadline_s=2.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("response", "reasons"),
    [
        ("raise", [RAISED, f"{RAISED}:ValueError"]),
        ("deep", [RAISED, f"{RAISED}:RecursionError"]),
        ("exit", [RAISED, f"{RAISED}:SystemExit"]),
        ("interrupt", [RAISED, f"{RAISED}:KeyboardInterrupt"]),
        ("keys", [BAD]),
        ("regex", [TIMEOUT]),
        ("sleep", [TIMEOUT]),
        ("_exit", [DIED]),
        ("kill", [DIED]),
        ("segv", [DIED]),
    ],
)
def test_a_failure_costs_one_sample(reward, response, reasons):
    good = reward.score("x", None)
    assert (good.reward, good.components, good.reasons) == (2.0, {"a": 1.0, "b": 1.0}, [])
    start = time.monotonic()
    bad = reward.score(response, None)
    assert (bad.reward, bad.components, bad.reasons) == (0.0, {"a": 0.0, "b": 0.0}, reasons)
    assert reward.score("x", None) == good
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("response", ["print", "close", "thread", "fork"])
def test_harmless_side_effects_keep_the_result(reward, response):
    assert reward.score(response, None).reward == 2.0
    assert reward.score("x", None).reward == 2.0


def test_a_batch_loses_only_the_failing_samples(reward):
    texts = ["x", "raise", "regex", "kill", "xy"]
    scores = reward.score_batch([(text, None, {}) for text in texts])
    assert [s.reward for s in scores] == [2.0, 0.0, 0.0, 0.0, 2.0]
    assert [s.reasons[:1] for s in scores] == [[], [RAISED], [TIMEOUT], [DIED], []]


def test_long_and_unusual_texts_arrive_unchanged(tmp_path):
    (tmp_path / "echo.py").write_text(
        "import zlib\n"
        "def f(response, ground_truth, extra_info=None):\n"
        "    code = zlib.crc32(response.encode('utf-8', 'surrogatepass'))\n"
        "    return {'reward': code, 'truth': len(ground_truth), 'n': extra_info['n'],\n"
        "            'shape': sum(map(len, extra_info['boxes']))}\n"
    )
    reward = load_reward(f"{tmp_path}/echo.py:f")
    import zlib

    info = {"n": np.int64(7), "boxes": np.zeros((3, 4), np.float32), "x": np.float32("nan")}
    for text in ("", "é\n\0\ud800", "x" * 2_000_000, '"}\n{"id": 1}'):
        score = reward.score(
            text, ["a"] * 3, extra_info=info, image=b"not a parameter, so never sent"
        )
        assert score.reward == zlib.crc32(text.encode("utf-8", "surrogatepass"))
        assert score.components == {"truth": 3.0, "n": 7.0, "shape": 12.0}
    with pytest.raises(InputError, match="bytes is not JSON"):
        reward.score("", b"?", extra_info=info)
    reward.close()


def test_each_kind_of_failure_is_logged_once_with_its_place(reward, caplog):
    for text in ("raise", "raise", "_exit", "regex"):
        reward.score(text, None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "ValueError: no (mischief.py:6)" in messages[0]
    assert "exited with status 3" in messages[1]
    assert "longer than 2 s" in messages[2]


def test_a_restarted_function_runs_the_file_as_loaded(tmp_path):
    path = tmp_path / "f.py"
    path.write_text(
        "import os\ndef f(r, t):\n    if r == 'die':\n        os._exit(0)\n    return 1\n"
    )
    reward = load_reward(f"{path}:f")
    path.write_text("def f(r, t):\n    return 2\n")
    assert reward.score("die", None).reasons == [DIED]
    assert reward.score("", None).reward == 1.0
    reward.close()


def test_a_closed_reward_can_be_used_and_closed_again(reward):
    first = reward.guard.child().process
    reward.close()
    assert first.returncode is not None
    assert reward.score("x", None).reward == 2.0
    second = reward.guard.child().process
    reward.close()
    assert second.returncode is not None


def test_the_child_ends_if_its_parent_is_killed(file):
    code = (
        "import os, sys\nfrom reward_fns import load_reward\n"
        "import threading\n"
        f"reward = load_reward({f'{file}:f'!r}, deadline_s=60)\n"
        "print(reward.guard.child().process.pid, flush=True)\n"
        "reward.score('regex', None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(child)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


def test_the_child_outlives_the_thread_that_loaded_the_reward(file):
    import threading

    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(load_reward(f"{file}:f")))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert rewards[0].score("x", None).reward == 2.0
    assert rewards[0].guard.restarts == 0
    rewards[0].close()


def test_a_forked_copy_does_not_share_the_child(reward):
    reward.score("x", None)
    pid = os.fork()
    if pid == 0:
        same = reward.score("xyz", None).components["b"] == 3.0
        os._exit(0 if same and reward.guard.restarts == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert reward.score("xy", None).components["b"] == 2.0
    assert reward.guard.restarts == 0


def alive(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
