"""HTML page of a reward replay: tables, curves, and the responses whose advantage changed most."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rcot_rl.monitoring import page
from rcot_rl.monitoring.curves import COLOURS, Series, line_chart
from rcot_rl.monitoring.figures import DASH
from rcot_rl.monitoring.page import LIGHT
from rcot_rl.monitoring.svg_overlay import Overlay
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response

if TYPE_CHECKING:
    from rcot_rl.monitoring.reward_replay import Moved, Replay

_TOTALS = {
    "mean": "mean",
    "std": "std",
    "group_std": "std within groups",
    "zero_variance": "groups without variance",
    "advantage": "mean |advantage|",
}
_AGAINST = {
    "kendall_tau": "Kendall’s tau within groups",
    "sign_flips": "advantages that change sign",
    "other_best": "groups with a different best response",
}


def replay_page(run: Path, result: Replay) -> str:
    """Return the self-contained page of a replay."""
    frames = _Frames(run, result.stage)
    head = (
        f"<h1>Rewards compared on {page.text(result.stage)}</h1><p>{result.n_responses} responses "
        f"in {result.n_groups} groups of {page.text(run)}, rescored without training.</p>"
    )
    parts = [head, page.section("Rewards", _table(result.totals, _TOTALS))]
    first = page.text(result.names[0])
    if result.against_first:
        parts.append(page.section(f"Compared with {first}", _table(result.against_first, _AGAINST)))
    if result.names[0] in result.dumped:
        gap = result.dumped[result.names[0]]
        parts.append(
            f"<p>Largest difference between {first} and the rewards that the run logged: "
            f"{gap:.3g}.</p>"
        )
    shown = [Series(n, result.steps, result.by_step[n]) for n in result.names[:COLOURS]]
    chart = line_chart("mean reward", shown)
    parts.append(f'<section><div class="grid-of">{chart}</div></section>')
    legend = (
        '<span class="key" style="--key: var(--s2)">ground truth</span> '
        '<span class="key" style="--key: var(--s1)">response</span>'
    )
    for name, moved in result.moved.items():
        cards = "".join(_card(one, frames, result.names[0], name) for one in moved)
        parts.append(
            page.section(
                f"Largest changes of advantage under {page.text(name)}",
                f'<p class="keys">{legend}</p><div class="grid-of">{cards}</div>',
            )
        )
    return page.page("Rewards compared", "".join(parts))


def _table(values: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
    rows = [
        [page.text(name), *(f"{v[key]:.3f}" if key in v else DASH for key in columns)]
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
    response = page.details("response", f"<pre>{page.text(row['response'])}</pre>")
    prompt = page.details("prompt", f"<pre>{page.text(row.get('prompt', ''))}</pre>")
    return (
        f"<figure>{frames.drawn(row)}<figcaption>step {moved.step}<br>{'<br>'.join(lines)}"
        f"</figcaption>{prompt}{response}</figure>"
    )


class _Frames:
    """Frames of a stage's training rows, from the run's shards."""

    def __init__(self, run: Path, stage: str) -> None:
        self._media: dict[Any, str] = {}
        self._folder, self._canvas = run, 0
        try:
            recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recipe"]
            self._canvas = int(recipe["canvas"]["image"])
            self._folder = run / "shards" / recipe["train"][stage]["shard_set"]
            self._read()
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
            self._media = {}  # each frame is then shown as missing

    def _read(self) -> None:
        import pyarrow.parquet as pq

        for file in sorted(self._folder.glob("train-*.parquet")):
            for row in pq.read_table(file, columns=["extra_info"]).to_pylist():
                info = row["extra_info"]
                self._media[info["index"]] = info["media"]

    def drawn(self, row: dict[str, Any]) -> str:
        """Return the row's frame with true and predicted boxes and points as HTML."""
        path = self._folder / self._media.get(row.get("index"), "")
        if not path.is_file():
            return page.missing("the frame of this row (not in the run's shards)")
        kind = "png" if path.suffix == ".png" else "jpeg"
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        response = parse_grounding(parse_response(str(row["response"])).answer)
        overlay = Overlay(self._canvas, self._canvas)
        for objects, colour in (
            (_truth(row.get("ground_truth")), LIGHT["s2"]),
            ([(item.box, item.point) for item in response.items], LIGHT["s1"]),
        ):
            overlay.boxes([box for box, _ in objects if box is not None], colour)
            overlay.points([point for _, point in objects if point is not None], colour)
        alt = "Frame with the boxes and points of the ground truth and of the response"
        return overlay.html(f"data:image/{kind};base64,{data}", alt)


def _truth(value: Any) -> list[tuple[Any, Any]]:
    """Return box and point of each true object; empty if the ground truth is an option."""
    try:
        entries = json.loads(value) if isinstance(value, str) else value
        return [(entry["bbox_2d"], entry.get("point_2d")) for entry in entries]
    except (ValueError, TypeError, KeyError):
        return []
