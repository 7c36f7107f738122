"""Two hosts on one machine: network namespaces with one address each, and a Ray cluster over both.

Each host has a namespace, one end of a veth pair (10.77.0.1 and 10.77.0.2), its own loopback and
one raylet. All traffic between the two uses that wire: Ray, gloo, requests to vLLM. Unlike two
machines, they share the disk, /tmp, /dev/shm, the clock, the cores and the kernel. Needs root and
iproute2.

Raylets start as the launchers start them (`cluster.launch.node`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from cluster.launch.node import interfaces, ray_arguments
from cluster.launch.rendezvous import NodeAddress

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORTS = list(range(20000, 20008))
_WIRE = "wire"
_UP = b"This command will now block forever"


def unable() -> str | None:
    """Return why this machine cannot simulate two hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"rcot{os.getpid()}x"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"no network namespaces here: {done.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class TwoHosts:
    """A context in which the two hosts are up; leaving it ends all their processes.

    Hosts are numbered 0 (Ray's head) and 1.

    Args:
        folder: For the raylets' logs.
        environment: Added for all processes on the hosts.

    Raises:
        RuntimeError: A raylet does not come up.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.address = f"{ADDRESSES[0]}:{PORTS[0]}"
        """Address of the Ray cluster, for `cluster.ray_address`."""
        self._names = [f"rcot{os.getpid()}{letter}" for letter in "ab"]
        self._temporary = Path(tempfile.mkdtemp(prefix="rcot-hosts-"))
        self._raylets: dict[int, subprocess.Popen[bytes]] = {}
        self._environment = (
            {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
            | {
                "RCOT_RL_PLUGIN": "required",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            | environment
        )

    def __enter__(self) -> Self:
        try:
            self._wire()
            self.start(0)
            self.start(1)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _wire(self) -> None:
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        a, b = self._names
        _ip("-n", a, "link", "add", _WIRE, "type", "veth", "peer", "name", _WIRE, "netns", b)
        for name, ip in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{ip}/24", "dev", _WIRE)
        for host in (0, 1):
            self.plug(host)

    def plug(self, host: int) -> None:
        """Connect a host's end of the wire. Ray finds its address by the default route."""
        name = self._names[host]
        _ip("-n", name, "link", "set", _WIRE, "up")
        _ip("-n", name, "route", "replace", "default", "via", ADDRESSES[1 - host], "dev", _WIRE)

    def environment(self, host: int) -> dict[str, str]:
        """Return the environment of processes on a host, like its raylet's."""
        return self._environment | interfaces(self._node(host), nodes=2)

    def _node(self, host: int) -> NodeAddress:
        return NodeAddress(host, self._names[host], ADDRESSES[host], _WIRE)

    def popen(self, host: int, arguments: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start Python with these arguments on a host."""
        words = ["ip", "netns", "exec", self._names[host], sys.executable, *arguments]
        return subprocess.Popen(words, env=self.environment(host), **options)

    def start(self, host: int, within_s: float = 300.0) -> None:
        """Start the host's raylet, and wait until it has joined.

        It is restarted if it does not come up within the 30 s that Ray gives it: a busy machine may
        need more.
        """
        temporary = self._temporary / str(host)
        temporary.mkdir(exist_ok=True)
        arguments = ray_arguments(
            self._node(host),
            PORTS,
            head=self.address if host else None,
            gpus=1,
            cpus=32,
            object_store=200_000_000,
            temporary=temporary,
        )
        log, end = self.folder / f"raylet-{host}.log", time.monotonic() + within_s
        while not self._came_up(host, arguments, log, end):
            if time.monotonic() > end:
                raise RuntimeError(f"no raylet on host {host}:\n{log.read_text()[-3000:]}")

    def _came_up(self, host: int, arguments: list[str], log: Path, end: float) -> bool:
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            raylet = self.popen(
                host,
                ["-m", "ray.scripts.scripts", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._raylets[host] = raylet
        while raylet.poll() is None and time.monotonic() < end:
            if _UP in log.read_bytes()[before:]:
                return True
            time.sleep(0.2)
        self._kill_all(host)
        return False

    def pids(self, host: int) -> list[int]:
        """Return the pids of all processes in the host's namespace."""
        done = subprocess.run(
            ["ip", "netns", "pids", self._names[host]], capture_output=True, text=True
        )
        return [int(word) for word in done.stdout.split()]

    def lose(self, host: int) -> int:
        """Simulate a power failure: cut the wire first, so that no process disconnects cleanly.

        Returns:
            The number of killed processes.
        """
        _ip("-n", self._names[host], "link", "set", _WIRE, "down")
        return self._kill_all(host)

    def _kill_all(self, host: int) -> int:
        killed = 0
        while alive := self.pids(host):
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            raylet = self._raylets.get(host)
            if raylet is not None:
                raylet.poll()
            time.sleep(0.1)
        return killed

    def down(self) -> None:
        """End all processes on both hosts, and remove the hosts."""
        for host in (1, 0):
            self._kill_all(host)
            _ip("netns", "del", self._names[host], check=False)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
