"""The launchers with a real Slurm of two slurmd on this host, and with real Ray Jobs."""

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.launch import ray_jobs, rendezvous, slurm
from cluster.supervise.processes import Host
from rcot_rl.recipe.loader import load_recipe

spec = importlib.util.spec_from_file_location(
    "slurm_host", Path(__file__).with_name("slurm_host.py")
)
slurm_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slurm_host)

pytestmark = pytest.mark.drill
JOINS = Path(__file__).with_name("joins_ray.py")
TWO_NODES = [
    "cluster.nodes=2",
    "cluster.gpus_per_node=1",
    "train.sft.micro_batch_size=1",
    "grpo.micro_batch_size=1",
    "cluster.object_store_bytes=100000000",
    "launch.slurm.exclusive=false",
    "launch.slurm.cpus_per_node=8",
    "launch.slurm.time='00:10:00'",
    "launch.health.min_free_gib=1",
    "launch.health.min_tmp_gib=1",
]
PROGRAM = """
import os, signal, sys, time
import ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=0, scheduling_strategy="SPREAD")
def where():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

nodes = set(ray.get([where.remote() for _ in range(2)]))
print("nodes", len(nodes), "words", sys.argv[2:], flush=True)
if sys.argv[1] == "stay":
    signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), os._exit(130)))
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    reason = slurm_host.unavailable()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    with slurm_host.SlurmHost(tmp_path_factory.mktemp("slurm"), nodes=2) as running:
        yield running


def submit(host, tmp_path, name, *words, overrides=()):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = [*TWO_NODES, f"launch.workdir={tmp_path}", f"name={name}", *overrides]
    script = slurm.script(
        load_recipe("laptop", settings),
        "laptop",
        settings,
        command=[sys.executable, str(program), *words],
    )
    script.folder.mkdir(parents=True, exist_ok=True)
    path = script.folder / "job.sh"
    path.write_text(script.text)
    environment = dict(host.environment)
    job = subprocess.run(
        ["sbatch", "--parsable", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return job, script.folder / f"slurm-{job}.log"


def left_behind(folder) -> list[str]:
    """Return the command lines of a job's processes that are still alive."""
    mark, lines = str(folder), []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(mark in word for word in words) and "slurm" not in Path(words[0]).name:
            lines.append(" ".join(words)[:200])
    return lines


def wait_for(text, log, seconds=180):
    deadline = time.monotonic() + seconds
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.5)


def rays(host, job) -> list[int]:
    """Return the pids of the raylets and GCS servers that a job started."""
    mark = {"SLURM_JOB_ID": job, "SLURM_CONF": host.environment["SLURM_CONF"]}
    return [
        process.pid
        for process in psutil.process_iter(["name", "environ"])
        if process.info["name"] in ("raylet", "gcs_server")
        and mark.items() <= (process.info["environ"] or {}).items()
    ]


def test_two_jobs_share_the_nodes_one_completes_and_a_cancelled_one_stays_away(host, tmp_path):
    first, first_log = submit(
        host, tmp_path, "one", "stay", overrides=["launch.slurm.requeue=true"]
    )
    wait_for("nodes 2", first_log)
    assert len(rays(host, first)) == 3
    words = ["a b", "$(touch pwned)", "it's\nnew"]
    job, log = submit(host, tmp_path, "two", "go", *words)
    assert host.await_state(job, ("COMPLETED", "FAILED"), 300) == "COMPLETED", log.read_text()
    assert f"nodes 2 words {words}" in log.read_text()
    assert "health: 2 nodes" in log.read_text()
    assert not left_behind(log.parent)
    assert not (tmp_path / "pwned").exists()
    assert host.state(first) == "RUNNING"
    host.command("scancel", first)
    assert host.await_state(first, ("CANCELLED", "COMPLETED", "FAILED"), 60) == "CANCELLED"
    time.sleep(3)
    assert host.state(first) == "CANCELLED"
    assert not left_behind(first_log.parent) and not rays(host, first)


def test_the_time_limits_signal_stops_the_run_and_requeues_it(host, tmp_path):
    job, log = submit(host, tmp_path, "again", "stay", overrides=["launch.slurm.requeue=true"])
    wait_for("nodes 2", log)
    host.command("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit
    wait_for("back into the queue", log, 150)
    assert "asked to stop" in log.read_text() and "status 130" in log.read_text()
    assert host.await_state(job, ("PENDING",), 30) == "PENDING"
    host.command("scancel", job)
    assert not rays(host, job)


def test_a_node_that_the_run_cannot_use_ends_the_job_with_its_fault(host, tmp_path):
    job, log = submit(host, tmp_path, "unfit", "go", overrides=["launch.health.min_free_gib=1e9"])
    assert host.await_state(job, ("COMPLETED", "FAILED"), 200) == "FAILED"
    text = log.read_text()
    assert text.count("rcot: health: ") == 2
    assert "GiB free" in text and "status 2" in text and "nodes 2 words" not in text


def test_ray_jobs_runs_the_shipped_code_after_the_health_check(tmp_path, monkeypatch):
    """On a cluster of one node that was started without a launcher."""
    gcs, dashboard, client, agent = rendezvous.free_ports("127.0.0.1", os.getpid(), 0, 4)
    monkeypatch.setenv("MY_SECRET", "value")
    settings = [
        f"launch.ray.address=http://127.0.0.1:{dashboard}",
        f"launch.ray.python={sys.executable}",
        f"launch.workdir={tmp_path}",
        "launch.secrets=[MY_SECRET]",
        "launch.health.min_free_gib=1",
        "launch.health.min_tmp_gib=1",
    ]
    recipe = load_recipe("laptop", settings)
    request = ray_jobs.request(recipe, "laptop", settings)
    code = (
        "import os, rcot_rl; print('ran', rcot_rl.__file__, os.getcwd(), os.environ['MY_SECRET'])"
    )
    # a stage's process in that job: Ray must take both environments
    log = tmp_path / "stage.log"
    code += (
        "\nimport sys\nfrom pathlib import Path\nfrom cluster.supervise.processes import Host\n"
        f"with Host({{}}, own_ray=False) as host:\n"
        f"    host.run([{str(JOINS)!r}, {str(tmp_path)!r}], Path({str(log)!r}))\n"
        f"print(Path({str(log)!r}).read_text())"
    )
    checks = request.entrypoint.partition(" -- ")[0]
    good = replace(request, entrypoint=f"{checks} -- {shlex.join([sys.executable, '-c', code])}")
    more = good.entrypoint.replace("--nodes=1", "--nodes=2", 1).replace("--wait=600", "--wait=3", 1)
    assert "--wait=3 " in more
    bad = replace(request, entrypoint=more)
    with Host({"RAY_AUTH_MODE": "disabled"}) as here:
        words = [
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            "--num-gpus=1",
            f"--dashboard-agent-listen-port={agent}",
            "--num-cpus=8",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
            f"--temp-dir={here.environment['RAY_TMPDIR']}",
        ]
        with (tmp_path / "ray.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, *words], env=here.environment, stdout=log, stderr=log, cwd=tmp_path
            )
        wait_for("block forever", tmp_path / "ray.log")
        shown = []
        assert ray_jobs.submit(recipe, good, shown.append) == 0, shown
        ran = next(line for line in shown if line.startswith("ran "))
        assert "_ray_pkg_" in ran and ran.endswith(f"{tmp_path} value")
        assert any("a worker has required value 1 and the code True" in line for line in shown)
        assert any("health: 1 nodes" in line for line in shown)
        shown = []
        assert ray_jobs.submit(recipe, bad, shown.append) == 1
        assert any("1 of 2 nodes are there" in line for line in shown)
