"""Find an address at which every node of a job reaches the head.

A node has many addresses: a management network, InfiniBand, container bridges that are the same on
every host. Names and default routes do not tell which one the other nodes can use, so all are
tried. The head listens on each of its addresses and writes them into a folder that all nodes share.
Every other node connects to each and writes down which answered. The head takes the first address
that answered to all nodes. An answer is a keyed hash, so that no other host at the same address is
mistaken for the head.

    FOLDER/head.json       the head's addresses, ports and key
    FOLDER/node-K.json     what node K reached, and from which of its own addresses
    FOLDER/address.json    the head's choice: each node's address and interface

Ports are taken from a block per job, so that two jobs on one host do not collide.
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
from rcot_rl.system.files import write_text

_BRIDGES = ("docker", "br-", "veth", "virbr", "cni", "flannel", "podman", "lxc", "cali", "vmnet")
_PORTS = (20000, 32000)
"""Below Linux' ephemeral range (from 32768): the kernel gives none of these to other programs."""
_BLOCK, _PER_NODE = 96, 12
_POLL_S = 0.3


@dataclass(frozen=True)
class LocalAddress:
    """One of this node's addresses."""

    ip: str
    interface: str


@dataclass(frozen=True)
class NodeAddress:
    """The address at which the other nodes reach a node."""

    index: int
    host: str
    ip: str
    interface: str


def own_addresses(interface: str | None = None) -> list[LocalAddress]:
    """Return this node's addresses: IPv4 first, bridges late, loopback last. Raises InputError."""
    up = {name for name, stat in psutil.net_if_stats().items() if stat.isup}
    ranked: list[tuple[tuple[bool, bool, bool, str], LocalAddress]] = []
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
            ranked.append((order, LocalAddress(str(address), name)))
    if not ranked:
        raise InputError(
            f"no address on interface {interface}" if interface else "this host has no address",
            key="launch.slurm.interface",
        )
    return [local for _, local in sorted(ranked, key=lambda pair: pair[0])]


def free_ports(ip: str, job: int, index: int, count: int) -> list[int]:
    """Return ports that are free on `ip` now. Raises InputError.

    Args:
        job: Number of the job; it selects a block of ports.
        index: Number of the node; it selects where in the block the search starts.
    """
    low, high = _PORTS
    start = (job % ((high - low) // _BLOCK)) * _BLOCK + (index % (_BLOCK // _PER_NODE)) * _PER_NODE
    ports: list[int] = []
    for step in range(high - low):
        port = low + (start + step) % (high - low)
        if _is_free(ip, port):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise InputError(f"fewer than {count} free ports between {low} and {high} on {ip}")


def joined(ip: str, port: int) -> str:
    """Return `ip:port`, with brackets around an IPv6 address."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def host(
    folder: Path, nodes: int, deadline: float, index: int = 0, interface: str | None = None
) -> list[NodeAddress]:
    """Meet the other nodes, as the head. Raises InputError.

    Args:
        folder: Shared by all nodes.
        deadline: Of the monotonic clock.

    Returns:
        Every node's address, the head's first.
    """
    local_addresses = own_addresses(interface)
    key = secrets.token_hex(16)
    with _Responder(local_addresses, key) as responder:
        _write(folder / "head.json", {"key": key, "index": index, "doors": responder.doors})
        others = [k for k in range(nodes) if k != index]
        reports = {k: _await_file(folder / f"node-{k}.json", deadline) for k in others}
    missing = [str(k) for k, report in reports.items() if report is None]
    if missing:
        raise InputError(
            f"{len(missing)} of {nodes} nodes did not come to the rendezvous in time: "
            f"{', '.join(missing)}",
            file=folder,
        )
    present = {k: r for k, r in reports.items() if r is not None}
    for head in local_addresses:
        if all(head.ip in report["reached"] for report in present.values()):
            break
    else:
        reached = "; ".join(
            f"{r['host']}: {sorted(r['reached']) or 'none'}" for r in present.values()
        )
        raise InputError(
            f"no address of {socket.gethostname()} is reached by every node ({reached}); "
            "set launch.slurm.interface, or open the network between the nodes",
            file=folder,
        )
    return [
        NodeAddress(index, socket.gethostname(), head.ip, head.interface),
        *(NodeAddress(k, r["host"], **r["reached"][head.ip]) for k, r in present.items()),
    ]


def publish(folder: Path, addresses: list[NodeAddress], port: int) -> None:
    """Publish the head's choice to the other nodes and to the driver.

    Args:
        addresses: Of every node, the head's first.
    """
    head = addresses[0]
    _write(
        folder / "address.json",
        {
            "address": joined(head.ip, port),
            "ip": head.ip,
            "port": port,
            "places": [asdict(a) for a in addresses],
        },
    )


def join(folder: Path, index: int, deadline: float) -> None:
    """Meet the head: connect to each of its addresses, report which answered. Raises InputError."""
    head = _await_file(folder / "head.json", deadline)
    if head is None:
        raise InputError("the head did not come to the rendezvous in time", file=folder)
    interfaces = {local.ip: local.interface for local in own_addresses()}
    with ThreadPoolExecutor(max_workers=max(1, len(head["doors"]))) as pool:
        ips = pool.map(lambda door: _knock(door["ip"], door["port"], head["key"]), head["doors"])
        reached = {
            door["ip"]: {"ip": ip, "interface": interfaces.get(ip, "")}
            for door, ip in zip(head["doors"], ips, strict=True)
            if ip is not None
        }
    _write(folder / f"node-{index}.json", {"host": socket.gethostname(), "reached": reached})


def address(folder: Path, deadline: float) -> dict[str, Any]:
    """Wait for what `publish` wrote. Raises InputError."""
    choice: dict[str, Any] | None = _await_file(folder / "address.json", deadline)
    if choice is None:
        raise InputError("the head published no address in time", file=folder)
    return choice


def answers(ip: str, port: int, timeout: float = 3.0) -> bool:
    """Return True if something listens there."""
    with contextlib.suppress(OSError), socket.create_connection((ip, port), timeout=timeout):
        return True
    return False


def await_ray(choice: dict[str, Any], deadline: float) -> None:
    """Wait until Ray's head answers. Raises InputError.

    Args:
        choice: As `address` returns it.
        deadline: Of the monotonic clock.
    """
    if not await_port(choice["ip"], choice["port"], deadline):
        raise InputError(f"Ray's head does not answer at {choice['address']}")


def await_port(ip: str, port: int, deadline: float) -> bool:
    """Return True once something listens there; False if the deadline passes first."""
    while not answers(ip, port):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


class _Responder:
    """Listens on every address of the head, and proves that it knows the key."""

    def __init__(self, addresses: list[LocalAddress], key: str) -> None:
        self._key = key
        self._listeners: list[socket.socket] = []
        self.doors: list[dict[str, Any]] = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address.ip else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.bind((address.ip, 0))
                listener.listen(256)
            except OSError:
                listener.close()  # the address cannot be used
                continue
            self._listeners.append(listener)
            self.doors.append({"ip": address.ip, "port": listener.getsockname()[1]})

    def __enter__(self) -> _Responder:
        for listener in self._listeners:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # interrupts accept
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
    """Connect to an address of the head.

    Returns:
        This node's address on that connection; None if the head did not answer.
    """
    challenge = secrets.token_bytes(32)
    try:
        with socket.create_connection((ip, port), timeout=3) as peer:
            peer.sendall(challenge)
            expected, received = _answer(key, challenge), b""
            while len(received) < len(expected) and (part := peer.recv(len(expected))):
                received += part
            ip_of_this_node = str(ipaddress.ip_address(peer.getsockname()[0].partition("%")[0]))
    except OSError:
        return None
    return ip_of_this_node if hmac.compare_digest(received, expected) else None


def _answer(key: str, challenge: bytes) -> bytes:
    return hmac.new(bytes.fromhex(key), challenge, hashlib.sha256).digest()


def _is_free(ip: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    any_address = "::" if ":" in ip else "0.0.0.0"
    for address in (ip, any_address):  # some of Ray's servers listen on every address
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def _write(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value) + "\n")


def _await_file(path: Path, deadline: float) -> Any | None:
    """Wait for a JSON file. Returns its value; None if the deadline passes first."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))
        if time.monotonic() > deadline:
            return None
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # a network file system shows new files after a listing
        time.sleep(_POLL_S)
