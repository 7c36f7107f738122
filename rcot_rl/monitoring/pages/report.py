"""RUN/report.html: verdict, stages, training curves, benchmarks, queries and the recipe of a run.

The page is self-contained and reads only the run folder and, for frames, its corpora and shards.
What is missing is named in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.alert_rules import alerts_of
from rcot_rl.monitoring.judgement.landmarks import max_reward
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.pages.figures import DASH, number, rewards_section, scores_section
from rcot_rl.monitoring.pages.page import details, missing, page, section, table, text
from rcot_rl.monitoring.pages.paper_section import paper_section
from rcot_rl.monitoring.pages.query_cards import QUERIES_STYLE, queries_section
from rcot_rl.monitoring.pages.rollout_slider import (
    ROLLOUTS_SCRIPT,
    ROLLOUTS_STYLE,
    rollouts_section,
)
from rcot_rl.monitoring.pages.stage_charts import stage_section
from rcot_rl.monitoring.pages.svg_overlay import MARKS_STYLE
from rcot_rl.monitoring.pages.verdict_section import verdict_section
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView
from rcot_rl.recipe.recorded import heldout_stages
from rcot_rl.stats.json_values import at, is_number
from rcot_rl.system.files import write_text


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the files in the folder and return its path. Raises InputError."""
    run = Path(run_dir)
    if not run.is_dir():
        raise InputError("no such run folder", file=run)
    reader = RunReader(run)
    training = reader.training_stages
    known = ("recipe.yaml", "eval", "predictions", "predict")
    if not training and not any((run / name).exists() for name in known):
        raise InputError(f"no run folder: it has none of {', '.join(known)}", file=run)
    stages = reader.stages()
    verdict = judge_run(reader)
    judged = {stage.stage: stage.alerts for stage in verdict.stages}
    alerts = [
        alert
        for stage in stages
        for alert in (judged[stage.name] if stage.name in judged else alerts_of(reader, stage.name))
    ]
    scores = reader.scores()
    rollouts = _rollouts(reader, stages)
    body = "".join(
        (
            verdict_section(verdict, alerts),
            _chain(stages),
            *(stage_section(reader, stage) for stage in training),
            rewards_section(reader.heldout(), _maxima(reader)),
            scores_section(scores),
            paper_section(at(reader.record, "recipe", "report", "paper_tables"), scores),
            queries_section(reader),
            rollouts,
            _recipe(reader.record),
        )
    )
    scripts = [ROLLOUTS_SCRIPT] if rollouts else []
    title = f"{reader.name} – RCoT-Seg run"
    styles = [MARKS_STYLE, QUERIES_STYLE, ROLLOUTS_STYLE]
    html = page(title, body, _header(reader, stages), scripts=scripts, styles=styles)
    target = run / "report.html"
    write_text(target, html)
    return target


def _rollouts(reader: RunReader, stages: list[StageView]) -> str:
    """Return drawn rollouts of the last GRPO stage that has some, and of the others to unfold."""
    drawn = {s.name: rollouts_section(reader, s.name) for s in stages if s.kind == "grpo"}
    drawn = {name: html for name, html in drawn.items() if html}
    *earlier, last = [*drawn] or [""]
    folded = [details(f"Rollouts of {text(name, 60)}", drawn[name]) for name in earlier]
    return drawn.get(last, "") + "".join(folded)


def _maxima(reader: RunReader) -> dict[str, float]:
    """Return the greatest possible reward of each held-out task."""
    maxima = {task: max_reward(reader, s) for task, s in heldout_stages(reader.root).items()}
    return {task: most for task, most in maxima.items() if most is not None}


def _header(reader: RunReader, stages: list[StageView]) -> str:
    recipe = at(reader.record, "recipe")
    if recipe is None:
        lines = missing("recipe.yaml (resolved recipe and package versions)")
        return f"<h1>{text(reader.name, 200)}</h1>{lines}"
    toy = at(recipe, "toy", "preset")
    facts = [
        f"policy {text(at(recipe, 'models', 'policy') or DASH, 200)}",
        f"segmenter {text(at(recipe, 'models', 'segmenter') or DASH, 200)}",
        f"device {text(at(recipe, 'device') or DASH, 20)}",
        f"seed {text(at(recipe, 'seed') or DASH, 20)}",
    ]
    if toy is not None:
        facts.append(f"procedural toy corpora, preset “{text(toy, 40)}”")
    facts.append(f"recipe <code>{text(_short(at(reader.record, 'recipe_hash')))}</code>")
    facts.append(f"commit <code>{text(_short(at(reader.record, 'git_commit')))}</code>")
    minutes = [m for stage in stages if is_number(m := stage.facts.get("minutes"))]
    if minutes:
        facts.append(f"{sum(minutes):.0f} minutes")
    return f'<h1>{text(reader.name, 200)}</h1><p class="soft">{" · ".join(facts)}</p>'


def _short(digest: Any) -> str:
    """Return twelve characters of a hash, and the `+` of a checkout with local changes."""
    if not isinstance(digest, str) or not digest:
        return DASH
    return digest[:12] + ("+" if len(digest) > 12 and digest.endswith("+") else "")


def _chain(stages: list[StageView]) -> str:
    """Return the stages in order, with the causes of failed attempts."""
    if not any(stage.state != "pending" for stage in stages):
        return section("Stages", missing("stage folders (no stage has started)"))
    failures = [row for stage in stages for row in stage.failures]
    causes = [
        [
            text(f"{at(row, 'stage')} {at(row, 'attempt')}", 80),
            number(at(row, "step"), 0),
            text(at(row, "cause") or DASH, 40),
            text(at(row, "text") or at(row, "error") or DASH, 600),
        ]
        for row in failures
    ]
    head = ["attempt", "after step", "cause", "what happened"]
    return section(
        "Stages",
        f'<ol class="chain">{"".join(map(_stage, stages))}</ol>',
        details(f"Failed attempts ({len(causes)})", table(head, causes, 4)) if causes else "",
    )


_STATES = {"done": "✓ done", "running": "▶ running", "stopped": "✕ stopped", "pending": "pending"}


def _stage(stage: StageView) -> str:
    facts = []
    if stage.facts:
        facts.append(f"{number(stage.facts.get('minutes'), 1)} min")
        facts.append(f"{number(stage.facts.get('peak_gib'), 1)} GiB")
    if stage.attempts > 1 or stage.failures:
        facts.append(f"{stage.attempts} attempts")
    return (
        f'<li class="{stage.state}"><b>{text(stage.name, 60)}</b>'
        f"<small>{_STATES[stage.state]}</small><small>{' · '.join(facts)}</small></li>"
    )


def _recipe(record: dict[str, Any]) -> str:
    title = "Recipe and environment"
    if not record:
        return section(title, missing("recipe.yaml"))
    versions = {"python": at(record, "python")}
    versions |= {key: _short(at(record, key)) for key in ("git_commit", "recipe_hash")}
    known = at(record, "versions")
    versions |= known if isinstance(known, dict) else {}
    shown = "".join(
        f"<div><dt>{text(name, 60)}</dt><dd>{text(value or DASH, 90)}</dd></div>"
        for name, value in versions.items()
    )
    recipe = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    return section(
        title,
        f'<dl class="versions">{shown}</dl>',
        details("Resolved recipe", f"<pre>{text(recipe, 60_000)}</pre>"),
    )
