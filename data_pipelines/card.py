"""Write the data card of a shard set: README.md with its pictures.

`card/samples.png` shows rows with their boxes and points; `card/lengths.svg` is a histogram of the
rows' token counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.verify.show import contact_sheet, read_shown

SAMPLES = 8
"""Rows in `card/samples.png`."""


def write_card(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Write README.md and its pictures into the set's folder."""
    pictures = []
    shards = sorted(folder.glob("train-*.parquet")) or sorted(folder.glob("val-*.parquet"))
    (folder / "card").mkdir(exist_ok=True)
    samples = folder / "card" / "samples.png"
    shown = read_shown(shards[0], limit=SAMPLES, varied=True)
    samples.write_bytes(contact_sheet(shown, columns=4, side=280))
    pictures.append(samples)
    if manifest["tokens"]:
        lengths = folder / "card" / "lengths.svg"
        lengths.write_text(_lengths_svg(manifest["tokens"]), encoding="utf-8")
        pictures.append(lengths)
    card = folder / "README.md"
    card.write_text(data_card(manifest), encoding="utf-8")
    return [*pictures, card]


def data_card(manifest: Mapping[str, Any]) -> str:
    """Return the card; its YAML header lets `datasets` find the parquet files among the media."""
    splits = [split for split, n in manifest["rows"].items() if n]
    head = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        head += [f"  - split: {split}"]
        head += [f'    path: "{split}-*.parquet"']
    data = manifest["recipe"]["data"]
    canvas = manifest["recipe"]["canvas"]
    body = [
        "---",
        "",
        f"# {manifest['name']}",
        "",
        "Rows for verl, made by `rcot data build` from video object segmentation corpora: "
        "is this frame a keyframe of the sentence (`aks`), and where are its targets (`ktg`). "
        f"Boxes and points are pixels of the {canvas} × {canvas} canvas.",
        "",
        "![Rows with their boxes, points and options](card/samples.png)",
        "",
        "```python",
        "import datasets",
        'rows = datasets.load_dataset("path/of/this/folder")   # and rows.push_to_hub("you/name")',
        "```",
        "",
        *_composition(manifest, splits),
        *_tokens(manifest["tokens"]),
        *_origin(data),
        *_traces(manifest["traces"]),
        *_dropped(manifest["dropped"]),
        "## Recipe",
        "",
        f"Hash `{manifest['recipe_hash']}`, seed {manifest['recipe']['seed']}, "
        f"prompts `{manifest['recipe']['prompts']}`.",
        "",
        "```json",
        json.dumps(data, indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(head + body)


def _composition(manifest: Mapping[str, Any], splits: list[str]) -> list[str]:
    kinds = sorted({kind for split in splits for kind in manifest["counts"][split]})
    lines = ["## Composition", "", f"| rows | {' | '.join(splits)} |"]
    lines.append("| --- |" + " ---: |" * len(splits))
    lines.append("| all | " + " | ".join(str(manifest["rows"][s]) for s in splits) + " |")
    for kind in kinds:
        cells = (str(manifest["counts"][s].get(kind, 0)) for s in splits)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return [*lines, ""]


def _tokens(tokens: Mapping[str, Any] | None) -> list[str]:
    if not tokens:
        return ["## Lengths", "", "Not counted: the policy was not on the building host.", ""]
    lines = ["## Lengths", "", "In the policy's tokens, by its own processor's rules.", ""]
    lines += ["| split | tokens | least | mean | most | limit | over |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for split, names in tokens["splits"].items():
        for name, spread in names.items():
            limit = tokens["limits"].get(name, "")
            over = sum(r.startswith(f"{split}:") for r in tokens["over"].get(name, ()))
            lines.append(
                f"| {split} | {name} | {spread['least']} | {spread['mean']} | {spread['most']} | "
                f"{limit} | {over if limit else ''} |"
            )
    return [*lines, "", "![Histogram of lengths](card/lengths.svg)", ""]


def _origin(data: Mapping[str, Any]) -> list[str]:
    lines = ["## Corpora", "", "| dataset | split | weight |", "| --- | --- | --- |"]
    for c in data["corpora"]:
        weight = "as available" if c["weight"] is None else c["weight"]
        lines.append(f"| {c['dataset']} | {c['split']} | {weight} |")
    if data["keyframe"] != "largest":
        sentence = (
            "Frames are drawn from all in which every target is visible, not the one of "
            "largest area: these rows are not the paper's."
        )
        lines += ["", sentence]
    described = "templates" if data["describe"] == "template" else "a file"
    traced = "templates" if data["trace"] == "template" else "a file"
    texts = f"Descriptions come from {described}, traces from {traced}."
    if data["response"] == "answer":
        texts = (
            f"Descriptions come from {described}. There is no reasoning: prompts ask only for the "
            "answer, and responses of SFT rows are exactly one `<answer>` block."
        )
    return [*lines, "", texts, ""]


def _traces(traces: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not traces:
        return []
    sentence = (
        "Responses that the tracing model was asked for, over all tries. A "
        "response can be refused for several causes."
    )
    lines = ["## Traces", "", sentence, ""]
    tasks = list(traces)
    kinds = sorted({kind for counts in traces.values() for kind in counts})
    lines += [f"| responses | {' | '.join(tasks)} |", "| --- |" + " ---: |" * len(tasks)]
    for kind in ["responses", "accepted", *(k for k in kinds if k.startswith("refused/"))]:
        lines.append(f"| {kind} | {' | '.join(str(traces[t].get(kind, 0)) for t in tasks)} |")
    rates = []
    for task in tasks:
        responses = traces[task]["responses"]
        rates.append(f"{100 * traces[task].get('accepted', 0) / responses:.1f} %")
    lines.append(f"| acceptance | {' | '.join(rates)} |")
    given_up = " | ".join(str(traces[t].get("given_up", 0)) for t in tasks)
    return [*lines, f"| instances given up and replaced | {given_up} |", ""]


def _dropped(dropped: Mapping[str, Any]) -> list[str]:
    lines = ["## Left out", "", "| cause | count |", "| --- | ---: |"]
    causes = {**dropped["expressions"], **dropped["defects_by_reason"]}
    lines += [f"| {cause} | {count} |" for cause, count in sorted(causes.items())]
    if not causes:
        lines = ["## Left out", "", "Nothing."]
    by_source = dropped.get("defects_by_source") or {}
    if by_source:
        lines += ["", "| source | defects |", "| --- | ---: |"]
        lines += [f"| {source} | {count} |" for source, count in sorted(by_source.items())]
    return [*lines, ""]


def _lengths_svg(tokens: Mapping[str, Any]) -> str:
    """Return histograms of the prompt and total tokens of the training rows, side by side."""
    names = tokens["splits"].get("train") or next(iter(tokens["splits"].values()))
    width, height, gap = 320, 150, 30
    parts = []
    for column, name in enumerate(("prompt_tokens", "total_tokens")):
        bins = names[name]["histogram"]
        highest = max(n for _, _, n in bins) or 1
        left = column * (width + gap) + 10
        step = width / len(bins)
        for number, (low, high, n) in enumerate(bins):
            tall = height * n / highest
            parts.append(
                f'<rect x="{left + number * step:.1f}" y="{20 + height - tall:.1f}" '
                f'width="{step - 2:.1f}" height="{tall:.1f}" fill="#4a7ebb">'
                f"<title>{low} to {high}: {n}</title></rect>"
            )
        ends = f"{bins[0][0]} to {names[name]['most']} {name.replace('_', ' ')}"
        parts.append(f'<text x="{left}" y="{height + 38}">{ends}, at most {highest} a bar</text>')
    total_width = 2 * width + gap + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {height + 50}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )
