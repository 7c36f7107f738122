"""Findings of a contract check, one line each: problem, cost in training, fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warning", "error"]
CheckName = Literal["kind", "result", "keys", "order", "determinism", "time", "hostile"]
MARKS: dict[Level, str] = {"ok": "ok  ", "warning": "warn", "error": "FAIL"}


@dataclass(frozen=True)
class ContractFinding:
    """One line of the report."""

    level: Level
    check: CheckName
    message: str
    costs: str = ""
    """What it would cost in training."""
    fix: str = ""

    def line(self) -> str:
        """Return the finding in one line."""
        parts = [f"{MARKS[self.level]} {self.check:<12} {self.message}"]
        parts += [f"costs: {self.costs}"] if self.costs else []
        parts += [f"fix: {self.fix}"] if self.fix else []
        return "; ".join(parts)


@dataclass
class CheckReport:
    """Findings of a contract check."""

    reward: str
    hash: str
    findings: list[ContractFinding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if no finding is an error."""
        return not self.errors

    @property
    def errors(self) -> list[ContractFinding]:
        """Findings that break the contract."""
        return [f for f in self.findings if f.level == "error"]

    def text(self) -> str:
        """Return a headline, one line per finding, and a verdict."""
        warnings = sum(f.level == "warning" for f in self.findings)
        verdict = "keeps its contract" if self.ok else "breaks its contract"
        head = f"{self.reward} (sha256 {self.hash[:12]})"
        tail = f"{self.reward} {verdict}: {len(self.errors)} errors, {warnings} warnings"
        return "\n".join([head, *(f"  {f.line()}" for f in self.findings), tail])

    def add(
        self, level: Level, check: CheckName, message: str, costs: str = "", fix: str = ""
    ) -> None:
        """Append a finding."""
        self.findings.append(ContractFinding(level, check, message, costs, fix))
