"""HTML page of a reward replay: tables, curves, and the responses whose advantage changed most."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcot_rl.monitoring.pages.curves import COLOURS, Series, how_drawn, line_chart
from rcot_rl.monitoring.pages.figures import DASH
from rcot_rl.monitoring.pages.page import details, missing, page, section, table, text
from rcot_rl.monitoring.pages.svg_overlay import MARKS_STYLE, Overlay, marks_legend
from rcot_rl.monitoring.run_files.marks import BOX, POINT, TRUTH
from rcot_rl.monitoring.run_files.rollout_files import Rollout, RolloutFrames, as_rollout

if TYPE_CHECKING:
    from rcot_rl.monitoring.pages.reward_replay import Moved, Replay

_SHOWN = 6
"""Responses that are visible at once; the others unfold."""

_MOST_BOXES = 50

_TOTALS = {
    "mean": (
        "mean",
        "Mean reward of all responses. Rewards of different scales cannot be compared.",
    ),
    "group_std": (
        "spread in groups",
        "Standard deviation within a group, mean over groups: what advantages are made of.",
    ),
    "zero_variance": (
        "without gradient",
        "Share of groups whose responses all have the same reward. Lower is better.",
    ),
    "advantage": ("mean |advantage|", "How strongly a step reinforces a response, on average."),
    "std": ("std", "Standard deviation over all responses of a step."),
}
_AGAINST = {
    "kendall_tau": (
        "Kendall’s tau",
        "Agreement on the order of the responses of a group: 1 is the same order, 0 is unrelated.",
    ),
    "sign_flips": (
        "signs that flip",
        "Share of responses that one reward reinforces and the other suppresses.",
    ),
    "other_best": (
        "another best response",
        "Share of groups in which no response is best under both rewards.",
    ),
}


def replay_page(run: Path, result: Replay) -> str:
    """Return the self-contained page of a replay."""
    first = result.names[0]
    header = (
        f'<h1>Rewards compared on {text(result.stage)}</h1><p class="soft">'
        f"{result.n_responses} responses in {result.n_groups} groups of the run "
        f"{text(run.resolve().name)}, rescored without training.</p>"
    )
    frames = RolloutFrames(run, result.stage)
    parts = [
        _summary(result),
        section("Rewards", _table("reward", result.totals, _TOTALS), _curves(result)),
    ]
    if result.against_first:
        title = f"Compared with {text(first)}"
        parts.append(section(title, _table("reward", result.against_first, _AGAINST)))
    parts += [_moved(name, moved, frames, first) for name, moved in result.moved.items()]
    return page("Rewards compared", "".join(parts), header, styles=[MARKS_STYLE])


def _summary(result: Replay) -> str:
    first = result.names[0]
    lines = []
    for name, against in result.against_first.items():
        dead = [100 * result.totals[n]["zero_variance"] for n in (first, name)]
        order = "no group has an order to compare"
        if "kendall_tau" in against:
            order = f"Kendall’s tau of the order within groups is {against['kendall_tau']:.2f}"
        lines.append(
            f"<li><b>{text(name)}</b>: {order}; {100 * against['sign_flips']:.1f} % of the "
            f"advantages change sign; {dead[1]:.0f} % of the groups give no gradient, with "
            f"{text(first)} {dead[0]:.0f} %.</li>"
        )
    logged = ""
    if first in result.dumped:
        gap = result.dumped[first]
        logged = (
            f"{text(first)} reproduces the rewards that the run logged."
            if gap < 1e-6
            else f"{text(first)} differs by up to {gap:.3g} from the rewards that the run logged."
        )
    how = (
        "<p>A replay shows how another reward would have ranked the same responses. It cannot show "
        "what a policy trained under that reward would have answered. A tau near 1 with fewer "
        "groups without gradient is a cheap improvement; a low tau or many flips train something "
        "else.</p>"
    )
    return section(
        "Verdict",
        f'<div class="verdict"><ul>{"".join(lines)}</ul><p>{logged}</p></div>',
        details("How to read this page", how),
    )


def _table(
    corner: str,
    values: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, str]],
) -> str:
    """Return a table with a row per reward, and the meaning of each column."""
    rows = [
        [text(name), *(f"{v[key]:.3f}" if key in v else DASH for key in columns)]
        for name, v in values.items()
    ]
    meanings = "".join(f"<li><b>{name}</b>: {words}</li>" for name, words in columns.values())
    scored = table([corner, *(name for name, _ in columns.values())], rows)
    return f'{scored}<ul class="meanings">{meanings}</ul>'


def _curves(result: Replay) -> str:
    shown = [Series(n, result.steps, result.by_step[n]) for n in result.names[:COLOURS]]
    chart = line_chart(
        "Mean reward by step",
        shown,
        "The same rollouts under each reward. Each scale is the reward's own.",
        "Curves that move in opposite directions: the rewards disagree on what training improved.",
    )
    note = f"<small>{how_drawn(len(result.steps), bands=False)}</small>"
    return f'{note}<div class="grid-of charts">{chart}</div>'


def _moved(name: str, moved: Sequence[Moved], frames: RolloutFrames, first: str) -> str:
    cards = [_card(one, frames, first, name) for one in moved]
    rest = cards[_SHOWN:]
    more = details(f"{len(rest)} more responses", _grid(rest)) if rest else ""
    return section(
        f"Largest changes under {text(name)}",
        '<p class="soft">Responses whose advantage changes most: read whether the new reward is '
        "right about them.</p>",
        marks_legend(("truth", "box", "point")),
        _grid(cards[:_SHOWN]),
        more,
    )


def _grid(cards: Sequence[str]) -> str:
    return f'<div class="grid-of">{"".join(cards)}</div>'


def _card(moved: Moved, frames: RolloutFrames, first: str, other: str) -> str:
    rollout = as_rollout(moved.row | {"reward": moved.rewards[first]})
    lines = "".join(
        f"<small><b>{text(name)}</b>: reward {moved.rewards[name]:.2f}, advantage "
        f"{moved.advantages[name]:+.2f}{_reasons(moved.reasons[name])}</small>"
        for name in (first, other)
    )
    words = details(
        "Prompt and response",
        f"<pre>{text(rollout.prompt)}</pre><pre>{text(rollout.response)}</pre>",
    )
    return (
        f"<figure>{_drawn(rollout, frames)}<figcaption>Step {moved.step}: advantage changes by "
        f"{moved.change:.2f}</figcaption>{lines}{words}</figure>"
    )


def _reasons(reasons: Sequence[str]) -> str:
    return f"; lost points: {text(', '.join(reasons), 400)}" if reasons else ""


def _drawn(rollout: Rollout, frames: RolloutFrames) -> str:
    """Return the frame with the true and the predicted boxes and points as HTML."""
    path, side = frames.path(rollout.index), frames.canvas
    if path is None or side <= 0:
        return missing("the frame of this row (not in the run's shards)")
    kind = "png" if path.suffix == ".png" else "jpeg"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    overlay = Overlay(side, side)
    true, predicted = rollout.true_objects[:_MOST_BOXES], rollout.predicted_objects[:_MOST_BOXES]
    overlay.boxes([box for box, _ in true], TRUTH, "truth", dashed=True)
    overlay.boxes([box for box, _ in predicted], BOX, "box")
    overlay.points([point for _, point in true if point is not None], TRUTH, "truth")
    overlay.points([point for _, point in predicted if point is not None], POINT, "point")
    alt = f"Frame with {len(true)} true and {len(predicted)} predicted boxes"
    return overlay.html(f"data:image/{kind};base64,{data}", alt)
