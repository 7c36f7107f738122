"""A fault in an alert rule must not end a training stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rcot_rl.monitoring.judgement.alert_rules import AlertWatch
from rcot_rl.stages.training_run import _ConsoleAlerts


def test_a_broken_rule_ends_the_alerts_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: AlertWatch, line: dict[str, Any]) -> list[Any]:
        raise ZeroDivisionError("rule")

    monkeypatch.setattr(AlertWatch, "update", broken)
    lines: list[str] = []
    run: Any = SimpleNamespace(
        console=SimpleNamespace(line=lines.append), folder=SimpleNamespace(root=tmp_path)
    )
    alerts = _ConsoleAlerts(run, "grpo-ktg", tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        alerts.update({"step": step})
    assert lines == ["grpo-ktg: no more alerts: ZeroDivisionError: rule"]
