"""Pictures of rows: boxes, points, option and prompt (`rcot data show`)."""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from data_pipelines.verify.check_rows import UNREADABLE, check_truth
from rcot_rl.errors import InputError

_COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#bf5af2", "#64d2ff")
_INK, _PAPER = "#1c1c1e", "#ffffff"
_CAPTION = 64
"""Height of the caption under a picture, in pixels."""


@dataclass(frozen=True)
class Shown:
    """A row, decoded for display."""

    number: int
    """Row in its file."""
    image: Image.Image
    truth: str | list[dict[str, list[int]]]
    """The option, or boxes and points in pixels of the image."""
    info: Mapping[str, Any]
    prompt: str
    response: str | None

    @property
    def title(self) -> str:
        """Return the task, the answer and the row's source."""
        answer = self.truth if isinstance(self.truth, str) else f"{len(self.truth)} targets"
        place = f"{self.info['dataset']} {self.info['video']} {self.info['frame']}"
        return f"{self.number}: {self.info['task']} {answer} · {place}"


def read_shown(
    shard: Path, rows: Sequence[int] | None = None, limit: int = 12, varied: bool = False
) -> list[Shown]:
    """Read rows of a parquet shard: those of `rows`, or `limit` of them. Raises InputError.

    Args:
        varied: Take rows of all kinds (task, option, number of targets) in turn, instead of the
            first ones.
    """
    try:
        file = pq.ParquetFile(shard)
    except FileNotFoundError as error:
        raise InputError("no such file", file=shard) from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"not a readable parquet file: {error}", file=shard) from error
    with file:
        total = file.metadata.num_rows
        outside = next((r for r in rows or () if not 0 <= r < total), None)
        if outside is not None:
            raise InputError(f"no row {outside}; it has {total} rows", file=shard, key="--row")
        try:
            if rows is None:
                rows = _varied(file, limit) if varied else range(min(limit, total))
            numbered = _read(file, sorted(rows))
        except UNREADABLE as error:
            raise InputError(f"cannot be read: {error}", file=shard) from error
    return [_shown(shard, number, row) for number, row in numbered]


def _read(file: pq.ParquetFile, wanted: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    start, left = 0, list(wanted)
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        in_group = [r for r in left if r < end]
        if in_group:
            table = file.read_row_group(group).take([r - start for r in in_group])
            rows += list(zip(in_group, table.to_pylist(), strict=True))
            left = left[len(in_group) :]
        start = end
    return rows


def _varied(file: pq.ParquetFile, limit: int) -> list[int]:
    try:
        table = file.read(columns=["extra_info", "reward_model"])
        kinds: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(table.to_pylist()):
            info = row["extra_info"]
            option = row["reward_model"]["ground_truth"] if info["task"] == "aks" else ""
            kind = (str(info["task"]), str(option), str(info["target"]))
            kinds.setdefault(kind, []).append(number)
    except (KeyError, TypeError, pa.ArrowException):  # not a row of this project; reported later
        return list(range(min(limit, file.metadata.num_rows)))
    queues = [kinds[key] for key in sorted(kinds)]
    out: list[int] = []
    for turn in range(limit):
        out += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(out[:limit])


def _shown(shard: Path, number: int, row: Mapping[str, Any]) -> Shown:
    try:
        image, info = row["images"][0], row["extra_info"]
        beside = shard.parent / str(info["media"])  # the stored path is that of the build
        data = (
            image.get("bytes")
            or (beside if beside.is_file() else Path(image["image"])).read_bytes()
        )
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as opened:
            picture = opened.convert("RGB")
        truth = json.loads(row["reward_model"]["ground_truth"])
        fault = next(check_truth(truth, info), None)
        if fault is not None:
            raise ValueError(": ".join(fault))
        turns = row.get("messages") or []
        response = turns[1]["content"] if len(turns) > 1 else None
        prompt = row["prompt"][0]["content"]
        if not isinstance(prompt, str) or not isinstance(info["expression"], str):
            raise ValueError("no prompt or no expression")
        return Shown(number, picture, truth, info, prompt, response)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"not a row of this project: {error!r}", file=shard, line=number
        ) from error


def drawn(shown: Shown, side: int) -> Image.Image:
    """Draw the row's image at `side` pixels with its boxes and points."""
    picture = shown.image.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    draw = ImageDraw.Draw(picture)
    scale = side / shown.image.width
    if isinstance(shown.truth, str):
        draw.rectangle((4, 4, 26, 26), fill=_PAPER, outline=_INK)
        draw.text((11, 8), shown.truth, fill=_INK)
        return picture
    for number, item in enumerate(shown.truth):
        colour = _COLOURS[number % len(_COLOURS)]
        x1, y1, x2, y2 = (v * scale for v in item["bbox_2d"])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        x, y = (v * scale for v in item["point_2d"])
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline=_PAPER)
    return picture


def contact_sheet(rows: Sequence[Shown], columns: int = 4, side: int = 320) -> bytes:
    """Return a PNG of all rows with captions."""
    columns = max(1, min(columns, len(rows)))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, lines * (side + _CAPTION) + 8), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        x = 8 + number % columns * (side + 8)
        y = 8 + number // columns * (side + _CAPTION)
        sheet.paste(drawn(row, side), (x, y))
        caption = [row.title, *textwrap.wrap(row.info["expression"], max(12, side // 7))[:2]]
        for at, text in enumerate(caption):
            draw.text((x, y + side + 3 + 15 * at), _fitting(draw, text, side), fill=_INK)
    out = io.BytesIO()
    # this zlib level takes a fifth of the default's time, for a tenth more bytes
    sheet.save(out, "PNG", compress_level=2)
    return out.getvalue()


def page(rows: Sequence[Shown], title: str, side: int = 420) -> str:
    """Return a self-contained HTML page with full prompts and responses."""
    cells = []
    for row in rows:
        out = io.BytesIO()
        drawn(row, side).save(out, "PNG")
        data = base64.b64encode(out.getvalue()).decode("ascii")
        facts = {k: v for k, v in row.info.items() if k not in ("description", "clip")}
        texts = [("prompt", row.prompt), ("response", row.response or ""), ("row", _pretty(facts))]
        details = "".join(
            f"<h4>{name}</h4><pre>{html.escape(text)}</pre>" for name, text in texts if text
        )
        cells.append(
            f"<article><img src='data:image/png;base64,{data}' alt=''>"
            f"<div><h3>{html.escape(row.title)}</h3><p>{html.escape(row.info['expression'])}</p>"
            f"{details}</div></article>"
        )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>"
        "body{font:14px system-ui;margin:2em auto;max-width:1100px}article{display:flex;gap:1.5em;"
        "margin:1.5em 0;border-top:1px solid #ddd;padding-top:1.5em}img{align-self:flex-start}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;margin:.2em 0}"
        "h3,h4{margin:.4em 0}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(cells)}"
    )


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
