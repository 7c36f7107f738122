"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rcot_rl import disk


@pytest.fixture
def set_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make file systems appear with so many free bytes and inodes, read-only, or with a file that
    cannot be written for `fault` (an errno); only those below `under`, if it is given."""
    real, write_fault = os.statvfs, disk._write_fault

    def pretend(
        free: int = 10**13,
        inodes: int = 10**6,
        read_only: bool = False,
        fault: int | None = None,
        under: Path | None = None,
    ) -> None:
        def concerned(path: object) -> bool:
            return under is None or Path(str(path)).is_relative_to(under)

        def statvfs(path: object) -> os.statvfs_result:
            facts = real(path)
            if not concerned(path):
                return facts
            flag = facts.f_flag | os.ST_RDONLY if read_only else facts.f_flag & ~os.ST_RDONLY
            blocks = free // facts.f_frsize
            return os.statvfs_result(
                (
                    facts.f_bsize, facts.f_frsize, 2 * blocks, blocks, blocks,
                    10**6, inodes, inodes, flag, facts.f_namemax,
                )
            )  # fmt: skip

        monkeypatch.setattr(os, "statvfs", statvfs)
        monkeypatch.setattr(
            disk,
            "_write_fault",
            lambda place, size: fault if concerned(place) else write_fault(place, size),
        )

    return pretend
