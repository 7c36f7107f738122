"""The preflight's findings: each with its code, what it would cost later, and the fix.

Three severities: an `error` stops the run, a `warning` is for people to weigh, and `unknown` names
what this host cannot check, so that nothing passes in silence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rcot_rl.errors import InputError

Severity = Literal["error", "warning", "unknown"]


@dataclass
class Finding:
    """One result of a check."""

    code: str
    """Kind of finding; begins with `<stage>.` if it is about one stage."""
    severity: Severity
    message: str
    """What is wrong, with the key or the file."""
    cost: str
    """What it would cost to find out later."""
    fix: str = ""
    """What to do about it."""

    def text(self) -> str:
        """Return one line, and a second one with the fix."""
        line = f"{self.severity:<8}{self.code:<26}{self.message}  [{self.cost}]"
        return f"{line}\n{'':<8}{'fix:':<26}{self.fix}" if self.fix else line


@dataclass
class Report:
    """The plan of a run and the findings about it."""

    recipe: str
    plan: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    grpo: Collection[str] = ()
    """Names of the recipe's GRPO stages."""

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def errors(self) -> list[str]:
        """Messages of the errors, one line each."""
        errors = (f.message for f in self.merged() if f.severity == "error")
        return list(dict.fromkeys(errors))

    def raise_errors(self) -> None:
        """Raise InputError with every error and its fix, one line each."""
        errors = [f for f in self.merged() if f.severity == "error"]
        # a question mark ends a sentence already
        ends = ["" if f.message.endswith("?") else ";" for f in errors]
        lines = [f"{f.message}{end} fix: {f.fix}" for f, end in zip(errors, ends, strict=True)]
        if lines:
            raise InputError.of_all([InputError(line) for line in dict.fromkeys(lines)])

    def notices(self) -> list[str]:
        """Return a line for each warning, and one for everything that was not checked."""
        lines = [f"warning: {f.message}" for f in self.merged() if f.severity == "warning"]
        unknown = [f.code for f in self.findings if f.severity == "unknown"]
        if unknown:
            lines.append(f"not checked here: {', '.join(dict.fromkeys(unknown))}")
        if lines:
            lines.append("`rcot preflight` says more")
        return lines

    def merged(self) -> list[Finding]:
        """Return the findings, with one in place of those that all GRPO stages have alike.

        It names the section `grpo`, whose keys are given to every GRPO stage.
        """
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            stage = finding.code.rpartition(".")[0]
            alike = _of_all(finding, stage) if stage in self.grpo else finding
            groups.setdefault((alike.severity, alike.code, alike.message), []).append(finding)
        result = []
        for group in groups.values():
            stages = {finding.code.rpartition(".")[0] for finding in group}
            if len(stages) > 1 and stages == set(self.grpo):
                result.append(_of_all(group[0], group[0].code.rpartition(".")[0]))
            else:
                result += group[:1] if len(stages) == 1 else group
        return result

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: `ok`, `recipe`, `plan`, `findings`."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "recipe": self.recipe, "plan": self.plan, "findings": findings}

    def text(self) -> str:
        """Return the plan, the findings with errors first, and their numbers, for the terminal."""
        lines = [f"{key:<21} {value}" for key, value in self.plan.items()]
        order = ("error", "warning", "unknown")
        findings = sorted(self.merged(), key=lambda f: order.index(f.severity))
        lines += [finding.text() for finding in findings]
        count = {s: sum(f.severity == s for f in findings) for s in order}
        lines.append(
            f"{count['error']} errors, {count['warning']} warnings, {count['unknown']} unknown"
        )
        return "\n".join(lines)


def _of_all(finding: Finding, stage: str) -> Finding:
    """Return a stage's finding with `grpo` in place of the stage."""
    key = re.compile(rf"\btrain\.{re.escape(stage)}(?![-\w])")
    return replace(
        finding,
        code="grpo" + finding.code.removeprefix(stage),
        message=key.sub("grpo", finding.message),
        fix=key.sub("grpo", finding.fix),
    )


@dataclass
class Notes:
    """Collects the findings of the checks."""

    findings: list[Finding] = field(default_factory=list)

    def error(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note a fault that stops the run."""
        self.findings.append(Finding(code, "error", message, cost, fix))

    def warning(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note what a person should weigh."""
        self.findings.append(Finding(code, "warning", message, cost, fix))

    def unknown(self, code: str, message: str, *, cost: str, fix: str) -> None:
        """Note what this host cannot check."""
        self.findings.append(Finding(code, "unknown", message, cost, fix))

    @contextlib.contextmanager
    def attempt(self, code: str, *, cost: str, fix: str) -> Iterator[None]:
        """Note an InputError that is raised in the body as an error of this code."""
        try:
            yield
        except InputError as error:
            for fault in error.faults:
                self.error(code, fault, cost=cost, fix=fix)
