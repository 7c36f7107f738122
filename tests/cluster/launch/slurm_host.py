"""A private Slurm on this host: munge, a controller and several slurmd, on loopback only.

For tests. By hand, `python tests/cluster/launch/slurm_host.py FOLDER [NODES]` prints SLURM_CONF.
All files are in FOLDER, ports are free ones, and everything ends with the context. Needs root, and
Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def unavailable() -> str | None:
    """Return why Slurm cannot be started here; None if it can."""
    if os.geteuid() != 0:
        return "needs root, to start munge and Slurm"
    missing = [p for p in PROGRAMS if shutil.which(p) is None]
    return f"not installed: {', '.join(missing)} (slurmctld slurmd munge)" if missing else None


class SlurmHost:
    """A context; with its `environment`, sbatch, srun and scontrol use this Slurm."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 32) -> None:
        self.folder, self.nodes, self._cpus = folder, nodes, cpus
        self.environment = dict(os.environ) | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmHost:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def command(self, *words: str, check: bool = True) -> str:
        """Run one of Slurm's commands. Returns its standard output."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state: RUNNING, COMPLETED, …"""
        shown = self.command("scontrol", "--oneliner", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def await_state(self, job: str, states: tuple[str, ...], timeout_s: float) -> str:
        """Wait until a job has one of `states`, and return it. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {timeout_s:.0f} s")
            time.sleep(0.5)
        return state

    def processes(self) -> list[int]:
        """Return the pids of the daemons."""
        return [p.pid for p in self._started]

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        socket_path = self.folder / "munge.sock"
        names = {"pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        files = [f"--{option}={self.folder / name}" for option, name in names.items()]
        words = ["munged", "--foreground", "--force", f"--socket={socket_path}"]
        self._run([*words, f"--key-file={key}", *files])
        _await(socket_path.exists, 20, "munged")
        ports = _free_ports(1 + self.nodes)
        (self.folder / "slurm.conf").write_text(self._config(ports, socket_path))
        for name in ("state", *(f"spool-n{k}" for k in range(self.nodes))):
            (self.folder / name).mkdir(exist_ok=True)
        self._run(["slurmctld", "-D", "-i"])
        for k in range(self.nodes):
            self._run(["slurmd", "-D", "-N", f"n{k}"])
        _await(self._all_idle, 60, "the nodes")

    def _config(self, ports: list[int], munge: Path) -> str:
        folder, host = self.folder, socket.gethostname()
        lines = [
            "ClusterName=laptop",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmctldParameters=enable_configless",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"AuthInfo=socket={munge}",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "ReturnToService=2",
            "KillWait=20",
            "JobRequeue=1",
            "MinJobAge=600",
            "SchedulerParameters=requeue_delay=1",
            *(
                f"NodeName=n{k} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1 + k]} "
                f"CPUs={self._cpus} RealMemory=4000 State=UNKNOWN"
                for k in range(self.nodes)
            ),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        return "\n".join(lines) + "\n"

    def _all_idle(self) -> bool:
        shown = self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return shown.split() == ["idle"] * self.nodes

    def _run(self, words: list[str]) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    words,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _stop(self) -> None:
        if (self.folder / "slurm.conf").exists():
            jobs = self.command("squeue", "--noheader", "--format=%i", check=False).split()
            if jobs:
                self.command("scancel", *jobs, check=False)
                time.sleep(3)
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for listener in held:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in held]
    for listener in held:
        listener.close()
    return ports


def _await(ready: Callable[[], bool], seconds: float, awaited: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{awaited} not ready after {seconds:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with SlurmHost(Path(sys.argv[1]), count) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        while True:
            time.sleep(60)
