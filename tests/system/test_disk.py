"""Shortages of space, of inodes, of quota and read-only file systems are told apart."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.system import disk
from rcot_rl.system.disk import LEAST_FREE, explained, named_shortage, shortage
from rcot_rl.system.files import writing


@pytest.mark.parametrize(
    ("state", "kind", "passes"),
    [
        ({"free": 100}, "space", True),
        ({"inodes": 3}, "inodes", True),
        ({"fault": errno.EDQUOT}, "quota", True),
        ({"fault": errno.ENOSPC}, "space", True),  # a project's quota on XFS
        ({"read_only": True}, "read-only", False),
        ({"fault": errno.EROFS}, "read-only", False),
    ],
)
def test_shortage_has_its_kind_and_may_pass(tmp_path, set_disk, state, kind, passes):
    assert shortage(tmp_path) is None
    set_disk(**state)
    lack = shortage(tmp_path / "not" / "there" / "yet")
    assert lack is not None and (lack.kind, lack.passes) == (kind, passes)
    assert lack.place == tmp_path and lack.text


def test_missing_permission_is_not_a_shortage(tmp_path, set_disk):
    set_disk(fault=errno.EACCES)
    assert shortage(tmp_path) is None


def test_probe_leaves_no_file(tmp_path):
    assert shortage(tmp_path, needed=0, probe=LEAST_FREE) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "paths"),
    [
        ("OSError: [Errno 28] No space left on device: '/r/a b.png'", "space", ["/r/a b.png"]),
        ("OSError: [Errno 28] No space left on device", "space", []),
        ("OSError: [Errno 122] Disk quota exceeded: '/r/x' -> '/r/y'", "quota", ["/r/x", "/r/y"]),
        ("OSError: [Errno 30] Read-only file system: '/r'", "read-only", ["/r"]),
        ("InputError: /r: no room for a checkpoint: 3 MiB are free", "space", []),
        ("pyarrow: [Errno 122] Error writing bytes to file", "quota", []),
    ],
)
def test_error_text_names_kind_and_paths(error, kind, paths):
    assert named_shortage(error) == (kind, [Path(p) for p in paths])


@pytest.mark.parametrize("error", ["", "ValueError: 28", "KeyError: '/r/x'", "[Errno 280] x"])
def test_other_error_texts_name_no_shortage(error):
    assert named_shortage(error) is None


@pytest.mark.parametrize(
    ("number", "state", "message"),
    [
        (errno.ENOSPC, {}, "No space left on device"),
        (errno.ENOSPC, {"inodes": 0}, "no inodes left"),
        (errno.EDQUOT, {}, "quota there is used up"),
        (errno.EROFS, {}, "mounted read-only"),
    ],
)
def test_writing_names_the_shortage_and_the_file(tmp_path, set_disk, number, state, message):
    set_disk(**state)
    file = str(tmp_path / "shards" / "train-0.parquet")
    with pytest.raises(InputError, match=message) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number), file)
    assert caught.value.file == file and "\n" not in str(caught.value)


@pytest.fixture
def small(tmp_path: Path):
    """Return a mounted file system of 400 MiB and 100 inodes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m,nr_inodes=100", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_shortages_of_a_real_file_system_are_recognized(small):
    assert shortage(small) is None
    names = [small / str(k) for k in range(80)]
    for name in names:
        name.touch()
    lack = shortage(small)
    assert lack is not None and lack.kind == "inodes"
    for name in names:
        name.unlink()
    with (small / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 200 * 2**20)
    lack = shortage(small)
    assert lack is not None and lack.kind == "space"
    (small / "ballast").unlink()
    assert shortage(small) is None
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    lack = shortage(small)
    assert lack is not None and lack.kind == "read-only"


def test_quota_is_detected_by_allocating_the_probe(tmp_path, monkeypatch):
    """A quota shows only when bytes are allocated."""
    sizes = []

    def refuse(descriptor: int, offset: int, size: int) -> None:
        sizes.append(size)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    lack = shortage(tmp_path)
    assert lack is not None and lack.kind == "quota" and sizes == [disk.PROBE]
    assert "quota" in explained(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
