"""The report's first section: the verdict on a run in words, and its alerts."""

from __future__ import annotations

from collections.abc import Sequence

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.judgement.run_verdict import RunVerdict
from rcot_rl.monitoring.pages.page import details, section, text

_LEVELS = {
    "good": ("up", "good"),
    "mixed": ("warn", "mixed"),
    "bad": ("down", "bad"),
    "unknown": ("soft", "not known yet"),
}
"""Level -> class of its colour, and its word; the colour is never the only sign."""


def verdict_section(verdict: RunVerdict, alerts: Sequence[Alert]) -> str:
    """Return the verdict, its alerts, what each stage shows, and what to try next."""
    colour, word = _LEVELS[verdict.level]
    stages = "".join(
        f"<div><h3>{text(stage.stage, 60)}</h3>{_list(stage.sentences)}</div>"
        for stage in verdict.stages
        if stage.sentences
    )
    following = ""
    if verdict.next_steps:
        following = f"<h3>What to try next</h3>{_list(verdict.next_steps)}"
    return section(
        "Verdict",
        f'<div class="verdict {verdict.level}"><p class="headline">'
        f'<span class="level {colour}">{word}</span>{text(verdict.headline, 1000)}</p>'
        f'{following}<div class="by-stage">{stages}</div></div>',
        _alerts(alerts),
        details(
            "How the verdict is made",
            "<p>By stated rules from the files of the run, without a model. The rules, their "
            "bounds and their false-alarm rate on our own runs are in the documentation of "
            "alerts (docs/alerts.md).</p>",
        ),
    )


def _alerts(alerts: Sequence[Alert]) -> str:
    return "".join(
        f'<p class="alert {alert.level}"><b>{text(alert.title, 200)}</b> '
        f"({alert.level}, {text(alert.stage, 60)}"
        f"{f', step {alert.step}' if alert.step else ''}): {text(alert.text, 1000)}</p>"
        for alert in alerts
    )


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(s, 1000)}</li>' for s in sentences)}</ul>"
