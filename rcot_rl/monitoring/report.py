"""RUN/report.html: settings, rewards, J&F, training curves and drawn keyframes of a run.

The page is self-contained and reads only the run folder: recipe.yaml, <stage>/metrics.jsonl and
done.json, predict/rewards.json, eval/<benchmark>.json and predictions/. What is missing is named in
its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rcot_rl.errors import InputError
from rcot_rl.monitoring.curves import COLOURS, Series, how_drawn, line_chart
from rcot_rl.monitoring.figures import (
    DASH,
    at,
    is_number,
    number,
    result_files,
    rewards_section,
    scores_section,
)
from rcot_rl.monitoring.metrics import read_metrics
from rcot_rl.monitoring.page import details, missing, page, section, table, text
from rcot_rl.monitoring.paper_section import paper_section
from rcot_rl.monitoring.shots import shots
from rcot_rl.prediction_layout import heldout_rewards_file
from rcot_rl.recipe.recorded import recorded_stages, stages_with
from rcot_rl.recipe.schema import AFTER_TRAINING, BEFORE_TRAINING
from rcot_rl.system.files import write_text

SHOTS = 12
"""Most keyframes on the page."""


class Chart(NamedTuple):
    """A chart of metrics.jsonl."""

    title: str
    keys: Mapping[str, str]
    """Key of metrics.jsonl -> name of the curve."""
    note: str
    """How to read the chart."""


_SFT_CHARTS = (
    Chart(
        "loss",
        {"train/loss": "training", "val/loss": "validation"},
        "Cross-entropy per token of the traces. Should fall and level off; a validation loss that "
        "rises again means overfitting.",
    ),
    Chart(
        "learning rate",
        {"train/lr": "rate"},
        "The schedule that was applied: warm-up, then decay.",
    ),
)
_REWARD = Chart(
    "mean reward",
    {"reward/mean": "reward"},
    "Weighted sum of the components, mean over the step's rollouts. Each step has other prompts: "
    "read the trend here and compare stages by the held-out rewards above.",
)
_COMPONENTS_NOTE = "Format saturates first; the other components show what is learned of the task."
_GRPO_CHARTS = (
    Chart(
        "groups without variance",
        {"group/zero_variance_fraction": "fraction"},
        "Share of groups whose responses all have the same reward. Their advantages are 0, so they "
        "give no gradient. Near 1 the step is wasted: the task is solved or out of reach.",
    ),
    Chart(
        "response length, tokens",
        {"response_length/mean": "mean"},
        "A sudden rise, or a fall to a few tokens, hints at reward hacking.",
    ),
    Chart(
        "KL loss against the reference",
        {"actor/kl_loss": "KL"},
        "Distance of the policy from the start of the stage. Slow growth is normal, a jump is a "
        "warning.",
    ),
    Chart(
        "entropy",
        {"actor/entropy": "entropy"},
        "Entropy of the policy's next token. Near 0 the policy no longer explores and the "
        "responses of a group become alike.",
    ),
    Chart(
        "gradient norm",
        {"actor/grad_norm": "norm"},
        "Before clipping. Isolated peaks are harmless, steady growth is not.",
    ),
    Chart(
        "seconds per step",
        {"timing_s/step": "step"},
        "Wall-clock time of rollouts, rewards and the update.",
    ),
)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the files in the folder and return its path. Raises InputError."""
    run = Path(run_dir)
    if not run.is_dir():
        raise InputError("no such run folder", file=run)
    known = ("recipe.yaml", "eval", "predictions", "predict")
    training = list(dict.fromkeys([*recorded_stages(run), *stages_with(run, "metrics.jsonl")]))
    if not training and not any((run / name).exists() for name in known):
        raise InputError(f"no run folder: it has none of {', '.join(known)}", file=run)
    record = _yaml(run / "recipe.yaml")
    scores = {path.stem: _json(path) for path in result_files(run)}
    body = "".join(
        (
            _header(run, record),
            rewards_section(_json(heldout_rewards_file(run))),
            scores_section(scores),
            paper_section(at(record, "recipe", "report", "paper_tables"), scores),
            *(_training(run, stage) for stage in training),
            _keyframes(run, scores),
            _recipe(record),
        )
    )
    target = run / "report.html"
    write_text(target, page(f"{_name(run, record)} – RCoT-Seg run", body))
    return target


def _header(run: Path, record: Any) -> str:
    recipe = at(record, "recipe")
    toy = at(recipe, "toy", "preset")
    facts = [
        f"policy {text(at(recipe, 'models', 'policy') or DASH, 200)}",
        f"segmenter {text(at(recipe, 'models', 'segmenter') or DASH, 200)}",
        f"device {text(at(recipe, 'device') or DASH, 20)}",
        f"seed {text(at(recipe, 'seed') or DASH, 20)}",
    ]
    if toy is not None:
        facts.append(f"procedural toy corpora, preset “{text(toy, 40)}”")
    identity = (
        f"recipe <code>{text(_short(at(record, 'recipe_hash')))}</code> · "
        f"commit <code>{text(_short(at(record, 'git_commit')))}</code>"
    )
    lines = f'<p>{" · ".join(facts)}</p><p class="soft">{identity}</p>'
    if recipe is None:
        lines = missing("recipe.yaml (resolved recipe and package versions)")
    return f"<h1>{text(_name(run, record), 200)}</h1>{lines}{_stages(run)}"


def _short(digest: Any) -> str:
    """Return twelve characters of a hash, and the `+` of a checkout with local changes."""
    if not isinstance(digest, str) or not digest:
        return DASH
    return digest[:12] + ("+" if len(digest) > 12 and digest.endswith("+") else "")


def _name(run: Path, record: Any) -> str:
    return str(at(record, "recipe", "name") or run.resolve().name)


def _stages(run: Path) -> str:
    rows = []
    started = stages_with(run, "attempt-1", "done.json")
    trained = [stage for stage in started if stage not in (*BEFORE_TRAINING, *AFTER_TRAINING)]
    for stage in dict.fromkeys((*BEFORE_TRAINING, *trained, *AFTER_TRAINING)):
        folder = run / stage
        if not folder.is_dir():
            continue
        done = _json(folder / "done.json")
        state = "done" if isinstance(done, dict) else "not finished"
        attempts = len(list(folder.glob("attempt-*")))
        minutes, peak = number(at(done, "minutes"), 1), number(at(done, "peak_gib"), 1)
        rows.append([text(stage), state, minutes, peak, str(attempts or DASH)])
    if not rows:
        return missing("stage folders (no stage has started)")
    return table(["stage", "state", "minutes", "peak GiB", "attempts"], rows, numbers=2)


def _training(run: Path, stage: str) -> str:
    title = stage
    path = run / stage / "metrics.jsonl"
    try:
        lines = [line for line in read_metrics(path) if is_number(at(line, "step"))]
    except (OSError, ValueError) as error:
        return section(title, missing(f"{stage}/metrics.jsonl (unreadable: {error})"))
    if not lines:
        return section(title, missing(f"{stage}/metrics.jsonl (training curves)"))
    charts, absent = [], []
    for chart in _charts(lines):
        curves = [_series(lines, key, name) for key, name in chart.keys.items()]
        series = [curve for curve in curves if curve is not None]
        if series:
            charts.append(line_chart(chart.title, series, chart.note))
        else:
            absent.append(chart.title)
    note = f"{len(lines)} steps. {how_drawn(len(lines))}"
    return section(
        title,
        f'<p class="soft">{note}</p><div class="grid-of">{"".join(charts)}</div>',
        missing(f"{', '.join(absent)} (not in metrics.jsonl)") if absent else "",
    )


def _charts(lines: list[Any]) -> list[Chart]:
    if not any("reward/mean" in line for line in lines):
        return list(_SFT_CHARTS)
    keys = sorted({key for line in lines for key in line})
    parts = [k for k in keys if k.startswith("reward/") and k.endswith("/mean")]
    components = {k: k.split("/")[1] for k in parts if k.count("/") == 2}
    shown = dict(list(components.items())[:COLOURS])
    return [
        _REWARD,
        Chart("reward components, unweighted", shown, _COMPONENTS_NOTE),
        *_GRPO_CHARTS,
    ]


def _series(lines: list[Any], key: str, label: str) -> Series | None:
    pairs = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    if not pairs:
        return None
    return Series(label, [step for step, _ in pairs], [value for _, value in pairs])


def _keyframes(run: Path, scores: Mapping[str, Any]) -> str:
    title = "Keyframes"
    usable = {name: r for name, r in scores.items() if isinstance(r, dict)}
    if not usable:
        return section(title, missing("eval/*.json (names the predictions to draw)"))
    each = max(1, SHOTS // len(usable))
    drawn = [shot for name, r in usable.items() for shot in shots(run, name, r, each)][:SHOTS]
    marks = "".join(
        f' <span class="mark"><span class="swatch {kind}"></span>{name}</span>'
        for kind, name in (
            ("truth", "ground truth"),
            ("pred", "predicted mask"),
            ("box", "predicted box"),
            ("point", "predicted point"),
        )
    )
    key = (
        '<p class="soft">Evenly spaced from the best to the worst J&amp;F of each benchmark. '
        f"{marks}</p>"
    )
    return section(title, key, f'<div class="grid-of">{"".join(drawn)}</div>')


def _recipe(record: Any) -> str:
    if record is None:
        return section("Recipe and versions", missing("recipe.yaml"))
    versions = at(record, "versions")
    rows = [[text(k, 60), text(v, 60)] for k, v in (versions or {}).items()]
    rows.append(["python", text(at(record, "python") or DASH, 60)])
    recipe = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    return section(
        "Recipe and versions",
        table(["package", "version"], rows, numbers=2),
        details("Resolved recipe", f"<pre>{text(recipe, 60_000)}</pre>"),
    )


def _json(path: Path) -> Any:
    """Return the parsed file, or None if it is missing or unreadable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _yaml(path: Path) -> Any:
    """Return the parsed file, or None if it is missing or unreadable."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
