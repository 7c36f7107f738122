"""Git's message about the checkout is passed on, with how to allow or repair it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from cluster.launch import ray_jobs
from cluster.preflight.checks import host
from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from rcot_rl import runfolder
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.system import checkout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    folder = tmp_path / "my clone"
    folder.mkdir()
    (folder / "code.py").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder


def message(folder: Path) -> str:
    with pytest.raises(InputError) as commit:
        checkout.commit_of(folder)
    assert str(commit.value).startswith(f"{folder}: ") and "\n" not in str(commit.value)
    return commit.value.message


def test_commit_of_has_a_plus_only_if_tracked_files_differ(clone: Path) -> None:
    commit = checkout.commit_of(clone)
    assert len(commit) == 40
    (clone / "other.py").write_text("untracked")
    assert checkout.commit_of(clone) == commit
    (clone / "code.py").write_text("two")
    assert checkout.commit_of(clone) == commit + "+"
    assert checkout.tracked_files(clone) == [clone / "code.py"]


def test_command_in_the_message_allows_another_users_checkout(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkout.commit_of(clone)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refusal = message(clone)
    assert "dubious ownership" in refusal
    with pytest.raises(InputError, match="safe\\.directory"):
        ray_jobs.tracked_files(clone)
    command = refusal.partition("to allow it: ")[2]
    subprocess.run(shlex.split(command), check=True)
    assert checkout.commit_of(clone) == commit
    assert ray_jobs.tracked_files(clone) == [clone / "code.py"]


def test_each_git_failure_has_its_own_message(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = clone / "installed"  # below a checkout, but not one itself
    inside.mkdir()
    assert "is not a git checkout" in message(inside)
    (tmp_path / "new").mkdir()
    subprocess.run(["git", "-C", tmp_path / "new", "init", "-q"], check=True)
    assert "no commit" in message(tmp_path / "new")
    index = (clone / ".git" / "index").read_bytes()
    (clone / ".git" / "index").write_bytes(b"broken")
    assert message(clone).startswith("git fails: ")  # and not "no file differs"
    (clone / ".git" / "index").write_bytes(index)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "new" / ".git"))  # as in a hook
    assert len(checkout.commit_of(clone)) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not on PATH" in message(clone)


def test_shallow_clone_has_its_commit(clone: Path, tmp_path: Path) -> None:
    words = ["git", "clone", "-q", "--depth=1", f"file://{clone}", str(tmp_path / "shallow")]
    subprocess.run(words, check=True)
    assert checkout.commit_of(tmp_path / "shallow") == checkout.commit_of(clone)


def test_code_shipped_without_its_repository_keeps_its_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = checkout.commit_of()
    request = ray_jobs.request(load_recipe("laptop"), "laptop")
    assert request.runtime_env["env_vars"]["RCOT_COMMIT"] == here
    monkeypatch.setenv("RCOT_COMMIT", "feedc0ffee")
    assert runfolder.git_commit() == here, "a checkout's own commit wins"
    monkeypatch.setattr(runfolder, "is_checkout", lambda: False)
    assert runfolder.git_commit() == "feedc0ffee"


def test_run_without_a_commit_records_and_reports_the_reason(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setattr(runfolder, "commit_of", lambda: checkout.commit_of(clone))
    monkeypatch.setattr(host, "commit_of", lambda: checkout.commit_of(clone))
    monkeypatch.setattr(host, "is_checkout", lambda: True)
    recipe = load_recipe("laptop")
    runfolder.RunFolder.claim(tmp_path / "run", recipe)
    record = runfolder.read_record(tmp_path / "run" / "recipe.yaml")
    assert record["git_commit"] is None and "safe.directory" in record["git_error"]
    notes = Notes()
    host.provenance(RunCase(recipe, tmp_path / "run", None), notes)  # type: ignore[arg-type]
    (finding,) = notes.findings
    assert (finding.code, finding.severity) == ("git", "warning")
    assert f"safe.directory '{clone}'" in finding.message
