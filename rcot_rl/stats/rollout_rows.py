"""Rules that training and reports share about the rows of a step's rollouts."""

from __future__ import annotations

from typing import Any

NO_SPREAD = 1e-8
"""A group of rewards with a smaller standard deviation gives no gradient (eq. 14)."""


def last_turns(rows: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """Keep the row of each response's last `turn`, to which the reward belongs.

    Args:
        prompt: Key that identifies the prompt; a response is a prompt and a `sample`. Rows without
            `turn` or `sample` are all kept.
    """
    last: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        has_turns = "turn" in row and "sample" in row
        key = (row[prompt], row["sample"]) if has_turns else number
        if key not in last or row["turn"] >= last[key]["turn"]:
            last[key] = row
    return list(last.values())
