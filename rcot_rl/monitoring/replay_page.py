"""The replay's HTML page: tables, curves, and the responses that moved most on their frames.

Responses are foreign text and pass through `page.text`; frames are embedded, boxes and points are
vector graphics. A frame that cannot be found is said in its place.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rcot_rl.monitoring import page
from rcot_rl.monitoring.curves import COLOURS, Series, line_chart
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response

if TYPE_CHECKING:
    from rcot_rl.monitoring.reward_replay import Moved, Replay

TOTALS = {
    "mean": "mean",
    "std": "spread",
    "group_std": "spread in groups",
    "zero_variance": "groups without variance",
    "advantage": "mean |advantage|",
}
AGAINST = {
    "kendall_tau": "Kendall tau in groups",
    "sign_flips": "advantages that change sign",
    "other_best": "groups with another best",
}


def replay_page(run: Path, found: Replay) -> str:
    """One self-contained page of a replay."""
    frames = _Frames(run, found.stage)
    head = (
        f"<h1>Rewards compared on {page.text(found.stage)}</h1><p>{found.n_responses} responses in "
        f"{found.n_groups} groups of {page.text(run)}, scored again; nothing was trained.</p>"
    )
    parts = [head, page.section("The rewards", _table(found.totals, TOTALS))]
    first = page.text(found.names[0])
    if found.against_first:
        parts.append(page.section(f"Against {first}", _table(found.against_first, AGAINST)))
    if found.names[0] in found.dumped:
        gap = found.dumped[found.names[0]]
        parts.append(f"<p>Largest difference of {first} from what the run noted: {gap:.3g}.</p>")
    shown = [Series(n, found.steps, found.by_step[n]) for n in found.names[:COLOURS]]
    chart = line_chart("Mean reward of each step", shown)
    parts.append(f'<section><div class="grid-of">{chart}</div></section>')
    legend = '<span class="key s2">the truth</span> <span class="key s1">the response</span>'
    for name, moved in found.moved.items():
        cards = "".join(_card(one, frames, found.names[0], name) for one in moved)
        parts.append(
            page.section(
                f"Moved most under {page.text(name)}",
                f'<p class="keys">{legend}</p><div class="grid-of">{cards}</div>',
            )
        )
    return page.page("Rewards compared", "".join(parts))


def _table(values: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
    rows = [
        [page.text(name), *(f"{v[key]:.3f}" if key in v else "–" for key in columns)]
        for name, v in values.items()
    ]
    return page.table(["", *columns.values()], rows)


def _card(moved: Moved, frames: _Frames, first: str, other: str) -> str:
    row = moved.row
    lines = [
        f"<b>{page.text(name)}</b>: reward {moved.rewards[name]:.3f}, "
        f"advantage {moved.advantages[name]:+.2f} "
        f"<small>{page.text(', '.join(moved.reasons[name]))}</small>"
        for name in (first, other)
    ]
    said = page.details("response", f"<pre>{page.text(row['response'])}</pre>")
    asked = page.details("prompt", f"<pre>{page.text(row.get('prompt', ''))}</pre>")
    return (
        f"<figure>{frames.drawn(row)}<figcaption>step {moved.step}<br>{'<br>'.join(lines)}"
        f"</figcaption>{asked}{said}</figure>"
    )


class _Frames:
    """The frames of a stage's rows, found in the run's shards."""

    def __init__(self, run: Path, stage: str) -> None:
        self._media: dict[Any, str] = {}
        self._folder, self._canvas = run, 0
        try:
            recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recipe"]
            self._canvas = int(recipe["canvas"]["image"])
            self._folder = run / "shards" / recipe[stage.replace("-", "_")]["shard_set"]
            self._read()
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
            self._media = {}  # the page then says for each frame that it is missing

    def _read(self) -> None:
        import pyarrow.parquet as pq

        for file in sorted(self._folder.glob("train-*.parquet")):
            for row in pq.read_table(file, columns=["extra_info"]).to_pylist():
                info = row["extra_info"]
                self._media[info["index"]] = info["media"]

    def drawn(self, row: dict[str, Any]) -> str:
        """The row's frame with true and predicted boxes and points, as HTML."""
        path = self._folder / self._media.get(row.get("index"), "")
        if not path.is_file():
            return page.missing("the frame of this row, in the run's shards")
        kind = "png" if path.suffix == ".png" else "jpeg"
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        side = self._canvas
        shapes = _shapes(_truth(row.get("ground_truth")), "s2", side)
        said = parse_grounding(parse_response(str(row["response"])).answer)
        shapes += _shapes([(i.box, i.point) for i in said.items], "s1", side)
        return (
            f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="frame">'
            f'<image href="data:image/{kind};base64,{data}" width="{side}" height="{side}"/>'
            f"{shapes}</svg>"
        )


def _truth(value: Any) -> list[tuple[Any, Any]]:
    try:
        entries = json.loads(value) if isinstance(value, str) else value
        return [(entry["bbox_2d"], entry.get("point_2d")) for entry in entries]
    except (ValueError, TypeError, KeyError):
        return []  # an option, not objects


def _shapes(objects: list[tuple[Any, Any]], colour: str, side: int) -> str:
    drawn, width = [], side / 120
    for box, point in objects:
        if box is not None:
            x1, y1, x2, y2 = (min(max(float(v), -side), 2 * side) for v in box)
            drawn.append(
                f'<path class="{colour}" fill="none" stroke-width="{width:.2f}" '
                f'd="M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z"/>'
            )
        if point is not None:
            x, y = (min(max(float(v), -side), 2 * side) for v in point)
            drawn.append(
                f'<circle class="{colour} dot" cx="{x:.1f}" cy="{y:.1f}" r="{2 * width:.2f}"/>'
            )
    return "".join(drawn)
