"""Nodes of a job find a common address, and the health check reports each fault."""

import argparse
import dataclasses
import json
import os
import socket
import threading
import time

import pytest

from cluster.launch import head, health, node, rendezvous
from cluster.launch.rendezvous import LocalAddress, NodeAddress
from rcot_rl.errors import InputError

SOON = 20.0


def meet(tmp_path, addresses, nodes=3, breakage=None, monkeypatch=None):
    """Let a head and the other nodes meet, in threads of this process."""
    monkeypatch.setattr(rendezvous, "own_addresses", lambda interface=None: addresses)
    faults = []

    def join(index):
        try:
            rendezvous.join(tmp_path, index, time.monotonic() + SOON)
        except InputError as error:
            faults.append(error)

    threads = [threading.Thread(target=join, args=(k,)) for k in range(1, nodes)]
    for thread in threads:
        thread.start()
    if breakage:
        monkeypatch.setattr(rendezvous, "_knock", breakage)
    try:
        return rendezvous.host(tmp_path, nodes, time.monotonic() + SOON)
    finally:
        for thread in threads:
            thread.join()
        assert not faults


BOTH = [LocalAddress("127.0.0.3", "first"), LocalAddress("127.0.0.1", "lo")]


def test_the_first_address_that_all_reach_is_taken(tmp_path, monkeypatch):
    addresses = meet(tmp_path, BOTH, monkeypatch=monkeypatch)
    assert [a.index for a in addresses] == [0, 1, 2]
    assert addresses[0].ip == "127.0.0.3"
    rendezvous.publish(tmp_path, addresses, 1234)
    choice = rendezvous.address(tmp_path, 0)
    assert choice["address"] == "127.0.0.3:1234"
    assert [NodeAddress(**p) for p in choice["places"]] == addresses


def test_an_address_that_only_some_nodes_reach_is_skipped(tmp_path, monkeypatch):
    knock, count = rendezvous._knock, iter(range(100))

    def half(ip, port, key):
        if ip == "127.0.0.3" and next(count) == 0:
            return None  # one node of two is cut off from it
        return knock(ip, port, key)

    addresses = meet(tmp_path, BOTH, breakage=half, monkeypatch=monkeypatch)
    assert addresses[0].ip == "127.0.0.1"


def test_without_a_common_address_the_error_lists_what_each_node_reached(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"reached by every node .*none.*interface"):
        meet(tmp_path, BOTH, breakage=lambda *a: None, monkeypatch=monkeypatch)


def test_another_server_at_the_heads_address_is_not_mistaken_for_it():
    """A bridge of containers has the same address on every host; something else answers there."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve():
            peer, _ = other.accept()
            with peer:
                peer.recv(64)
                peer.sendall(b"x" * 32)

        thread = threading.Thread(target=serve)
        thread.start()
        assert rendezvous._knock("127.0.0.1", other.getsockname()[1], "00" * 16) is None
        thread.join()


def test_missing_nodes_are_named_when_the_deadline_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "own_addresses", lambda interface=None: BOTH)
    with pytest.raises(InputError, match=r"2 of 3 nodes did not come .*: 1, 2"):
        rendezvous.host(tmp_path, 3, time.monotonic() + 0.5)
    with pytest.raises(InputError, match="the head did not come"):
        rendezvous.join(tmp_path / "none", 1, time.monotonic())


def test_loopback_comes_last_and_link_local_addresses_are_left_out():
    ips = [local.ip for local in rendezvous.own_addresses()]
    assert ips[-1] in ("127.0.0.1", "::1")
    assert not [ip for ip in ips if ip.startswith("fe80")]
    with pytest.raises(InputError, match="interface nope0"):
        rendezvous.own_addresses("nope0")


def test_jobs_and_nodes_on_one_host_get_different_ports():
    blocks = [rendezvous.free_ports("127.0.0.1", job, k, 8) for job in (7, 8) for k in (0, 1)]
    flat = [port for ports in blocks for port in ports]
    assert len(set(flat)) == 32 and all(20000 <= p < 32000 for p in flat)


def test_a_port_in_use_is_skipped():
    port = rendezvous.free_ports("127.0.0.1", 11, 0, 1)[0]
    with socket.create_server(("127.0.0.1", port)):
        assert rendezvous.free_ports("127.0.0.1", 11, 0, 1) != [port]


def test_ipv6_addresses_are_bracketed():
    assert rendezvous.joined("::1", 5) == "[::1]:5"
    assert rendezvous.joined("10.0.0.1", 5) == "10.0.0.1:5"


def test_ray_is_started_on_the_chosen_address_with_no_default_port(tmp_path):
    options = {"gpus": 4, "cpus": 32, "object_store": None, "temporary": tmp_path}
    options["metrics_port"] = None
    address, ports = NodeAddress(0, "a", "10.0.0.1", "ib0"), list(range(20000, 20008))
    first = node.ray_arguments(address, ports, head=None, **options)
    assert "--head" in first and "--port=20000" in first and "--node-ip-address=10.0.0.1" in first
    other = node.ray_arguments(address, ports, head="10.0.0.9:1", **options)
    assert "--address=10.0.0.9:1" in other and "--head" not in other
    for arguments in (first, other):
        assert "--block" in arguments and "--num-gpus=4" in arguments
        given = [a.partition("=")[2] for a in arguments if "port=" in a]
        assert len(set(given)) == len(given) >= 6
    chosen = node.ray_arguments(address, ports, head=None, **options | {"metrics_port": 8090})
    assert set(chosen) - set(first) == {"--metrics-export-port=8090"}


def test_torch_gets_the_interface_unless_the_user_set_it(monkeypatch):
    for name in (
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "VLLM_HOST_IP",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)
    address = NodeAddress(0, "a", "10.0.0.1", "ib0")
    assert node.interfaces(address, 1) == {}
    assert node.interfaces(address, 2)["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    assert "NCCL_SOCKET_IFNAME" not in node.interfaces(address, 2)


HEAD = {"versions": {"verl": "0.9.1", "ray": "2.60.0"}, "python": "3.11.7"}


def fact(**changes):
    """Return the facts of a sound node, with changes."""
    probed = {
        **{"plugin": None, "versions": dict(HEAD["versions"]), "python": "3.11.7"},
        **{"token": "t", "token_fault": None, "written": "w", "echo": "w"},
        **{"free_gib": 100.0, "tmp_gib": 100.0, "tmp": "/tmp", "busy_gpus": [], "unreached": []},
    }
    fields = {k: changes.pop(k) for k in ("gpus", "skew_s", "uncertain_s", "fault") if k in changes}
    return health.NodeFacts(
        "n1", "10.0.0.2", fields.pop("gpus", 4), **fields, probed=probed | changes
    )


def required(tmp_path):
    return health.NodeRequirements(tmp_path, 4, 1, min_free_gib=50, min_tmp_gib=10, max_skew_s=5)


def test_a_sound_cluster_has_no_faults(tmp_path):
    assert health.faults(required(tmp_path), "t", HEAD, [fact(), fact()]) == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"plugin": "it is inactive"}, "plug-in is not loaded"),
        ({"versions": {"verl": "0.9.0", "ray": "2.60.0"}}, "verl 0.9.0, the head has 0.9.1"),
        ({"versions": {"verl": "0.9.1"}}, "ray is missing"),
        ({"python": "3.12.1"}, "Python 3.12.1"),
        ({"token": None, "token_fault": "No such file"}, "not the head's folder (No such file)"),
        ({"token": "other"}, "another token"),
        ({"echo": None}, "is not seen on the head"),
        ({"free_gib": 3.0}, "3.0 GiB free"),
        ({"tmp_gib": 1.0}, "1.0 GiB free in /tmp"),
        ({"skew_s": 60.0}, "clock is +60.0 s off"),
        ({"skew_s": -60.0}, "clock is -60.0 s off"),
        ({"busy_gpus": [3]}, "GPU 3 is in use"),
        ({"unreached": ["n2"]}, "cannot reach n2"),
        ({"gpus": 2}, "1 nodes with 4 GPUs are needed, 0 are there (n1 2)"),
        ({"fault": "did not answer"}, "did not answer"),
    ],
)
def test_each_fault_is_one_line_with_its_node(tmp_path, changes, part):
    lines = health.faults(required(tmp_path), "t", HEAD, [fact(**changes)])
    assert len(lines) == 1 and part in lines[0] and "n1" in lines[0]


def test_the_drivers_node_needs_gpus_for_stages_next_to_the_driver(tmp_path):
    with_driver = dataclasses.replace(required(tmp_path), driver_gpus=4)
    nodes = [fact(), fact(gpus=0)]
    nodes[1].host, nodes[1].ip = "n2", "10.0.0.3"
    assert health.faults(with_driver, "t", HEAD | {"ip": "10.0.0.2"}, nodes) == []
    (line,) = health.faults(with_driver, "t", HEAD | {"ip": "10.0.0.3"}, nodes)
    assert line.startswith("n2 (10.0.0.3): the driver is here, with 0 GPUs")
    assert "launch.ray.entrypoint_resources" in line
    assert health.faults(required(tmp_path), "t", HEAD | {"ip": "10.0.0.3"}, nodes) == []


def test_the_uncertainty_of_the_clock_is_allowed_for(tmp_path):
    assert health.faults(required(tmp_path), "t", HEAD, [fact(skew_s=7.0, uncertain_s=3.0)]) == []


def test_the_health_check_gets_the_heads_options_but_its_own():
    words = ["--rendezvous", "r", "--nodes=2", "--chdir=/x", "--shared", "s"]
    assert head._health_words(words) == ["--nodes=2", "--shared", "s"]
    parser = argparse.ArgumentParser()
    health.add_arguments(parser)
    assert parser.parse_args(head._health_words(words)).nodes == 2


@pytest.mark.parametrize(
    ("variables", "file", "mode"),
    [
        ({}, False, "disabled"),
        ({}, True, None),
        ({"RAY_AUTH_TOKEN": "a"}, True, "token"),
        ({"RAY_AUTH_MODE": "token"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, False, None),
    ],
)
def test_the_head_finds_the_token_where_ray_does(monkeypatch, tmp_path, variables, file, mode):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    monkeypatch.setitem(os.environ, "PROBE", "1")  # undone after the test, with what is set below
    head._find_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode
    os.environ.pop("RAY_AUTH_MODE", None)


def test_files_of_the_rendezvous_are_json(tmp_path):
    rendezvous.publish(tmp_path, [NodeAddress(0, "a", "::1", "lo")], 7)
    assert json.loads((tmp_path / "address.json").read_text())["address"] == "[::1]:7"
