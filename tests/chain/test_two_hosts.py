"""GRPO over two hosts has the losses of one host, and survives the loss of a host.

The hosts are network namespaces (`two_hosts.py`) with one Ray cluster and one FSDP rank each. Runs
of one recipe are compared, from one CoT-SFT model on the same shards: two ranks on one host, and
one rank on each of two. Responses are seeded one by one (`seeded_rollouts.py`), so both draw the
same tokens as long as the weights are the same; what is left is the order in which floats are
added.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cluster.supervise.lost_hosts import LossWatch
from cluster.supervise.processes import StageFailed
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder

_HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, _HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


two_hosts = _load("two_hosts")
pytestmark = pytest.mark.drill

STEPS = 3
AGENT = "actor_rollout_ref.rollout.agent"
SEEDED = (
    f"grpo.verl={{{AGENT}.agent_loop_manager_class: seeded_rollouts.SeededManager, "
    f"{AGENT}.default_agent_loop: seeded_single_turn}}"
)
REWARD = '''"""A right answer earns most; other texts differ, so that each group teaches."""
import json
import zlib


def score(response: str, ground_truth, **row) -> float:
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    right = truth if isinstance(truth, str) else json.dumps(truth)
    if response.rstrip().endswith(f"<answer>{right}</answer>"):
        return 1.0
    return zlib.crc32(response.encode("utf-8", "replace")) % 9 / 10
'''
LOSSES = ("actor/pg_loss", "actor/kl_loss", "actor/loss", "actor/grad_norm", "actor/entropy")
RELATIVE, ABSOLUTE = 1e-4, 1e-6


@pytest.fixture(scope="module")
def settings(small, tmp_path_factory) -> list[str]:
    """Return the overrides of every run here, without its cluster section and steps."""
    reward = tmp_path_factory.mktemp("reward") / "texts.py"
    reward.write_text(REWARD)
    dropped = ("eval.", "train.grpo-ktg.", "train.grpo-aks.steps")
    kept = [setting for setting in small if not setting.startswith(dropped)]
    return [
        *kept,
        SEEDED,
        f"train.grpo-aks.reward={reward}:score",
        "data.describe=template",
        "stages=[data, sft, grpo-aks]",
        "train.sft.micro_batch_size=8",
        "grpo.micro_batch_size=16",
    ]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Return variables that let Ray's workers import this checkout and this folder."""
    paths = [str(_HERE.parents[1]), str(_HERE), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory, run_rcot: Callable[..., CompletedProcess[str]]) -> Path:
    """Return a run folder with shards and CoT-SFT's model."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["run", "laptop", *settings, f"train.grpo-aks.steps={STEPS}", "stages=[data, sft]"]
    done = run_rcot(*words, "--out", run)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def hosts(environment, tmp_path_factory):
    if reason := two_hosts.unable():
        pytest.skip(f"no two hosts: {reason}")
    with two_hosts.TwoHosts(tmp_path_factory.mktemp("hosts"), environment) as running:
        yield running


def _across(hosts) -> list[str]:
    return [f"cluster.ray_address={hosts.address}", "cluster.nodes=2", "cluster.gpus_per_node=1"]


def _clone(trained: Path, run: Path, settings: list[str]) -> Path:
    """Return a run of these settings whose data and CoT-SFT are done."""
    RunFolder.claim(run, load_recipe("laptop", settings))
    for part in ("corpora", "shards", "data", "sft"):
        shutil.copytree(trained / part, run / part, symlinks=True)
    return run


def _metrics(run: Path) -> list[dict]:
    path = run / "grpo-aks" / "metrics.jsonl"
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]


def _responses(run: Path, step: int) -> list[tuple]:
    text = (run / "grpo-aks" / "rollouts" / f"{step}.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    return sorted((r["index"], r["sample"], r["response"], r["reward"]) for r in rows)


DRIVER = """
import sys, time, ray
ray.init(address=sys.argv[1])

@ray.remote(num_gpus=1, num_cpus=0, scheduling_strategy="SPREAD")
class Rank:
    def here(self): return ray.util.get_node_ip_address()

ranks = [Rank.remote() for _ in range(2)]
print("ranks on", sorted(ray.get([r.here.remote() for r in ranks])), flush=True)
time.sleep(600)
"""


def test_a_lost_host_is_reported_and_its_return_is_awaited(hosts, tmp_path):
    """Without verl: what Ray reports to a driver, and which hosts are ready for the next start."""
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        driver = hosts.popen(0, ["-c", DRIVER, hosts.address], stdout=output, stderr=output)
    try:
        _await(lambda: b"ranks on" in log.read_bytes(), driver)
        assert f"ranks on {sorted(two_hosts.ADDRESSES)}" in log.read_text()
        watch = LossWatch(log)
        watch.poll()
        assert _ready(hosts, wait_s=1) == 1, "both GPUs are held"
        lost = time.monotonic()
        hosts.lose(1)
        with pytest.raises(StageFailed, match=f"lost host {two_hosts.ADDRESSES[1]}"):
            _await(lambda: watch.poll() is not None, driver, within_s=240)
        print(f"Ray's word came {time.monotonic() - lost:.1f} s after the loss")
    finally:
        driver.kill()
        driver.wait()
    assert _ready(hosts, wait_s=1) == 1, "one host is not enough"
    hosts.plug(1)
    hosts.start(1)
    assert _ready(hosts, wait_s=240) == 0


def _ready(hosts, wait_s: float) -> int:
    """Return the exit status of the wait before a start."""
    size = ["--nodes", "2", "--gpus", "1", "--wait", str(wait_s)]
    return hosts.popen(0, ["-m", "cluster.launch.await_hosts", hosts.address, *size]).wait(600)


def test_losses_on_two_hosts_equal_those_on_one(hosts, settings, trained, environment, tmp_path):
    overrides = [*settings, f"train.grpo-aks.steps={STEPS}"]
    one_host = [*overrides, "cluster.nodes=1", "cluster.gpus_per_node=2"]
    alone = _clone(trained, tmp_path / "one", one_host)
    command = [sys.executable, "-m", "rcot_rl.cli", "run", "laptop", *one_host, "--out", str(alone)]
    subprocess.run(command, check=True, env=os.environ | environment)

    two_hosts = [*overrides, *_across(hosts)]
    both = _clone(trained, tmp_path / "two", two_hosts)
    process = hosts.popen(0, ["-m", "rcot_rl.cli", "run", "laptop", *two_hosts, "--out", str(both)])
    ranks = _watched(hosts, process)
    assert process.wait() == 0
    assert ranks == {0: 1, 1: 1}, "one trainer rank on each host"

    first, second = _metrics(alone), _metrics(both)
    assert [m["step"] for m in first] == [m["step"] for m in second] == list(range(1, STEPS + 1))
    for step, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        assert _responses(alone, step) == _responses(both, step), f"other tokens at step {step}"
        assert a["actor/grad_norm"] > 0 and a["group/zero_variance_fraction"] < 1
        for name in (*LOSSES, "reward/mean", "response_length/mean"):
            print(f"step {step} {name:<22} {a[name]: .9f} {b[name]: .9f} {b[name] - a[name]: .1e}")
        for name in (*LOSSES, "reward/mean", "response_length/mean"):
            same = math.isclose(a[name], b[name], rel_tol=RELATIVE, abs_tol=ABSOLUTE)
            assert same, (step, name, a[name], b[name])


def _watched(hosts, process, within_s: float = 900.0) -> dict[int, int]:
    """Return the most trainer ranks seen on each host while the process ran."""
    most, end = {0: 0, 1: 0}, time.monotonic() + within_s
    while process.poll() is None:
        assert time.monotonic() < end
        for host in most:
            titles = [_title(pid) for pid in hosts.pids(host)]
            most[host] = max(most[host], sum("ray::WorkerDict" in title for title in titles))
        time.sleep(1.0)
    return most


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("when", ["mid-step", "mid-save"])
def test_a_stage_resumes_after_the_loss_of_a_host(hosts, settings, trained, tmp_path, when):
    steps, lost_after = 4, 2
    overrides = [
        *settings,
        *_across(hosts),
        f"train.grpo-aks.steps={steps}",
        "supervise.backoff_s=1",
        "supervise.heartbeat_s=300",
        "supervise.startup_s=600",
        "launch.health.wait_s=300",
    ]
    run = _clone(trained, tmp_path / "run", overrides)
    process = hosts.popen(0, ["-m", "rcot_rl.cli", "run", "laptop", *overrides, "--out", str(run)])
    try:
        _await(lambda: len(_metrics(run)) >= lost_after, process)
        if when == "mid-step":
            time.sleep(1.0)  # into the next step
        else:
            saved = run / f"grpo-aks/checkpoints/global_step_{lost_after + 1}"
            _await((saved / "actor").is_dir, process, pause_s=0.002)
            assert not (saved / "checkpoint.json").exists(), "it was sealed before"
        lost = time.monotonic()
        before = len(_metrics(run))
        assert hosts.lose(1) > 3
        _await((run / "grpo-aks" / "attempt-1" / "verdict.json").is_file, process)
        noticed = time.monotonic() - lost
        hosts.plug(1)
        hosts.start(1)
        back = time.monotonic() - lost
        _await(lambda: len(_metrics(run)) > before, process)
        again = time.monotonic() - lost
        assert process.wait(timeout=900) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    print(f"{when}: noticed after {noticed:.1f} s, host back {back:.1f} s, next step {again:.1f} s")
    assert [m["step"] for m in _metrics(run)] == list(range(1, steps + 1)), "each step once"
    assert (run / "grpo-aks" / "done.json").is_file()
    rows = (run / "grpo-aks" / "attempts.jsonl").read_text().splitlines()
    verdicts = [json.loads(row) for row in rows]
    assert [v["cause"] for v in verdicts] == ["host"] and verdicts[0]["retry"]
    assert two_hosts.ADDRESSES[1] in verdicts[0]["text"], "it says which host"


def _await(condition, process, within_s: float = 900.0, pause_s: float = 0.2) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < end
        time.sleep(pause_s)
