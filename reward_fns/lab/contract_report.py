"""The findings of a contract run, one line each: what, what it would cost in training, the fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MARKS = {"ok": "ok  ", "warning": "warn", "error": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    check: str
    says: str
    costs: str = ""
    """What it would cost in training."""
    fix: str = ""

    def line(self) -> str:
        """The finding on one line."""
        parts = [f"{MARKS[self.level]} {self.check:<12} {self.says}"]
        parts += [f"costs: {self.costs}"] if self.costs else []
        parts += [f"fix: {self.fix}"] if self.fix else []
        return "; ".join(parts)


@dataclass
class CheckReport:
    """What a contract run found."""

    reward: str
    hash: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """What breaks the contract."""
        return [f for f in self.findings if f.level == "error"]

    def text(self) -> str:
        """For people: a headline, a line a finding, a verdict."""
        warnings = sum(f.level == "warning" for f in self.findings)
        verdict = "keeps its contract" if self.ok else "breaks its contract"
        head = f"{self.reward} (sha256 {self.hash[:12]})"
        tail = f"{self.reward} {verdict}: {len(self.errors)} errors, {warnings} warnings"
        return "\n".join([head, *(f"  {f.line()}" for f in self.findings), tail])

    def add(self, level: Any, check: str, says: str, costs: str = "", fix: str = "") -> None:
        self.findings.append(Finding(level, check, says, costs, fix))
