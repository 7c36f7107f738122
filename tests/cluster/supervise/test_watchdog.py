"""A training process is ended when it hangs, passes its deadline or loses a host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.supervise.processes import Host, Hung, Limits, StageFailed
from cluster.supervise.watchdog import run_watched
from rcot_rl.recipe.loader import load_recipe

TALKS = "import time\nwhile True: print('still here', flush=True); time.sleep(0.1)"
LOST = (
    "The node with node id: 0ac5 and address: 10.77.0.2 and node name: x has been marked dead\n"
    "import time; time.sleep(600)"
)
DIED = "A worker died or was killed while executing a task"


class FakeHost:
    """Records how the process would be run, and calls `watch` like a `Host`."""

    def __init__(self, polls: int) -> None:
        self.polls = polls
        self.options: dict = {}

    def run(self, arguments, log: Path, *, watch: Callable[[], None], **options) -> None:
        self.options = options
        for _ in range(self.polls):
            watch()


def test_a_process_that_logs_without_steps_is_hung(tmp_path):
    recipe = load_recipe("laptop", ["supervise.startup_s=1"])
    with Host({}) as host, pytest.raises(Hung, match="no step in its first 1 s"):
        run_watched(
            host.run, ["-c", TALKS], tmp_path / "log.txt", recipe, new_steps=lambda: 0, on_ray=True
        )


def test_the_deadline_holds_although_steps_are_made(tmp_path):
    recipe = load_recipe("laptop", ["supervise.deadline_hours=0.0003"])
    with Host({}) as host, pytest.raises(StageFailed, match="deadline of 1 s") as caught:
        run_watched(
            host.run, ["-c", TALKS], tmp_path / "log.txt", recipe, new_steps=lambda: 1, on_ray=True
        )
    assert not isinstance(caught.value, Hung)


@pytest.mark.parametrize("address", ["10.77.0.1:6379", "local"])
def test_a_lost_host_ends_the_process_on_a_cluster_only(tmp_path, address):
    recipe = load_recipe("laptop", [f"cluster.ray_address='{address}'"])
    log, host = tmp_path / "log.txt", FakeHost(polls=1)
    log.write_text(LOST)

    def run() -> None:
        run_watched(host.run, [], log, recipe, new_steps=lambda: 0, on_ray=True)

    if address == "local":
        run()
    else:
        with pytest.raises(StageFailed, match=r"lost host 10\.77\.0\.2"):
            run()


@pytest.mark.parametrize(
    ("address", "on_ray", "asks"),
    [("auto", True, True), ("auto", False, False), ("local", True, False)],
)
def test_other_hosts_are_asked_for_stacks_where_workers_run_there(tmp_path, address, on_ray, asks):
    recipe, host = load_recipe("laptop", [f"cluster.ray_address={address}"]), FakeHost(polls=0)
    run_watched(host.run, [], tmp_path / "log.txt", recipe, new_steps=lambda: 0, on_ray=on_ray)
    asker = ["-m", "cluster.supervise.ask_stacks", address, str(tmp_path / "stacks")]
    assert list(host.options["elsewhere"]) == (asker if asks else [])


def test_every_step_is_a_heartbeat_and_a_worker_death_counts_until_the_next_step(tmp_path):
    recipe, log = load_recipe("laptop", ["supervise.heartbeat_s=77"]), tmp_path / "log.txt"
    log.write_text(DIED)
    host, steps = FakeHost(polls=1), iter([0, 2])
    limits: list[Limits] = []

    def new_steps() -> int:
        return next(steps)

    def run(arguments, log, *, watch, **options) -> None:
        limits.append(options["limits"])
        watch()
        assert limits[0].died is not None and limits[0].last_beat is None
        watch()
        assert limits[0].died is None and limits[0].last_beat is not None

    host.run = run
    run_watched(host.run, [], log, recipe, new_steps=new_steps, on_ray=True)
    assert (limits[0].heartbeat_s, limits[0].deadline_s) == (77, None)
