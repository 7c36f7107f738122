"""The `verl.plugins` entry point, which every process of a training stage loads."""

from __future__ import annotations

import logging

import pytest

from rcot_rl import plugin
from rcot_rl.training import verl_patches


@pytest.mark.parametrize(("mode", "lines"), [("required", 1), ("", 0)])
def test_info_lines_appear_only_in_processes_of_a_run(
    mode: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RCOT_RL_PLUGIN", mode)
    monkeypatch.setattr(verl_patches, "apply", lambda cpu: None)
    plugin._load()
    logging.getLogger("rcot_rl.training.component").info("component: size 3")
    err = capsys.readouterr().err
    assert err == "[rcot] INFO test_plugin: component: size 3\n" * lines
