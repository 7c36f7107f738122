"""How nodes meet, and what the health check makes of what they say."""

import argparse
import json
import socket
import threading
import time

import pytest

from cluster.launch import head, health, node, rendezvous
from cluster.launch.rendezvous import Own, Place
from rcot_rl.errors import InputError

SOON = 20.0


def meet(tmp_path, own, nodes=3, breakage=None, monkeypatch=None):
    """A head and the other nodes, in threads of this process."""
    monkeypatch.setattr(rendezvous, "own_addresses", lambda interface=None: own)
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


BOTH = [Own("127.0.0.3", "first"), Own("127.0.0.1", "lo")]


def test_the_first_address_that_all_reach_is_taken(tmp_path, monkeypatch):
    places = meet(tmp_path, BOTH, monkeypatch=monkeypatch)
    assert [p.index for p in places] == [0, 1, 2]
    assert places[0].ip == "127.0.0.3"
    rendezvous.publish(tmp_path, places, 1234)
    found = rendezvous.address(tmp_path, 0)
    assert found["address"] == "127.0.0.3:1234"
    assert [Place(**p) for p in found["places"]] == places


def test_an_address_that_only_some_reach_is_passed_over(tmp_path, monkeypatch):
    knock, count = rendezvous._knock, iter(range(100))

    def half(ip, port, key):
        if ip == "127.0.0.3" and next(count) == 0:
            return None  # one node of two is cut off from it
        return knock(ip, port, key)

    places = meet(tmp_path, BOTH, breakage=half, monkeypatch=monkeypatch)
    assert places[0].ip == "127.0.0.1"


def test_no_common_address_is_said_with_what_each_reached(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"reached by every node .*none.*interface"):
        meet(tmp_path, BOTH, breakage=lambda *a: None, monkeypatch=monkeypatch)


def test_a_stranger_at_the_heads_address_is_not_taken_for_it():
    """A bridge of containers has the same address on every host; something else answers there."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def serve():
            peer, _ = stranger.accept()
            with peer:
                peer.recv(64)
                peer.sendall(b"x" * 32)

        thread = threading.Thread(target=serve)
        thread.start()
        assert rendezvous._knock("127.0.0.1", stranger.getsockname()[1], "00" * 16) is None
        thread.join()


def test_missing_nodes_are_named_when_the_deadline_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "own_addresses", lambda interface=None: BOTH)
    with pytest.raises(InputError, match=r"2 of 3 nodes did not come .*: 1, 2"):
        rendezvous.host(tmp_path, 3, time.monotonic() + 0.5)
    with pytest.raises(InputError, match="the head did not come"):
        rendezvous.join(tmp_path / "none", 1, time.monotonic())


def test_loopback_is_the_last_choice_and_link_local_none():
    found = rendezvous.own_addresses()
    loopback = [k for k, own in enumerate(found) if own.ip in ("127.0.0.1", "::1")]
    assert loopback and loopback[-1] == len(found) - 1
    assert not [own for own in found if own.ip.startswith("fe80")]
    with pytest.raises(InputError, match="interface nope0"):
        rendezvous.own_addresses("nope0")


def test_two_jobs_and_two_nodes_on_one_host_get_other_ports():
    taken = [rendezvous.free_ports("127.0.0.1", job, k, 8) for job in (7, 8) for k in (0, 1)]
    flat = [port for ports in taken for port in ports]
    assert len(set(flat)) == 32 and all(20000 <= p < 32000 for p in flat)


def test_a_port_in_use_is_passed_over():
    wanted = rendezvous.free_ports("127.0.0.1", 11, 0, 1)[0]
    with socket.create_server(("127.0.0.1", wanted)):
        assert rendezvous.free_ports("127.0.0.1", 11, 0, 1) != [wanted]


def test_ipv6_addresses_are_bracketed():
    assert rendezvous.joined("::1", 5) == "[::1]:5"
    assert rendezvous.joined("10.0.0.1", 5) == "10.0.0.1:5"


def test_ray_is_started_on_the_chosen_address_with_no_default_port(tmp_path):
    options = {"gpus": 4, "cpus": 32, "object_store": None, "temporary": tmp_path}
    place, ports = Place(0, "a", "10.0.0.1", "ib0"), list(range(20000, 20008))
    first = node.ray_arguments(place, ports, head=None, **options)
    assert "--head" in first and "--port=20000" in first and "--node-ip-address=10.0.0.1" in first
    other = node.ray_arguments(place, ports, head="10.0.0.9:1", **options)
    assert "--address=10.0.0.9:1" in other and "--head" not in other
    for ours in (first, other):
        assert "--block" in ours and "--num-gpus=4" in ours
        given = [a.partition("=")[2] for a in ours if "port=" in a]
        assert len(set(given)) == len(given) >= 6


def test_torch_is_told_the_interface_unless_the_user_did(monkeypatch):
    for name in (
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "VLLM_HOST_IP",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)
    place = Place(0, "a", "10.0.0.1", "ib0")
    assert node.interfaces(place, 1) == {}
    assert node.interfaces(place, 2)["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    assert "NCCL_SOCKET_IFNAME" not in node.interfaces(place, 2)


HEAD = {"versions": {"verl": "0.9.1", "ray": "2.60.0"}, "python": "3.11.7"}


def fact(**changes):
    said = {
        "plugin": None, "versions": dict(HEAD["versions"]), "python": "3.11.7", "token": "t",
        "token_fault": None, "written": "w", "echo": "w", "free_gib": 100.0, "tmp_gib": 100.0,
        "tmp": "/tmp", "busy_gpus": [], "unreached": [],
    }  # fmt: skip
    own = {k: changes.pop(k) for k in ("gpus", "skew_s", "uncertain_s", "fault") if k in changes}
    return health.Facts("n1", "10.0.0.2", own.pop("gpus", 4), **own, said=said | changes)


def wanted(tmp_path):
    return health.Wanted(tmp_path, 4, 1, min_free_gib=50, min_tmp_gib=10, max_skew_s=5)


def test_a_sound_cluster_has_no_faults(tmp_path):
    assert health.faults(wanted(tmp_path), "t", HEAD, [fact(), fact()]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plugin": "it stayed out"}, "plug-in is not loaded"),
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
def test_each_fault_is_one_line_with_its_node(tmp_path, changes, says):
    found = health.faults(wanted(tmp_path), "t", HEAD, [fact(**changes)])
    assert len(found) == 1 and says in found[0] and "n1" in found[0]


def test_the_drivers_own_node_needs_gpus_where_stages_run_beside_it(tmp_path):
    import dataclasses

    beside = dataclasses.replace(wanted(tmp_path), driver_gpus=4)
    nodes = [fact(), fact(gpus=0)]
    nodes[1].host, nodes[1].ip = "n2", "10.0.0.3"
    assert health.faults(beside, "t", HEAD | {"ip": "10.0.0.2"}, nodes) == []
    (found,) = health.faults(beside, "t", HEAD | {"ip": "10.0.0.3"}, nodes)
    assert found.startswith("n2 (10.0.0.3): the driver is here, with 0 GPUs")
    assert "launch.ray.entrypoint_resources" in found
    assert health.faults(wanted(tmp_path), "t", HEAD | {"ip": "10.0.0.3"}, nodes) == []


def test_a_clock_is_judged_no_better_than_it_is_known(tmp_path):
    assert health.faults(wanted(tmp_path), "t", HEAD, [fact(skew_s=7.0, uncertain_s=3.0)]) == []


def test_the_health_check_gets_the_heads_options_less_its_own():
    words = ["--rendezvous", "r", "--nodes=2", "--chdir=/x", "--shared", "s"]
    assert head._health_words(words) == ["--nodes=2", "--shared", "s"]
    parser = argparse.ArgumentParser()
    health.add_arguments(parser)
    assert parser.parse_args(head._health_words(words)).nodes == 2


def test_files_of_the_rendezvous_are_json(tmp_path):
    rendezvous.publish(tmp_path, [Place(0, "a", "::1", "lo")], 7)
    assert json.loads((tmp_path / "address.json").read_text())["address"] == "[::1]:7"
