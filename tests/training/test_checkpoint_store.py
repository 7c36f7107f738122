"""A checkpoint is complete or absent; broken ones are found, pruned and refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.training import checkpoint_store as store


def make(folder: Path, step: int, ranks: int = 2, sealed: bool = True) -> Path:
    """Write a checkpoint as verl leaves it, with small archives for its files."""
    path = folder / f"global_step_{step}"
    (path / "actor" / "huggingface").mkdir(parents=True)
    for rank in range(ranks):
        for kind in ("model", "optim", "extra_state"):
            _archive(path / "actor" / f"{kind}_world_size_{ranks}_rank_{rank}.pt", f"{step}{kind}")
    _archive(path / "data.pt", "data")
    (path / "actor" / "huggingface" / "config.json").write_text("{}")
    if sealed:
        store.seal(path, provenance={"stage": "grpo-aks"})
    return path


def _archive(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", text * 50)


@pytest.fixture
def folder(tmp_path) -> Path:
    for step in (2, 4, 6):
        make(tmp_path, step)
    store.point_latest(tmp_path / "global_step_6")
    (tmp_path / store.TRACKER).write_text("6")
    return tmp_path


@pytest.mark.parametrize("sealed", [True, False])
def test_a_complete_checkpoint_has_no_faults(tmp_path, sealed):
    checked = store.inspect(make(tmp_path, 8, ranks=4, sealed=sealed), deep=True)
    assert checked.whole and checked.sealed is sealed
    assert (checked.step, checked.world_size) == (8, 4)


def test_every_single_missing_or_truncated_file_is_found(tmp_path):
    """A checkpoint that a kill left half-written does not count."""
    names = [n for n, _ in store._files(make(tmp_path / "a", 3))]
    assert len(names) == 8
    for number, name in enumerate(names):
        for damage in ("remove", "shorten"):
            path = make(tmp_path / f"{number}{damage}", 3)
            if damage == "remove":
                (path / name).unlink()
            else:
                os.truncate(path / name, (path / name).stat().st_size // 2)
            checked = store.inspect(path)
            assert not checked.whole and name in checked.faults[0]


@pytest.mark.parametrize("name", ["data.pt", "actor/optim_world_size_2_rank_1.pt"])
def test_a_grpo_checkpoint_without_manifest_is_judged_by_structure(tmp_path, name):
    path = make(tmp_path, 3, sealed=False)
    os.truncate(path / name, 40)
    assert not store.inspect(path).whole
    (path / name).unlink()
    assert not store.inspect(path).whole


@pytest.mark.parametrize("damage", ["", "data_1.pt", "optim_world_size_2_rank_0.pt"])
def test_an_sft_checkpoint_without_manifest_is_judged_by_structure(tmp_path, damage):
    path = tmp_path / "global_step_3"
    path.mkdir()
    for rank in range(2):
        _archive(path / f"data_{rank}.pt", "data")
        for kind in ("model", "optim", "extra_state"):
            _archive(path / f"{kind}_world_size_2_rank_{rank}.pt", kind)
    if damage:
        (path / damage).unlink()
    faults = store.inspect(path).faults
    assert (not faults) if not damage else ("data_1" in faults[0] or "optim of rank 0" in faults[0])


def test_changed_bytes_are_found_only_by_checksums(folder):
    path = folder / "global_step_4" / "data.pt"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    assert store.inspect(path.parent).whole
    assert "differs from its checksum" in store.inspect(path.parent, deep=True).faults[0]


def test_settling_points_to_the_newest_complete_checkpoint(folder):
    (folder / "global_step_6" / "data.pt").unlink()
    make(folder, 8, sealed=False)
    os.truncate(folder / "global_step_8" / "actor" / "model_world_size_2_rank_0.pt", 10)
    (folder / store.TRACKER).write_text("")  # torn: verl writes it in place
    assert store.settle(folder) == 4
    assert (folder / store.TRACKER).read_text() == "4"
    assert store.find_checkpoint(folder / "latest") == (folder / "global_step_4").resolve()
    assert (folder / "global_step_8").is_dir()


def test_settling_without_a_complete_checkpoint_removes_the_pointer(tmp_path):
    path = make(tmp_path, 2)
    (path / "data.pt").unlink()
    (tmp_path / store.TRACKER).write_text("2")
    assert store.settle(tmp_path) == 0
    assert not (tmp_path / store.TRACKER).exists()
    assert store.settle(tmp_path / "none") == 0


def test_pruning_includes_checkpoints_of_earlier_attempts(folder):
    broken = make(folder, 3)
    (broken / "data.pt").unlink()
    newer = make(folder, 9, sealed=False)
    (newer / "data.pt").unlink()  # being written
    assert store.prune(folder, 2, dry_run=True) == [folder / "global_step_2", broken]
    assert broken.is_dir()
    store.prune(folder, 2)
    assert sorted(p.name for p in folder.glob("global_step_*")) == [
        "global_step_4",
        "global_step_6",
        "global_step_9",
    ]
    assert not list(folder.glob(".*deleted"))


def test_no_room_is_an_error_before_a_file_is_written(folder, set_disk):
    set_disk(free=100)
    with pytest.raises(InputError, match="no room for a checkpoint: 0 MiB are free"):
        store.make_room(folder, keep=2)
    # all but the newest complete one were pruned
    assert [c.step for c in store.all_of(folder)] == [6]
    set_disk(free=10**12, inodes=3)
    with pytest.raises(InputError, match="no inodes left"):
        store.make_room(folder, keep=2)
    set_disk(free=10**12)
    store.make_room(folder, keep=2)


def test_a_manifest_cannot_name_files_outside_the_folder(folder):
    path = folder / "global_step_6"
    manifest = json.loads((path / store.MANIFEST).read_text())
    manifest["files"]["../global_step_4/data.pt"] = manifest["files"].pop("data.pt")
    (path / store.MANIFEST).write_text(json.dumps(manifest))
    assert not store.inspect(path).whole


def test_commands_list_verify_and_prune(folder, tmp_path, invoke):
    listed = json.loads(invoke("checkpoints", "list", folder, "--json").stdout)
    assert [(c["step"], c["whole"], c["world_size"]) for c in listed] == [
        (2, True, 2),
        (4, True, 2),
        (6, True, 2),
    ]
    assert "sealed latest" in invoke("checkpoints", "list", folder).stdout
    assert invoke("checkpoints", "verify", folder).exit_code == 0
    os.truncate(folder / "global_step_4" / "data.pt", 5)
    done = invoke("checkpoints", "verify", folder)
    assert done.exit_code == 2 and "data.pt has 5 bytes" in done.stderr
    done = invoke("checkpoints", "prune", folder, "--keep", "1", "--dry-run")
    assert done.stdout.count("would delete") == 2
    bad = invoke("checkpoints", "list", tmp_path / "nothing")
    assert isinstance(bad.exception, InputError)


def test_export_copies_a_complete_checkpoint(tmp_path, invoke):
    from rcot_rl.inference.model_folder import TINY, check_model

    path = make(tmp_path, 5, sealed=False)
    shutil.rmtree(path / "actor" / "huggingface")
    shutil.copytree(TINY, path / "actor" / "huggingface")
    store.seal(path)
    out = tmp_path / "exported"
    assert invoke("checkpoints", "export", path, out).exit_code == 0
    check_model(out)
    assert (out / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    again = invoke("checkpoints", "export", path, out)
    assert "exists already" in str(again.exception)
    os.truncate(path / "actor" / "huggingface" / "model.safetensors", 100)
    broken = invoke("checkpoints", "export", path, tmp_path / "b")
    assert isinstance(broken.exception, InputError) and not (tmp_path / "b").exists()


@pytest.fixture(params=["file", "link", "followed link"])
def pointed(folder, tmp_path_factory, request) -> Path:
    """Return `folder` with a `latest` in each form that exists.

    It is a file, an earlier version's link, or a copy that followed such a link.
    """
    if request.param == "file":
        assert (folder / "latest").is_file() and not (folder / "latest").is_symlink()
        return folder
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("global_step_6")
    if request.param == "link":
        return folder
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "checkpoints"))


def test_latest_is_read_and_replaced_in_every_form(pointed, invoke):
    assert store.find_checkpoint(pointed / "latest") == (pointed / "global_step_6").resolve()
    shown = invoke("checkpoints", "list", pointed).stdout.splitlines()
    assert [row.split()[1] for row in shown if row.endswith(" latest")] == ["6"]
    assert [c.step for c in store.all_of(pointed)] == [2, 4, 6]
    (pointed / "global_step_6" / "data.pt").unlink()
    assert store.settle(pointed) == 4
    assert (pointed / "latest").read_text() == "global_step_4\n"
    assert store.find_checkpoint(pointed / "latest") == (pointed / "global_step_4").resolve()


def test_latest_works_on_a_file_system_without_links(folder, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    store.point_latest(folder / "global_step_2")
    assert store.find_checkpoint(folder / "latest").name == "global_step_2"


@pytest.mark.parametrize("text", ["", "global_step_99", "../global_step_2", "/etc", "\x00\xff"])
def test_latest_names_a_checkpoint_beside_it_or_is_refused(folder, text, invoke):
    (folder / "latest").write_text(text)
    with pytest.raises(InputError):
        store.find_checkpoint(folder / "latest")
    assert invoke("checkpoints", "list", folder).exit_code == 0


def test_a_checkpoint_is_verified_by_its_name_or_by_latest(pointed, invoke):
    folder = pointed
    for name in ("global_step_6", "latest"):
        done = invoke("checkpoints", "verify", folder / name)
        assert done.exit_code == 0 and "global_step_6: intact" in done.stdout


@pytest.mark.parametrize("words", [["verify"], ["export"]])
def test_a_missing_checkpoint_is_an_input_error(folder, tmp_path, words, invoke):
    more = [str(tmp_path / "out")] if words == ["export"] else []
    done = invoke("checkpoints", *words, folder / "global_step_99", *more)
    assert isinstance(done.exception, InputError) and "no such checkpoint" in str(done.exception)
