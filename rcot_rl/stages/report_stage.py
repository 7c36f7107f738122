"""The report stage: RUN/report.html."""

from __future__ import annotations

from typing import Any

from rcot_rl.stages.stage_run import StageRun


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Write the report, and return its path."""
    from rcot_rl.monitoring.pages.report import write_report

    return {"page": str(write_report(run.folder.root))}
