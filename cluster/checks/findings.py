"""What a preflight says: findings, each with its code, what it would have cost, and the fix.

Three severities: an `error` stops the run, a `warning` is for people to weigh, and `unknown` says
what could not be checked here and now, so that nothing passes in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rcot_rl.errors import InputError

Severity = Literal["error", "warning", "unknown"]


@dataclass
class Finding:
    """Something to mend, or to know."""

    code: str
    """What kind of finding; `<stage>.…` where it is one stage's."""
    severity: Severity
    message: str
    """Names the key or the file."""
    cost: str
    """What it would have cost to find out later."""
    fix: str = ""
    """What to do about it."""

    def text(self) -> str:
        """One line, and one more with the fix."""
        line = f"{self.severity:<8}{self.code:<26}{self.message}  [{self.cost}]"
        return f"{line}\n{'':<8}{'fix:':<26}{self.fix}" if self.fix else line


@dataclass
class Report:
    """What `examine` found."""

    recipe: str
    plan: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stops the run."""
        return not self.errors

    @property
    def errors(self) -> list[str]:
        """What stops the run, each on one line that names its key or file."""
        return [f.message for f in self.findings if f.severity == "error"]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: `ok`, `recipe`, `plan`, `findings`."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """For the terminal: the plan, the findings with errors first, their numbers."""
        lines = [f"{key:<22}{value}" for key, value in self.plan.items()]
        order = ("error", "warning", "unknown")
        lines += [f.text() for f in sorted(self.findings, key=lambda f: order.index(f.severity))]
        count = {s: sum(f.severity == s for f in self.findings) for s in order}
        lines.append(
            f"{count['error']} errors, {count['warning']} warnings, {count['unknown']} unknown"
        )
        return "\n".join(lines)


@dataclass
class Notes:
    """Collects findings."""

    findings: list[Finding] = field(default_factory=list)

    def error(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note what stops the run."""
        self.findings.append(Finding(code, "error", message, cost, fix))

    def warning(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note what a person should weigh."""
        self.findings.append(Finding(code, "warning", message, cost, fix))

    def unknown(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note what could not be checked."""
        self.findings.append(Finding(code, "unknown", message, cost, fix))

    @contextlib.contextmanager
    def attempt(self, code: str, *, cost: str, fix: str) -> Iterator[None]:
        """An InputError raised in the body becomes an error of this code."""
        try:
            yield
        except InputError as error:
            self.error(code, str(error), cost=cost, fix=fix)
