"""The report's drawn rollouts: best and worst response of one group, at a few steps of a stage.

A slider shows one step at a time. It needs `ROLLOUTS_SCRIPT`; without the script the steps are a
list to unfold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rcot_rl.monitoring.pages.embedded_media import FrameSheet
from rcot_rl.monitoring.pages.page import details, missing, section, text
from rcot_rl.monitoring.pages.svg_overlay import Overlay, marks_legend
from rcot_rl.monitoring.run_files.marks import BOX, POINT, TRUTH
from rcot_rl.monitoring.run_files.rollout_files import (
    Rollout,
    RolloutFrames,
    groups_of,
    read_frame,
    read_rollouts,
    rollout_steps,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.protocol.parser import parse_response
from rcot_rl.stats.spacing import evenly_spaced

MOST_STEPS = 8
"""Steps of the slider, evenly spaced, the first and the last included."""

MOST_BOXES = 50
MOST_REWARDS = 32

Group = Sequence[Rollout]


def rollouts_section(reader: RunReader, stage: str) -> str:
    """Return the section of a GRPO stage as HTML; empty without rollouts."""
    folder = reader.stage(stage).folder
    known = rollout_steps(folder)
    shown = [known[i] for i in evenly_spaced(len(known), MOST_STEPS)]
    groups = {step: rollouts for step in shown if (rollouts := read_rollouts(folder, step))}
    if not groups:
        return ""
    sheet, frames = FrameSheet(f"rollouts of {stage}"), RolloutFrames(reader.root, stage)
    steps = [
        _step(step, rollouts, frames, sheet, step == max(groups))
        for step, rollouts in groups.items()
    ]
    grounded = any(rollouts[0].task == "ktg" for rollouts in groups.values())
    last = len(steps) - 1
    note = (
        "One group of responses to the same prompt at each step: of the groups whose rewards "
        "differ, the one whose mean reward is closest to the step’s mean. Left its best response, "
        "right its worst. The advantage says how much the step reinforced the response."
    )
    slider = (
        f'<p class="slider" hidden><label>Step <output></output> of {max(known)}'
        f'<input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="Step of {text(stage, 100)}"></label></p>'
    )
    return section(
        f"Rollouts of {text(stage, 100)}",
        f'<p class="soft">{note}</p>',
        marks_legend(("truth", "box", "point")) if grounded else "",
        f'<div class="steps">{slider}{"".join(steps)}</div>',
        sheet.html(),
    )


def shown_group(rollouts: Sequence[Rollout]) -> Group:
    """Return the group closest to the step's mean reward, if possible one whose rewards differ.

    Ties go to the group that is first in the file.
    """
    mean = fmean(rollout.reward for rollout in rollouts)

    def place(group: Group) -> tuple[bool, float]:
        rewards = [rollout.reward for rollout in group]
        return min(rewards) == max(rewards), abs(fmean(rewards) - mean)

    return min(groups_of(rollouts).values(), key=place)


def _step(
    step: int, rollouts: Sequence[Rollout], frames: RolloutFrames, sheet: FrameSheet, unfolded: bool
) -> str:
    group = sorted(shown_group(rollouts), key=lambda rollout: -rollout.reward)
    best, worst = group[0], group[-1]
    rewards = ", ".join(f"{rollout.reward:.3g}" for rollout in group[:MOST_REWARDS])
    if len(group) > MOST_REWARDS:
        rewards += ", …"
    shown = [("Best", best), ("Worst", worst)]
    note = ""
    if best.reward == worst.reward:
        shown = [("First", best)]
        note = (
            f"<p>All {len(group)} responses have the same reward, so the group gives no gradient. "
            "No group of this step has rewards that differ.</p>"
        )
    figures = "".join(_response(kind, one, frames, sheet) for kind, one in shown)
    mean = fmean(rollout.reward for rollout in rollouts)
    query = frames.expression(best.index)
    name = f"{best.video} / {best.expression_id}" if best.video else best.prompt_id
    body = (
        f"<p>{f'<b>{text(query, 400)}</b>' if query else ''}<small>{text(name, 200)} · "
        f"{len(group)} responses with rewards {rewards}</small></p>"
        f'{note}<div class="columns">{figures}</div>'
        + details("Prompt", f"<pre>{text(best.prompt)}</pre>")
    )
    summary = f"step {step}: mean reward {mean:.2f} of {len(rollouts)} responses"
    state = " open" if unfolded else ""
    return f'<details data-step="{step}"{state}><summary>{summary}</summary>{body}</details>'


def _response(kind: str, rollout: Rollout, frames: RolloutFrames, sheet: FrameSheet) -> str:
    advantage = "not recorded" if rollout.advantage is None else f"{rollout.advantage:+.2f}"
    parts = [f"{text(name, 60)} {value:.3g}" for name, value in rollout.components.items()]
    reasons = ", ".join(f"<code>{text(reason, 80)}</code>" for reason in rollout.reasons[:20])
    length = "" if rollout.tokens is None else f" · {rollout.tokens} tokens"
    parsed = parse_response(rollout.response)
    if parsed.thought is None or parsed.answer is None:
        words = f'<p class="facts">response</p><pre>{text(rollout.response)}</pre>'
    else:
        words = (
            f'<p class="facts">reasoning</p><pre>{text(parsed.thought)}</pre>'
            f'<p class="facts">answer</p><pre>{text(parsed.answer)}</pre>'
        )
    truth = f" · correct answer {text(rollout.truth, 20)}" if rollout.task == "aks" else ""
    return (
        f"<figure><figcaption><b>{kind}</b>: reward {rollout.reward:.3g}, advantage {advantage}"
        f"</figcaption>{_drawing(kind, rollout, frames, sheet)}<div>"
        f"<small>{' · '.join(parts)}{length}{truth}</small>"
        f"<small>{f'lost points: {reasons}' if reasons else 'no points lost'}</small>"
        f"{_episode(rollout.outcome)}{words}"
        "</div></figure>"
    )


def _episode(outcome: Mapping[str, Any]) -> str:
    """Return where an agentic episode ended; empty for a single response."""
    judged, chosen, area = (outcome.get(key) for key in ("judged", "chosen", "area"))
    if not (isinstance(judged, int) and isinstance(chosen, int) and isinstance(area, int | float)):
        return ""
    return (
        f"<small>episode of {text(outcome.get('judgements'), 10)} judgements, drawn: the first "
        f"judged frame. Last judged: frame {judged + 1} of the clip. Chosen: frame {chosen + 1}, "
        f"with {100 * area:.0f} % of the largest target area</small>"
    )


def _drawing(kind: str, rollout: Rollout, frames: RolloutFrames, sheet: FrameSheet) -> str:
    """Return the frame with the true and the predicted boxes and points, or why there is none."""
    path, side = frames.path(rollout.index), frames.canvas
    if path is None or side <= 0:
        return missing("the frame of this prompt (not in the run's shards)")
    true, predicted = rollout.true_objects, rollout.predicted_objects
    overlay = Overlay(side, side)
    try:
        image = read_frame(path)
        if image is None:
            raise ValueError(f"{path.name} is no readable image")
        frame = sheet.add(image)
        overlay.boxes([box for box, _ in true][:MOST_BOXES], TRUTH, "truth", dashed=True)
        overlay.boxes([box for box, _ in predicted][:MOST_BOXES], BOX, "box")
        overlay.points([p for _, p in true if p is not None][:MOST_BOXES], TRUTH, "truth")
        overlay.points([p for _, p in predicted if p is not None][:MOST_BOXES], POINT, "point")
    except (OSError, ValueError, TypeError, OverflowError) as error:
        return missing(f"the drawing of this response ({error})")
    drawn = f", {len(true)} true and {len(predicted)} predicted boxes" if true or predicted else ""
    return overlay.svg(frame, f"Frame of the {kind.lower()} response{drawn}")


ROLLOUTS_SCRIPT = """\
"use strict";
for (const box of document.querySelectorAll(".steps")) {
  const slider = box.querySelector(".slider");
  const input = slider.querySelector("input");
  const steps = [...box.querySelectorAll("details[data-step]")];
  const show = () => {
    const chosen = steps[Number(input.value)];
    for (const step of steps) step.hidden = step !== chosen;
    chosen.open = true;
    slider.querySelector("output").textContent = chosen.dataset.step;
    input.setAttribute("aria-valuetext", "step " + chosen.dataset.step);
  };
  input.addEventListener("input", show);
  slider.hidden = false;
  show();
}
"""

ROLLOUTS_STYLE = """\
.slider label { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
.slider[hidden], .steps > [hidden] { display: none; }
.slider output { min-width: 2ch; font-weight: 600; font-variant-numeric: tabular-nums; }
.steps figure { display: grid; gap: 4px 12px; align-content: start; overflow-wrap: anywhere; }
.steps figcaption { grid-column: 1 / -1; margin: 0; }
@media (min-width: 900px) { .steps figure { grid-template-columns: 220px minmax(0, 1fr); } }
.slider input { flex: 1 1 260px; max-width: 560px; accent-color: var(--s1); }
"""
