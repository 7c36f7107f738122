"""The fully resolved verl configuration of every shipped recipe, held by files under golden/.

    RCOT_WRITE_GOLDEN=1 pytest tests/training/test_golden_configs.py    # after a wanted change

The 3B recipe's are held whole, key by key. Of any other recipe, what differs from the 3B recipe's
is held, which is what a reader wants to know of it, and with the 3B file fixes the rest.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rcot_rl.recipe.loader import RECIPES, load_recipe
from rcot_rl.training.verl_config import grpo_config, sft_config

GOLDEN = Path(__file__).parent / "golden"
BASE = "rcot_seg_3b"
STAGES = tuple(load_recipe(BASE).train)
OTHERS = sorted(p.stem for p in RECIPES.folder.glob("*.yaml") if p.stem != BASE)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; an empty mapping is a value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    rows: dict[str, Any] = {}
    for key, child in node.items():
        rows |= flat(child, f"{prefix}.{key}" if prefix else str(key))
    return rows


@functools.cache
def resolved(name: str, stage: str) -> dict[str, Any]:
    recipe = load_recipe(name)
    model, train, out = Path("/model"), [Path("/train.parquet")], Path("/out")
    if stage in recipe.sft_stages:
        config = sft_config(recipe, stage, model=model, train=train, val=[], out=out)
    else:
        config = grpo_config(recipe, stage, model=model, train=train, val=[], out=out)
    return flat(OmegaConf.to_container(config, resolve=True))


def counterpart(name: str, stage: str) -> str:
    """Return the 3B recipe's stage of that name, else its last of the same kind."""
    base, kind = load_recipe(BASE).train, load_recipe(name).train[stage].kind
    return stage if stage in base else [s for s in base if base[s].kind == kind][-1]


def held(file: Path, found: Any) -> Any:
    """What the golden file holds, after writing `found` to it when asked to."""
    if os.environ.get("RCOT_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_3b_recipe_resolves_to_its_golden_file(stage: str) -> None:
    found = resolved(BASE, stage)
    assert found == held(GOLDEN / f"{BASE}.{stage}.json", found)


@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_differ_from_the_3b_recipe_as_in_their_golden_file(name: str) -> None:
    found: dict[str, dict[str, list[Any]]] = {}
    for stage in load_recipe(name).train:
        base, mine = resolved(BASE, counterpart(name, stage)), resolved(name, stage)
        found[stage] = {
            key: [base.get(key, "absent"), mine.get(key, "absent")]
            for key in sorted(base.keys() | mine.keys())
            if base.get(key, "absent") != mine.get(key, "absent")
        }
    assert found == held(GOLDEN / f"{name}.differs.json", found)


def test_every_golden_file_belongs_to_a_recipe() -> None:
    expected = {f"{BASE}.{s}.json" for s in STAGES} | {f"{n}.differs.json" for n in OTHERS}
    assert {p.name for p in GOLDEN.iterdir()} == expected
