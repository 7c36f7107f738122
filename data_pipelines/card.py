"""README.md of a shard set: what it holds, how it was made, how to load it.

Leaves out pictures and lengths in tokens, which need the model's processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def data_card(manifest: Mapping[str, Any]) -> str:
    """The card, from the manifest's figures. Its head lets `datasets.load_dataset(folder)` find
    the parquet files among the media."""
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
        *_composition(manifest, splits),
        *_origin(data),
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


def _origin(data: Mapping[str, Any]) -> list[str]:
    lines = ["## Corpora", "", "| dataset | split | weight |", "| --- | --- | --- |"]
    for c in data["corpora"]:
        weight = "as available" if c["weight"] is None else c["weight"]
        lines.append(f"| {c['dataset']} | {c['split']} | {weight} |")
    if data["keyframe"] != "largest":
        lines += ["", "Frames are drawn from all in which every target is visible, not the one of "
                  "largest area: these rows are not the paper's."]  # fmt: skip
    described = "templates" if data["describe"] == "template" else "a file"
    traced = "templates" if data["trace"] == "template" else "a file"
    return [*lines, "", f"Descriptions come from {described}, traces from {traced}.", ""]


def _dropped(dropped: Mapping[str, Any]) -> list[str]:
    lines = ["## Left out", "", "| cause | count |", "| --- | ---: |"]
    causes = {**dropped["expressions"], **dropped["defects_by_reason"]}
    lines += [f"| {cause} | {count} |" for cause, count in sorted(causes.items())]
    if not causes:
        lines = ["## Left out", "", "Nothing."]
    return [*lines, ""]
