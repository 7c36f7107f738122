"""A follower sends each step once, whatever happens to the tracker, its disk or its process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers import follow_run
from rcot_rl.monitoring.trackers.follow_run import follow
from rcot_rl.monitoring.trackers.tracker import Tracker
from rcot_rl.monitoring.trackers.tracker_state import delivery_of, read_state
from rcot_rl.recipe.loader import load_recipe

STEPS = 12
OWN = Path(__file__).with_name("json_lines_tracker.py")


def line(step: int, value: float) -> str:
    values = {"step": step, "time": time.time(), "reward/mean": value, "training/global_step": step}
    return json.dumps(values) + "\n"


class GrowingRun:
    """A run folder that a test lets grow."""

    def __init__(self, root: Path) -> None:
        self.root = root
        recipe = load_recipe("laptop", ["wandb.tags=[mine]", "wandb.notes=why"])
        record = {"recipe_hash": "ab", "recipe": recipe.model_dump(mode="json")}
        root.mkdir()
        (root / "recipe.yaml").write_text(yaml.safe_dump(record))

    def attempt(self, stage: str) -> None:
        folder = self.root / stage
        number = len(list(folder.glob("attempt-*"))) + 1
        (folder / f"attempt-{number}").mkdir(parents=True)

    def step(self, stage: str, step: int, value: float = 1.0) -> None:
        with (self.root / stage / "metrics.jsonl").open("a") as file:
            file.write(line(step, value))

    def steps(self, stage: str, first: int, last: int, value: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.step(stage, step, value)

    def resume(self, stage: str, after: int) -> None:
        """Drop the steps after a checkpoint, as a resumed attempt does."""
        self.attempt(stage)
        path = self.root / stage / "metrics.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:after]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)

    def done(self, stage: str, **facts: float) -> None:
        (self.root / stage / "done.json").write_text(json.dumps({"minutes": 1.0} | facts))


@pytest.fixture
def run(tmp_path: Path) -> GrowingRun:
    growing = GrowingRun(tmp_path / "run")
    growing.attempt("grpo-aks")
    return growing


class Recorder(Tracker):
    """Remembers what it receives, as a server does; fails on request.

    Args:
        rewrites: It writes a stage again whenever it is opened.
    """

    label = "recorder"

    def __init__(self, rewrites: bool = False) -> None:
        self.rewrites = rewrites
        self.stages: dict[str, dict[int, dict]] = {}
        self.calls: list[str] = []
        self.alerts: list = []
        self.fail: Callable[[], None] = lambda: None

    def open(self, stage):
        self.calls.append(f"open {stage.stage}")
        self.fail()
        self.described = stage
        if self.rewrites:
            self.stages[stage.stage] = {}
        self.steps = self.stages.setdefault(stage.stage, {})
        return max(self.steps, default=0)

    def log(self, step, values):
        self.fail()
        assert step not in self.steps, "sent twice"
        self.steps[step] = dict(values)

    def summarize(self, values):
        self.fail()
        self.summary = dict(values)

    def alert(self, alert):
        self.alerts.append(alert)

    def close(self, state):
        self.calls.append(f"close {state}")
        self.fail()


@pytest.fixture
def started() -> Iterator[Callable[..., threading.Event]]:
    """Return a function that follows a run in a thread; it returns the event that ends it."""
    threads = []

    def start(run: GrowingRun, tracker: Tracker) -> threading.Event:
        stop = threading.Event()
        thread = threading.Thread(
            target=follow,
            args=(RunReader(run.root), tracker, "recorder", stop),
            kwargs={"poll_s": 0.01, "retry_s": 0.02},
        )
        thread.start()
        threads.append((thread, stop))
        return stop

    yield start
    for thread, stop in threads:
        stop.set()
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def once(run: GrowingRun, tracker: Tracker):
    return follow(
        RunReader(run.root), tracker, "recorder", threading.Event(), once=True, retry_s=0.01
    )


def test_each_step_of_a_growing_run_is_sent_once_and_in_order(run, started):
    tracker = Recorder()
    stop = started(run, tracker)
    for step in range(1, STEPS + 1):
        run.step("grpo-aks", step, step / 10)
        time.sleep(0.02)
    until(lambda: len(tracker.stages.get("grpo-aks", {})) == STEPS)
    assert tracker.calls == ["open grpo-aks"], "one session while the stage runs"
    run.done("grpo-aks")
    stop.set()
    until(lambda: "close done" in tracker.calls)
    sent = tracker.stages["grpo-aks"]
    assert list(sent) == list(range(1, STEPS + 1))
    assert sent[7]["reward/mean"] == 0.7


def test_an_unfinished_line_is_sent_once_it_is_complete(run, started):
    tracker = Recorder()
    started(run, tracker)
    run.step("grpo-aks", 1)
    text = line(2, 2.0)
    path = run.root / "grpo-aks" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(text[:20])
        file.flush()
        until(lambda: 1 in tracker.stages.get("grpo-aks", {}))
        time.sleep(0.1)
        assert list(tracker.stages["grpo-aks"]) == [1]
        file.write(text[20:])
    until(lambda: 2 in tracker.stages["grpo-aks"])


@pytest.mark.parametrize("kept", [3, 5])
def test_a_resumed_attempt_repeats_no_step_of_the_tracker(run, started, kept):
    tracker = Recorder()
    stop = started(run, tracker)
    run.steps("grpo-aks", 1, 6, 1.0)
    until(lambda: 6 in tracker.stages.get("grpo-aks", {}))
    run.resume("grpo-aks", after=kept)
    run.steps("grpo-aks", kept + 1, 9, 2.0)
    until(lambda: 9 in tracker.stages["grpo-aks"])
    run.done("grpo-aks")
    stop.set()
    until(lambda: "close done" in tracker.calls)
    values = [step["reward/mean"] for step in tracker.stages["grpo-aks"].values()]
    assert values == [1.0] * 6 + [2.0] * 3, "step 6 was sent before it was repeated"
    rewriting = Recorder(rewrites=True)
    run.root.joinpath("tracking", "recorder.json").unlink()
    once(run, rewriting)
    values = [step["reward/mean"] for step in rewriting.stages["grpo-aks"].values()]
    assert values == [1.0] * kept + [2.0] * (9 - kept), "what is written again has final values"


def test_repeated_steps_are_counted_from_the_logs_of_the_attempts(run):
    for attempt, steps in ((1, range(1, 7)), (2, range(4, 9)), (3, range(8, 10))):
        if attempt > 1:
            run.attempt("grpo-aks")
        data = [{"step": s, "data": {"training/global_step": s}} for s in steps]
        data.append({"step": steps[-1], "data": {"val-core/reward": 1.0}})
        log = run.root / "grpo-aks" / f"attempt-{attempt}" / "verl.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in data))
    run.steps("grpo-aks", 1, 9)
    run.done("grpo-aks")
    tracker = Recorder()
    once(run, tracker)
    assert tracker.summary["repeated_steps"] == 3 + 1
    assert tracker.summary["attempts"] == 3


def test_a_server_that_refuses_is_retried_until_it_is_back(run, started):
    tracker = Recorder()
    down = threading.Event()
    down.set()

    def fail():
        if down.is_set():
            raise ConnectionError("refused")

    tracker.fail = fail
    stop = started(run, tracker)
    run.steps("grpo-aks", 1, 4)
    until(lambda: read_state(run.root, "recorder").errors >= 2)
    assert "refused" in read_state(run.root, "recorder").error
    delivery = delivery_of(RunReader(run.root), read_state(run.root, "recorder"))
    assert (delivery.sent, delivery.total) == (0, 4)
    down.clear()
    until(lambda: len(tracker.stages.get("grpo-aks", {})) == 4)
    run.steps("grpo-aks", 5, 8)
    run.done("grpo-aks")
    stop.set()
    until(lambda: "close done" in tracker.calls)
    assert list(tracker.stages["grpo-aks"]) == list(range(1, 9))
    state = read_state(run.root, "recorder")
    assert state.errors >= 2 and state.error == ""
    assert delivery_of(RunReader(run.root), state).complete


def test_a_server_that_stays_away_ends_the_follower_after_the_command(run):
    tracker = Recorder()

    def refuse():
        raise ConnectionError("refused")

    tracker.fail = refuse
    run.steps("grpo-aks", 1, 4)
    run.done("grpo-aks")
    state = once(run, tracker)
    assert state.errors == follow_run.ENDING_TRIES
    assert not delivery_of(RunReader(run.root), state).complete
    assert not tracker.stages


def test_steps_that_were_accepted_but_did_not_arrive_are_sent_again(run):
    """The server lost the second half before `close`: `open` tells what it has."""
    run.steps("grpo-aks", 1, 6)
    run.done("grpo-aks")
    tracker = Recorder()
    lost = []

    def lose():
        if 6 in tracker.steps and not lost:
            lost.append(tracker.calls[-1])
            for step in (4, 5, 6):
                del tracker.steps[step]
            raise TimeoutError("did not confirm")

    tracker.steps = {}
    tracker.fail = lose
    state = once(run, tracker)
    assert lost and list(tracker.stages["grpo-aks"]) == list(range(1, 7))
    assert state.stages["grpo-aks"].arrived == 6


def test_nothing_is_sent_while_the_state_cannot_be_written(run, started, monkeypatch):
    written = follow_run.write_state
    full = threading.Event()
    full.set()

    def write(*arguments):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*arguments)

    monkeypatch.setattr(follow_run, "write_state", write)
    tracker = Recorder()
    stop = started(run, tracker)
    run.steps("grpo-aks", 1, 4)
    time.sleep(0.3)
    assert tracker.calls == []
    full.clear()
    until(lambda: len(tracker.stages.get("grpo-aks", {})) == 4)
    run.done("grpo-aks")
    stop.set()
    until(lambda: "close done" in tracker.calls)
    assert list(tracker.stages["grpo-aks"]) == [1, 2, 3, 4]


def test_a_second_follower_sends_nothing_again(run):
    run.steps("grpo-aks", 1, 4)
    run.done("grpo-aks")
    tracker = Recorder()
    once(run, tracker)
    calls = list(tracker.calls)
    once(run, tracker)
    assert tracker.calls == calls, "the tracker is not even opened"


def test_results_that_come_later_are_sent_without_the_steps(run):
    run.steps("grpo-aks", 1, 4)
    run.done("grpo-aks")
    tracker = Recorder()
    once(run, tracker)
    run.attempt("grpo-aks")  # changes the summary: another attempt
    run.done("grpo-aks", peak_gib=2.0)
    once(run, tracker)
    assert tracker.calls.count("open grpo-aks") == 2
    assert tracker.summary["attempts"] == 2
    assert list(tracker.stages["grpo-aks"]) == [1, 2, 3, 4]


def test_a_failed_stage_and_an_interrupted_one_are_told_apart(run):
    run.steps("grpo-aks", 1, 2)
    tracker = Recorder()
    once(run, tracker)
    assert tracker.calls[-1] == "close running"
    failure = {"stage": "grpo-aks", "attempt": "attempt-1", "step": 2, "cause": "error"}
    (run.root / "grpo-aks" / "attempts.jsonl").write_text(json.dumps(failure) + "\n")
    once(run, tracker)
    assert tracker.calls[-1] == "close failed"


def test_stages_share_the_id_of_their_run_and_carry_no_secret(run):
    record = yaml.safe_load((run.root / "recipe.yaml").read_text())
    record["recipe"]["launch"] = {"environment": {"TOKEN": "hunter2"}, "secrets": ["TOKEN"]}
    record["shards"] = {"grpo-aks-480": "cafe"}
    (run.root / "recipe.yaml").write_text(yaml.safe_dump(record))
    described = []
    for stage in ("grpo-aks", "grpo-ktg"):
        run.attempt(stage)
        run.step(stage, 1)
        run.done(stage)
    tracker = Recorder()
    tracker.fail = lambda: described.append(getattr(tracker, "described", None))
    once(run, tracker)
    stages = {d.stage: d for d in described if d}
    assert stages.keys() == {"grpo-aks", "grpo-ktg"}
    assert len({d.run_id for d in stages.values()}) == 1
    config = stages["grpo-aks"].config
    assert "hunter2" not in json.dumps(config) and "TOKEN" not in json.dumps(config)
    assert config["train"]["grpo-aks"]["reward"] == "aks"
    assert config["hashes"] == {"recipe": "ab", "shards": {"grpo-aks-480": "cafe"}}
    tags = set(stages["grpo-aks"].tags)
    assert tags >= {"mine", "laptop", "seed 1", "aks", "ktg"}
    assert stages["grpo-aks"].notes == "why"


def lines_of(run: GrowingRun, stage: str = "grpo-aks") -> list[dict]:
    path = run.root / "lines" / f"{stage}.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.is_file() else []


def start_process(run: GrowingRun, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "rcot_rl.monitoring.trackers.follow_run", str(run.root)]
    return subprocess.Popen([*words, f"{OWN}:JsonLines"], stdin=subprocess.PIPE, **options)


def test_a_killed_follower_is_continued_by_the_next_one(run):
    run.steps("grpo-aks", 1, 3)
    first = start_process(run)
    until(lambda: any(row.get("step") == 3 for row in lines_of(run)))
    first.send_signal(signal.SIGKILL)
    first.wait()
    run.steps("grpo-aks", 4, 6)
    second = start_process(run)
    until(lambda: any(row.get("step") == 6 for row in lines_of(run)))
    run.done("grpo-aks")
    assert second.stdin is not None
    second.stdin.close()
    assert second.wait(timeout=20) == 0
    assert [row["step"] for row in lines_of(run) if "step" in row] == [1, 2, 3, 4, 5, 6]
    assert lines_of(run)[-1] == {"closed": "done"}


def test_a_call_that_never_returns_ends_the_process(run, tmp_path, monkeypatch):
    hanging = tmp_path / "hanging.py"
    call = "    def log(self, step, values):\n"
    text = OWN.read_text()
    assert call in text
    hanging.write_text(text.replace(call, f"{call}        __import__('time').sleep(600)\n"))
    run.steps("grpo-aks", 1, 2)
    code = (
        "import sys\nfrom rcot_rl.monitoring.trackers import follow_run\n"
        "follow_run.CALL_S = 1.0\nsys.exit(follow_run.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.root), f"{hanging}:JsonLines"], stdin=subprocess.PIPE
    )
    assert process.wait(timeout=60) == -signal.SIGALRM
    state = read_state(run.root, "JsonLines")
    assert state.stages["grpo-aks"].steps == 0


def autogroup_of(pid: int) -> int | None:
    """Return the niceness of a process' session; None if Linux puts it into no group.

    The file is empty for a process of the first session, that of the system's start.
    """
    path = Path(f"/proc/{pid}/autogroup")
    words = path.read_text().split() if path.is_file() else []
    return int(words[-1]) if words else None


@pytest.mark.parametrize("own_session", [True, False])
def test_a_follower_leaves_the_cpus_to_others_but_no_session_that_it_shares(run, own_session):
    before = autogroup_of(os.getpid())
    run.steps("grpo-aks", 1, 1)
    process = start_process(run, start_new_session=own_session)
    until(lambda: bool(lines_of(run)))
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    grouped = autogroup_of(process.pid)
    assert grouped == before if not own_session else grouped in {19, None}
    process.kill()
    process.wait()
    assert autogroup_of(os.getpid()) == before


def test_two_followers_of_one_tracker_exclude_each_other(run):
    run.steps("grpo-aks", 1, 1)
    first = start_process(run)
    until(lambda: bool(lines_of(run)))
    words = [sys.executable, "-m", "rcot_rl.monitoring.trackers.follow_run", str(run.root)]
    second = subprocess.run(
        [*words, f"{OWN}:JsonLines", "--once"], stderr=subprocess.PIPE, text=True
    )
    first.kill()
    first.wait()
    assert second.returncode == 2 and "another command" in second.stderr
