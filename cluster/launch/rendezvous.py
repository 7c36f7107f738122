"""How the nodes of a job find an address by which all of them reach the head.

A node has many addresses: a management network, InfiniBand, bridges of containers that are the same
on every host. Names and default routes do not tell which one the others can use, so they are tried.
The head listens on each of its addresses and writes them into a folder that all nodes share; every
other node knocks on each and writes down which answered; the head takes the first that answered to
all. An answer is a keyed hash, so that a stranger at the same address is not taken for the head.

    FOLDER/head.json       the head's addresses, ports and key
    FOLDER/node-K.json     what node K reached, and from which of its own addresses
    FOLDER/address.json    the head's choice: each node's address and interface

Ports are taken from a block of the job's own, so that two jobs on one host keep apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rcot_rl.errors import InputError
from rcot_rl.files import write_text

_BRIDGES = ("docker", "br-", "veth", "virbr", "cni", "flannel", "podman", "lxc", "cali", "vmnet")
_PORTS = (20000, 32000)
"""Below Linux' ephemeral range (32768): nobody is given one of these by chance."""
_BLOCK, _PER_NODE = 96, 12
_POLL_S = 0.3


@dataclass(frozen=True)
class Own:
    """One of this node's addresses."""

    ip: str
    interface: str


@dataclass(frozen=True)
class Place:
    """Where one node is, as the others reach it."""

    index: int
    host: str
    ip: str
    interface: str


def own_addresses(interface: str | None = None) -> list[Own]:
    """This node's addresses, likeliest first: IPv4 before IPv6, bridges late, loopback last.

    interface: only that one's. Raises InputError when it has none, or is not there.
    """
    up = {name for name, stat in psutil.net_if_stats().items() if stat.isup}
    found: list[tuple[tuple[bool, bool, bool, str], Own]] = []
    for name, entries in psutil.net_if_addrs().items():
        if name not in up or interface not in (None, name):
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if address.is_link_local or address.is_unspecified or address.is_multicast:
                continue
            order = (address.is_loopback, name.startswith(_BRIDGES), address.version == 6, name)
            found.append((order, Own(str(address), name)))
    if not found:
        raise InputError(
            f"no address on interface {interface}" if interface else "this host has no address",
            key="launch.slurm.interface",
        )
    return [own for _, own in sorted(found, key=lambda pair: pair[0])]


def free_ports(ip: str, job: int, index: int, count: int) -> list[int]:
    """`count` ports free on `ip` now, from the block of the job's node `index` onwards."""
    low, high = _PORTS
    start = (job % ((high - low) // _BLOCK)) * _BLOCK + (index % (_BLOCK // _PER_NODE)) * _PER_NODE
    out: list[int] = []
    for step in range(high - low):
        port = low + (start + step) % (high - low)
        if _is_free(ip, port):
            out.append(port)
        if len(out) == count:
            return out
    raise InputError(f"fewer than {count} free ports between {low} and {high} on {ip}")


def joined(ip: str, port: int) -> str:
    """`ip:port`, with the brackets that IPv6 needs."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def host(
    folder: Path, nodes: int, deadline: float, index: int = 0, interface: str | None = None
) -> list[Place]:
    """The head's part: every node's place, the head's first. deadline: of time.monotonic().

    Raises InputError naming the nodes that did not come, or what each of them reached.
    """
    own = own_addresses(interface)
    key = secrets.token_hex(16)
    with _Porter(own, key) as porter:
        _write(folder / "head.json", {"key": key, "index": index, "doors": porter.doors})
        others = [k for k in range(nodes) if k != index]
        reports = {k: _await_file(folder / f"node-{k}.json", deadline) for k in others}
    missing = [str(k) for k, report in reports.items() if report is None]
    if missing:
        raise InputError(
            f"{len(missing)} of {nodes} nodes did not come to the rendezvous in time: "
            f"{', '.join(missing)}",
            file=folder,
        )
    seen = {k: r for k, r in reports.items() if r is not None}
    for place in own:
        if all(place.ip in report["reached"] for report in seen.values()):
            break
    else:
        told = "; ".join(f"{r['host']}: {sorted(r['reached']) or 'none'}" for r in seen.values())
        raise InputError(
            f"no address of {socket.gethostname()} is reached by every node ({told}); "
            "set launch.slurm.interface, or open the network between the nodes",
            file=folder,
        )
    places = [Place(index, socket.gethostname(), place.ip, place.interface)]
    places += [
        Place(k, r["host"], r["reached"][place.ip]["ip"], r["reached"][place.ip]["interface"])
        for k, r in seen.items()
    ]
    return places


def publish(folder: Path, places: list[Place], port: int) -> None:
    """The head's choice, for the others and for the driver."""
    head = places[0]
    _write(
        folder / "address.json",
        {
            "address": joined(head.ip, port),
            "ip": head.ip,
            "port": port,
            "places": [asdict(p) for p in places],
        },
    )


def join(folder: Path, index: int, deadline: float) -> None:
    """Another node's part: knock on the head's doors and write down which opened."""
    head = _await_file(folder / "head.json", deadline)
    if head is None:
        raise InputError("the head did not come to the rendezvous in time", file=folder)
    interfaces = {own.ip: own.interface for own in own_addresses()}
    with ThreadPoolExecutor(max_workers=max(1, len(head["doors"]))) as pool:
        answers = pool.map(
            lambda door: _knock(door["ip"], door["port"], head["key"]), head["doors"]
        )
        reached = {
            door["ip"]: {"ip": mine, "interface": interfaces.get(mine, "")}
            for door, mine in zip(head["doors"], answers, strict=True)
            if mine is not None
        }
    _write(folder / f"node-{index}.json", {"host": socket.gethostname(), "reached": reached})


def address(folder: Path, deadline: float) -> dict[str, Any]:
    """What `publish` wrote. Raises InputError when the deadline passes."""
    found = _await_file(folder / "address.json", deadline)
    if found is None:
        raise InputError("the head published no address in time", file=folder)
    return found


def answers(ip: str, port: int, timeout: float = 3.0) -> bool:
    """Whether something listens there."""
    with contextlib.suppress(OSError), socket.create_connection((ip, port), timeout=timeout):
        return True
    return False


class _Porter:
    """Listens on every address of the head and answers who knows the key."""

    def __init__(self, own: list[Own], key: str) -> None:
        self._key = key
        self._listeners: list[socket.socket] = []
        self.doors: list[dict[str, Any]] = []
        for place in own:
            family = socket.AF_INET6 if ":" in place.ip else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.bind((place.ip, 0))
                listener.listen(256)
            except OSError:
                listener.close()  # an address that cannot be listened on is no candidate
                continue
            self._listeners.append(listener)
            self.doors.append({"ip": place.ip, "port": listener.getsockname()[1]})

    def __enter__(self) -> _Porter:
        for listener in self._listeners:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            listener.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(3)
                challenge = peer.recv(32, socket.MSG_WAITALL)
                peer.sendall(_answer(self._key, challenge))


def _knock(ip: str, port: int, key: str) -> str | None:
    """This node's own address on the way to a door that the head opened; None: it did not."""
    challenge = secrets.token_bytes(32)
    try:
        with socket.create_connection((ip, port), timeout=3) as peer:
            peer.sendall(challenge)
            wanted, got = _answer(key, challenge), b""
            while len(got) < len(wanted) and (part := peer.recv(len(wanted))):
                got += part
            mine = str(ipaddress.ip_address(peer.getsockname()[0].partition("%")[0]))
    except OSError:
        return None
    return mine if hmac.compare_digest(got, wanted) else None


def _answer(key: str, challenge: bytes) -> bytes:
    return hmac.new(bytes.fromhex(key), challenge, hashlib.sha256).digest()


def _is_free(ip: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    anywhere = "::" if ":" in ip else "0.0.0.0"
    for place in (ip, anywhere):  # some of Ray's servers listen on every address
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((place, port))
            except OSError:
                return False
    return True


def _write(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value) + "\n")


def _await_file(path: Path, deadline: float) -> Any | None:
    while True:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))
        if time.monotonic() > deadline:
            return None
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # a network file system notices new files on a listing
        time.sleep(_POLL_S)
