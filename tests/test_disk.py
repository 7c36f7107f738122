"""What keeps a folder from being written is told apart: space, inodes, quota, read-only."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from rcot_rl import disk
from rcot_rl.disk import LEAST_FREE, explained, named_shortage, shortage
from rcot_rl.errors import InputError
from rcot_rl.files import writing


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
def test_each_shortage_is_told_and_whether_it_passes(tmp_path, set_disk, state, kind, passes):
    assert shortage(tmp_path) is None
    set_disk(**state)
    found = shortage(tmp_path / "not" / "there" / "yet")
    assert found is not None and (found.kind, found.passes) == (kind, passes)
    assert found.place == tmp_path and found.text


def test_a_right_that_is_missing_is_no_shortage(tmp_path, set_disk):
    set_disk(fault=errno.EACCES)
    assert shortage(tmp_path) is None


def test_looking_leaves_nothing(tmp_path):
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
def test_an_error_names_its_kind_and_paths(error, kind, paths):
    assert named_shortage(error) == (kind, [Path(p) for p in paths])


@pytest.mark.parametrize("error", ["", "ValueError: 28", "KeyError: '/r/x'", "[Errno 280] x"])
def test_other_errors_name_none(error):
    assert named_shortage(error) is None


@pytest.mark.parametrize(
    ("number", "state", "says"),
    [
        (errno.ENOSPC, {}, "No space left on device"),
        (errno.ENOSPC, {"inodes": 0}, "no inodes left"),
        (errno.EDQUOT, {}, "quota there is used up"),
        (errno.EROFS, {}, "mounted read-only"),
    ],
)
def test_a_command_says_which_shortage_stopped_it(tmp_path, set_disk, number, state, says):
    set_disk(**state)
    file = str(tmp_path / "shards" / "train-0.parquet")
    with pytest.raises(InputError, match=says) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number), file)
    assert caught.value.file == file and "\n" not in str(caught.value)


@pytest.fixture
def small(tmp_path: Path):
    """A file system of its own: 400 MiB, 100 inodes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m,nr_inodes=100", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_file_system(small):
    assert shortage(small) is None
    names = [small / str(k) for k in range(80)]
    for name in names:
        name.touch()
    found = shortage(small)
    assert found is not None and found.kind == "inodes"
    for name in names:
        name.unlink()
    with (small / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 200 * 2**20)
    found = shortage(small)
    assert found is not None and found.kind == "space"
    (small / "ballast").unlink()
    assert shortage(small) is None
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    found = shortage(small)
    assert found is not None and found.kind == "read-only"


def test_probe_is_allocated(tmp_path, monkeypatch):
    """A quota shows only when bytes are asked for."""
    asked = []

    def refuse(descriptor: int, offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    found = shortage(tmp_path)
    assert found is not None and found.kind == "quota" and asked == [disk.PROBE]
    assert "quota" in explained(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
