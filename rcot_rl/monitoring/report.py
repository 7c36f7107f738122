"""RUN/report.html: what a run was, what it reached, how it went there, and what it looks at.

One self-contained page from the files of the run's folder (`contracts`: recipe.yaml,
<stage>/metrics.jsonl and done.json, predict/rewards.json, eval/<benchmark>.json, predictions/).
What is not there is named as missing in its place; nothing is filled in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rcot_rl.errors import InputError
from rcot_rl.monitoring.curves import COLOURS, Series, how_drawn, line_chart
from rcot_rl.monitoring.figures import (
    DASH,
    TRAINING,
    at,
    is_number,
    number,
    result_files,
    rewards_section,
    scores_section,
)
from rcot_rl.monitoring.metrics import read_metrics
from rcot_rl.monitoring.page import details, missing, page, section, table, text
from rcot_rl.monitoring.shots import shots

STAGES = ("data", *TRAINING, "predict", "eval")
SHOTS = 12


class Chart(NamedTuple):
    """What one chart shows of metrics.jsonl."""

    title: str
    keys: Mapping[str, str]
    """Key of metrics.jsonl -> name of the curve."""

    note: str
    """How to read it."""


_SFT_CHARTS = (
    Chart(
        "loss",
        {"train/loss": "training", "val/loss": "validation"},
        "Cross-entropy of the traces, per token. It should fall and level off; a validation loss "
        "that rises again means memorising.",
    ),
    Chart(
        "learning rate",
        {"train/lr": "rate"},
        "The schedule that was in force: warm-up, then decay.",
    ),
)
_REWARD = Chart(
    "mean reward",
    {"reward/mean": "reward"},
    "Weighted sum, mean over the step's rollouts. Prompts differ from step to step, so look at the "
    "trend; the held-out rewards above are the comparison.",
)
_COMPONENTS_NOTE = (
    "Format saturates first; what is learnt about the task shows in the other components."
)
_GRPO_CHARTS = (
    Chart(
        "groups without variance",
        {"group/zero_variance_fraction": "fraction"},
        "Groups whose responses all earned the same give no gradient. Near 1, a step is wasted: "
        "the task is solved or out of reach.",
    ),
    Chart(
        "response length, tokens",
        {"response_length/mean": "mean"},
        "A sudden rise or a fall to a few tokens hints at a reward that is being gamed.",
    ),
    Chart(
        "KL loss against the reference",
        {"actor/kl_loss": "KL"},
        "How far the policy has moved from where the stage began. Slow growth is normal, a jump "
        "is a warning.",
    ),
    Chart(
        "entropy",
        {"actor/entropy": "entropy"},
        "Spread of the policy's next tokens. At 0 it explores no more and groups become alike.",
    ),
    Chart(
        "gradient norm",
        {"actor/grad_norm": "norm"},
        "Before clipping. Isolated peaks are harmless, lasting growth is not.",
    ),
    Chart(
        "seconds a step",
        {"timing_s/step": "step"},
        "Wall-clock time of a whole step: rollouts, rewards and the update.",
    ),
)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the folder holds and return its path.

    Raises InputError when there is no such folder or it holds nothing of a run.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise InputError("no such folder (of a run)", file=run)
    known = ("recipe.yaml", "eval", "predictions", "predict", *TRAINING)
    if not any((run / name).exists() for name in known):
        raise InputError("holds nothing of a run", file=run)
    record = _yaml(run / "recipe.yaml")
    scores = {path.stem: _json(path) for path in result_files(run)}
    body = "".join(
        (
            _header(run, record),
            rewards_section(_json(run / "predict" / "rewards.json")),
            scores_section(scores),
            *(_training(run, stage) for stage in TRAINING),
            _keyframes(run, scores),
            _conditions(run, record),
        )
    )
    target, partial = run / "report.html", run / ".report.html.tmp"
    partial.write_text(page(f"{_name(run, record)} – RCoT-Seg run", body), encoding="utf-8")
    os.replace(partial, target)
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
        facts.append(f"procedurally generated corpora, difficulty “{text(toy, 40)}”")
    identity = (
        f"recipe <code>{text(_short(at(record, 'recipe_hash')))}</code> · "
        f"commit <code>{text(_short(at(record, 'git_commit')))}</code>"
    )
    lines = f'<p>{" · ".join(facts)}</p><p class="soft">{identity}</p>'
    if recipe is None:
        lines = missing("recipe.yaml (what was run, and with which versions)")
    return f"<h1>{text(_name(run, record), 200)}</h1>{lines}{_stages(run)}"


def _short(digest: Any) -> str:
    """The first twelve characters of a hash, and the `+` of a checkout with changes."""
    if not isinstance(digest, str) or not digest:
        return DASH
    return digest[:12] + ("+" if len(digest) > 12 and digest.endswith("+") else "")


def _name(run: Path, record: Any) -> str:
    return str(at(record, "recipe", "name") or run.resolve().name)


def _stages(run: Path) -> str:
    rows = []
    for stage in STAGES:
        folder = run / stage
        if not folder.is_dir():
            continue
        done = _json(folder / "done.json")
        state = "done" if isinstance(done, dict) else "not finished"
        attempts = len(list(folder.glob("attempt-*")))
        minutes, peak = number(at(done, "minutes"), 1), number(at(done, "peak_gib"), 1)
        rows.append([TRAINING.get(stage, stage), state, minutes, peak, str(attempts or DASH)])
    if not rows:
        return missing("stages (no folder of a stage is there)")
    return table(["stage", "state", "minutes", "peak GiB", "attempts"], rows, numbers=2)


def _training(run: Path, stage: str) -> str:
    title = TRAINING[stage]
    path = run / stage / "metrics.jsonl"
    try:
        lines = [line for line in read_metrics(path) if is_number(at(line, "step"))]
    except (OSError, ValueError) as error:
        return section(title, missing(f"{stage}/metrics.jsonl cannot be read ({error})"))
    if not lines:
        return section(title, missing(f"{stage}/metrics.jsonl (the curves of this stage)"))
    charts, absent = [], []
    for chart in _charts(stage, lines):
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
        missing(f"curves of {', '.join(absent)} (not in metrics.jsonl)") if absent else "",
    )


def _charts(stage: str, lines: list[Any]) -> list[Chart]:
    if stage == "sft":
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
        return section(title, missing("eval/*.json (which names the predictions to draw)"))
    each = max(1, SHOTS // len(usable))
    drawn = [shot for name, r in usable.items() for shot in shots(run, name, r, each)][:SHOTS]
    key = (
        '<p class="soft">From the best to the worst J&amp;F of each benchmark, evenly spaced. '
        '<span class="swatch truth"></span>ground truth<span class="swatch pred"></span>predicted '
        'mask<span class="swatch box"></span>predicted box<span class="swatch point"></span>'
        "predicted point</p>"
    )
    return section(title, key, f'<div class="grid-of">{"".join(drawn)}</div>')


def _conditions(run: Path, record: Any) -> str:
    if record is None:
        return section("Conditions", missing("recipe.yaml"))
    versions = at(record, "versions")
    rows = [[text(k, 60), text(v, 60)] for k, v in (versions or {}).items()]
    rows.append(["python", text(at(record, "python") or DASH, 60)])
    whole = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    return section(
        "Conditions",
        table(["package", "version"], rows, numbers=2),
        details("Resolved recipe", f"<pre>{text(whole, 60_000)}</pre>"),
    )


def _json(path: Path) -> Any:
    """The document, or None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
