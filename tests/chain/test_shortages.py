"""A stage waits for what can free itself, and for nothing else."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.supervise.processes import StageFailed
from rcot_rl import chain
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder

DISK = {
    "space": {"free": 1000},
    "inodes": {"inodes": 3},
    "quota": {"fault": errno.EDQUOT},
}
NUMBERS = {"space": errno.ENOSPC, "inodes": errno.ENOSPC, "quota": errno.EDQUOT}


class Run:
    """A stage whose own process, or whose child's log, meets a shortage on its first attempt."""

    def __init__(self, tmp_path: Path, set_disk, monkeypatch, number: int, ours: bool) -> None:
        self.recipe = load_recipe("laptop")
        self.folder = RunFolder.claim(tmp_path / "run", self.recipe)
        self.lines: list[str] = []
        self.console = SimpleNamespace(
            line=self.lines.append, progress=lambda *words: self.lines.append(str(words))
        )
        self.number, self.ours, self.set_disk = number, ours, set_disk
        self.starts = self.sleeps = 0
        self.state: dict = {}
        self.mends = True
        monkeypatch.setattr(chain.time, "sleep", self.sleep)
        monkeypatch.setitem(chain._STAGES, "sft", self.stage)

    def stage(self, _: object) -> dict:
        self.starts += 1
        if self.starts > 1:
            return {"steps": 1}
        attempt = self.folder.new_attempt("sft")
        path = attempt.parent / "metrics.jsonl"
        error = OSError(self.number, os.strerror(self.number), str(path))
        (attempt / "log.txt").write_text(f"OSError: {error}\n")
        self.set_disk(**self.state)
        if self.ours:
            raise error
        raise StageFailed("ended with status 1", attempt / "log.txt")

    def sleep(self, _: float) -> None:
        self.sleeps += 1
        if self.sleeps == 4 and self.mends:
            self.set_disk()

    def go(self) -> dict:
        return chain._supervised(self, "sft")


@pytest.mark.parametrize("ours", [True, False], ids=["the supervisor's", "a child's"])
@pytest.mark.parametrize("kind", DISK)
def test_a_stage_waits_until_it_can_write(tmp_path, set_disk, monkeypatch, kind, ours):
    run = Run(tmp_path, set_disk, monkeypatch, NUMBERS[kind], ours)
    run.state = DISK[kind]
    assert run.go() == {"steps": 1}
    assert run.starts == 2 and run.sleeps > 3
    verdict = json.loads((run.folder.stage("sft") / "attempt-1/verdict.json").read_text())
    assert verdict["cause"] == "disk" and str(run.folder.root) in verdict["text"]
    assert any("waiting" in line for line in run.lines)


@pytest.mark.parametrize("ours", [True, False], ids=["the supervisor's", "a child's"])
def test_a_read_only_run_ends_at_once(tmp_path, set_disk, monkeypatch, ours):
    run = Run(tmp_path, set_disk, monkeypatch, errno.EROFS, ours)
    run.state = {"read_only": True}
    with pytest.raises(StageFailed, match="mounted read-only"):
        run.go()
    assert (run.starts, run.sleeps) == (1, 0)


def test_a_run_that_turns_read_only_while_it_waits_ends(tmp_path, set_disk, monkeypatch):
    run = Run(tmp_path, set_disk, monkeypatch, errno.ENOSPC, False)
    run.state, run.mends = DISK["space"], False
    monkeypatch.setattr(chain.time, "sleep", lambda _: set_disk(read_only=True))
    with pytest.raises(StageFailed, match="Since then: It is mounted read-only"):
        run.go()


def test_waiting_ends(tmp_path, set_disk, monkeypatch):
    run = Run(tmp_path, set_disk, monkeypatch, errno.EDQUOT, False)
    run.state, run.mends = DISK["quota"], False
    clock = iter(range(0, 10**6, 600))
    monkeypatch.setattr(chain.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(StageFailed, match="60 minutes later: The quota there is used up"):
        run.go()
    assert run.starts == 1


def test_other_errors_of_the_supervisor_pass(tmp_path, set_disk, monkeypatch):
    run = Run(tmp_path, set_disk, monkeypatch, errno.EIO, True)
    with pytest.raises(OSError, match="Input/output"):
        run.go()


def test_a_run_on_a_read_only_file_system_is_refused_in_one_line(tmp_path, monkeypatch):
    folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="mounted read-only") as caught, folder.locked():
        pass
    assert caught.value.file == str(folder.root / ".lock")
