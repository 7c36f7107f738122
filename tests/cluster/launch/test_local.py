"""`rcot launch local` becomes `rcot run`, with its environment, folder, signals and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.launch import local
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe

SMALL = [
    "stages=[data]",
    "toy.corpora=[{layout: mevis, split: train, videos: 60}]",
    "data.corpora=[{dataset: mevis}]",
    "data.describe=template",
    "data.workers=1",
    "data.sets={sft-384: {ktg: 4, aks: 4, val: 2}, grpo-aks-480: {aks: 4, val: 2}, "
    "grpo-ktg-960: {ktg: 4, val: 2}}",
]


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Launch a file that is named relative to `folder`, to run in the folder `work`."""
    (folder / "mine.yaml").write_text("extends: laptop.yaml\nname: mine\n")
    (folder / "work").mkdir(exist_ok=True)
    words = ["-m", "rcot_rl.cli", "launch", "local", "mine.yaml", f"launch.workdir={folder}/work"]
    return subprocess.Popen(
        [sys.executable, *words, *SMALL, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(local.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_run_is_made_in_workdir_by_the_same_process(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "typer.py").write_text("raise SystemExit('shadowed')\n")
    command = launch(tmp_path)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 0, errors
    run = tmp_path / "work" / "runs" / "mine"
    assert (run / "data" / "done.json").is_file() and f'"pid": {command.pid},' in (
        run / ".lock"
    ).read_text()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["recipe"]["name"] == "mine"
    assert errors.count("0 errors") == 1, "the preflight is made once"


def test_a_failed_run_has_the_status_and_the_message_of_rcot_run(tmp_path: Path) -> None:
    command = launch(tmp_path, "data.sets.sft-384.val=5000")
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 2
    assert "the corpora cannot fill the sets" in errors.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_with_status_130(tmp_path: Path, number: int) -> None:
    command = launch(tmp_path, "toy.corpora=[{layout: mevis, split: train, videos: 5000}]")
    assert command.stderr is not None
    for line in command.stderr:
        if "== data" in line:
            break
    command.send_signal(number)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert errors.splitlines()[-1].startswith("rcot: interrupted")


def test_surroundings_are_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SETTING", raising=False)
    before = Path.cwd()
    settings = ["launch.environment.MY_SETTING=here", f"launch.workdir={tmp_path}"]
    with local.surroundings(load_recipe("laptop", settings)):
        assert os.environ["MY_SETTING"] == "here" and Path.cwd() == tmp_path
    assert "MY_SETTING" not in os.environ and Path.cwd() == before


def test_a_missing_workdir_is_named() -> None:
    recipe = load_recipe("laptop", ["launch.workdir=/nowhere/at/all"])
    with pytest.raises(InputError) as caught, local.surroundings(recipe):
        pass
    assert caught.value.key == "launch.workdir"


def test_several_hosts_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        local.preflight(load_recipe("rcot_seg_3b", ["cluster.nodes=2"]))
    assert caught.value.key == "cluster.nodes"
