"""The preflight's findings: each with its code, what it would cost later, and the fix.

Three severities: an `error` stops the run, a `warning` is for people to weigh, and `unknown` names
what this host cannot check, so that nothing passes in silence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rcot_rl.errors import InputError
from rcot_rl.system.lines import LOG_WIDTH, fold

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
    derivations: tuple[str, ...] = ()
    """Parts of the message that say how an amount is derived."""

    @property
    def brief(self) -> str:
        """The message without its derivations."""
        text = self.message
        for derivation in self.derivations:
            text = text.replace(f": {derivation}", "")
        return text


@dataclass
class Report:
    """The plan of a run and the findings about it."""

    recipe: str
    plan: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    grpo: Collection[str] = ()
    """Names of the recipe's GRPO stages."""
    brief_plan: dict[str, Any] = field(default_factory=dict)
    """The plan without derivations of its estimates."""

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def errors(self) -> list[str]:
        """Messages of the errors, one line each, without derivations."""
        errors = (f.brief for f in self.merged() if f.severity == "error")
        return list(dict.fromkeys(errors))

    def raise_errors(self) -> None:
        """Raise InputError with every error and its fix, one line each."""
        errors = [f for f in self.merged() if f.severity == "error"]
        # a question mark ends a sentence already
        ends = ["" if f.brief.endswith("?") else ";" for f in errors]
        lines = [f"{f.brief}{end} fix: {f.fix}" for f, end in zip(errors, ends, strict=True)]
        if lines:
            raise InputError.of_all([InputError(line) for line in dict.fromkeys(lines)])

    def notices(self) -> list[str]:
        """Return a line for each warning, and one for everything that was not checked."""
        lines = [f"warning: {f.brief}" for f in self.merged() if f.severity == "warning"]
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
        keys = ("code", "severity", "message", "cost", "fix")
        findings = [{key: getattr(finding, key) for key in keys} for finding in self.findings]
        return {"ok": self.ok, "recipe": self.recipe, "plan": self.plan, "findings": findings}

    def text(self, *, explain: bool = False, width: int = LOG_WIDTH) -> str:
        """Return the plan, the findings by cause with errors first, and their numbers.

        Args:
            explain: Show how each estimate is derived.
            width: Columns of the terminal.
        """
        plan = self.plan if explain else self.brief_plan or self.plan
        lines = []
        for key, value in plan.items():
            lines += fold(str(value), width, f"{key:<21} ", " " * 22)
        order = ("error", "warning", "unknown")
        findings = sorted(self.merged(), key=lambda f: order.index(f.severity))
        for group in by_cause(findings):
            lines += ["", *_group_lines(group, explain, width)]
        count = {s: sum(f.severity == s for f in findings) for s in order}
        counts = f"{count['error']} errors, {count['warning']} warnings, {count['unknown']} unknown"
        return "\n".join([*lines, "", counts])


def by_cause(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings: those of one code, and of codes that have the same fixes, belong together."""
    of_code: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        of_code.setdefault((finding.severity, finding.code), []).append(finding)
    groups: dict[tuple[str, tuple[str, ...]], list[Finding]] = {}
    for (severity, _), group in of_code.items():
        fixes = tuple(dict.fromkeys(finding.fix for finding in group))
        groups.setdefault((severity, fixes), []).extend(group)
    return list(groups.values())


def _group_lines(group: Sequence[Finding], explain: bool, width: int) -> list[str]:
    """Return the lines of one cause: its codes, the places, the cost and the fix once."""

    def once(texts: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(text for text in texts if text))

    indent = " " * 8
    lines = fold(", ".join(once(f.code for f in group)), width, f"{group[0].severity:<8}", indent)
    for place in once(f.message if explain else f.brief for f in group):
        lines += fold(place, width, indent, indent + "  ")
    lines += fold("; ".join(once(f.cost for f in group)), width, "  cost  ", indent)
    for fix in once(f.fix for f in group):
        lines += fold(fix, width, "  fix   ", indent)
    return lines


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

    def error(
        self, code: str, message: str, *, cost: str, fix: str, why: Iterable[str] = ()
    ) -> None:
        """Note a fault that stops the run. `why`: derivations in the message."""
        self.findings.append(Finding(code, "error", message, cost, fix, tuple(why)))

    def warning(
        self, code: str, message: str, *, cost: str, fix: str, why: Iterable[str] = ()
    ) -> None:
        """Note what a person should weigh. `why`: derivations in the message."""
        self.findings.append(Finding(code, "warning", message, cost, fix, tuple(why)))

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
