"""What a preflight says: findings, each with its code, what it would have cost, and the fix.

Three severities: an `error` stops the run, a `warning` is for people to weigh, and `unknown` says
what could not be checked here and now, so that nothing passes in silence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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
        found = [f.message for f in merged(self.findings) if f.severity == "error"]
        return list(dict.fromkeys(found))

    def raise_errors(self) -> None:
        """Raise InputError with every error and its fix, one line each."""
        errors = [f for f in merged(self.findings) if f.severity == "error"]
        # a question mark ends a sentence already
        ends = ["" if f.message.endswith("?") else ";" for f in errors]
        lines = [f"{f.message}{end} fix: {f.fix}" for f, end in zip(errors, ends, strict=True)]
        if lines:
            raise InputError.of_all([InputError(line) for line in dict.fromkeys(lines)])

    def notices(self) -> list[str]:
        """What does not stop the run, in short: a line for each warning, and one for all that
        could not be checked."""
        lines = [f"warning: {f.message}" for f in merged(self.findings) if f.severity == "warning"]
        unknown = [f.code for f in self.findings if f.severity == "unknown"]
        if unknown:
            lines.append(f"not checked here: {', '.join(dict.fromkeys(unknown))}")
        if lines:
            lines.append("`rcot preflight` says more")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON values: `ok`, `recipe`, `plan`, `findings`."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """For the terminal: the plan, the findings with errors first, their numbers."""
        lines = [f"{key:<22}{value}" for key, value in self.plan.items()]
        order = ("error", "warning", "unknown")
        found = merged(self.findings)
        lines += [f.text() for f in sorted(found, key=lambda f: order.index(f.severity))]
        count = {s: sum(f.severity == s for f in found) for s in order}
        lines.append(
            f"{count['error']} errors, {count['warning']} warnings, {count['unknown']} unknown"
        )
        return "\n".join(lines)


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with one in place of two that differ in nothing but the GRPO stage: it names
    the section `grpo`, which stands for `grpo_aks` and `grpo_ktg`."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same = (finding.severity, _shared(finding.code), _shared(finding.message))
        groups.setdefault(same, []).append(finding)
    return [
        group[0]
        if len({f.code for f in group}) == 1
        else replace(group[0], code=_shared(group[0].code), message=_shared(group[0].message),
                     fix=_shared(group[0].fix))
        for group in groups.values()
    ]  # fmt: skip


def _shared(text: str) -> str:
    return re.sub(r"\bgrpo[-_](aks|ktg)(?![-\w])", "grpo", text)


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
            for fault in error.faults:
                self.error(code, fault, cost=cost, fix=fix)
