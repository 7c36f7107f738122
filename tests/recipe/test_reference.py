"""`rcot recipe`: what is shown resolves to the same recipe, and every key is described."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import RECIPES, load_recipe, resolve_recipe
from rcot_rl.recipe.reference import keys_page, recipe_keys, show
from rcot_rl.recipe.schema import Recipe

NAMES = sorted(p.stem for p in RECIPES.folder.glob("*.yaml"))
ABLATIONS = sorted(str(p) for p in (RECIPES.folder / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("name", [*NAMES, *ABLATIONS], ids=lambda name: Path(name).stem)
def test_a_shown_recipe_resolves_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe, source = resolve_recipe(name, ["grpo.n=4"])
    file = tmp_path / "shown.yaml"
    file.write_text(show(recipe, source))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("name", [*NAMES, *ABLATIONS], ids=lambda name: Path(name).stem)
def test_the_line_of_each_origin_holds_the_key(name: str) -> None:
    recipe, source = resolve_recipe(name)
    checked = 0
    for row in show(recipe, source).splitlines():
        text, _, origin = row.rpartition("  # ")
        file, _, line = origin.rpartition(":")
        if not file.endswith(".yaml"):
            continue
        source_line = Path(file).read_text().splitlines()[int(line) - 1]
        key = text.strip().removeprefix("- ").partition(":")[0].strip("{")
        assert key in source_line, row
        checked += 1
    assert checked > 40


def test_overrides_and_defaults_are_told_apart() -> None:
    recipe, source = resolve_recipe("laptop", ["grpo.n=4", "train.grpo-ktg.steps=3"])
    rows = [row for row in show(recipe, source).splitlines() if row.endswith("# command line")]
    assert [row.split("#")[0].strip() for row in rows] == ["n: 4", "steps: 3", "n: 4"]
    assert "  verl: {}" in show(recipe, source) and "# default" in show(recipe, source)


def leaves(node: dict, prefix: str = "") -> list[str]:
    """Return the dotted keys of a mapping's leaves."""
    out = []
    for name, child in node.items():
        key = f"{prefix}{name}"
        out += leaves(child, f"{key}.") if isinstance(child, dict) and child else [key]
    return out


def test_every_key_of_a_resolved_recipe_is_listed() -> None:
    known = {doc.key for doc in recipe_keys()}
    tree = load_recipe("laptop").model_dump(mode="json")
    tree["data"].pop("sets")
    kinds = {stage["kind"]: stage for stage in tree["train"].values()}
    tree["train"] = {f"<{kind}>": stage for kind, stage in kinds.items()}
    missing = [key for key in leaves(tree) if key not in known]
    assert missing == []
    assert {
        "data.sets.<name>.aks",
        "data.corpora[].root",
        "train.<grpo>.n",
        "launch.health.wait_s",
    } <= known


def test_a_listed_default_is_that_of_the_schema() -> None:
    """A default, parsed as YAML, is the value of a recipe that does not set the key."""
    given = {"name": "x", "data": {"corpora": [{"dataset": "mevis"}]}}
    stage = {"shard_set": "grpo-aks-4k", "reward": "aks", "steps": 1}
    given["train"] = {"<sft>": {"kind": "sft"}, "<grpo>": {"kind": "grpo", **stage}}
    tree = Recipe.model_validate(given).model_dump(mode="json")
    compared = 0
    for doc in recipe_keys():
        if doc.default in ("required", "see meaning") or doc.type.startswith(
            ("mapping", "list of mapping")
        ):
            continue
        node, parts = tree, doc.key.split(".")
        while parts and isinstance(node, dict) and parts[0] in node:
            node = node[parts.pop(0)]
        if not parts:
            assert yaml.safe_load(doc.default) == node, doc.key
            compared += 1
    assert compared > 100


def test_a_prefix_selects_and_an_unknown_one_is_refused() -> None:
    assert {doc.key.split(".")[0] for doc in recipe_keys("train.grpo")} == {"train"}
    assert [doc.key for doc in recipe_keys("seed")] == ["seed"]
    with pytest.raises(InputError, match="no such key"):
        recipe_keys("nonsense")


def test_the_documentation_has_the_generated_reference() -> None:
    """`make docs` rewrites it."""
    assert (RECIPES.folder.parent / "docs" / "recipe-keys.md").read_text() == keys_page()


def test_recipe_commands_print_keys_values_and_faults(
    run_rcot: Callable[..., CompletedProcess[str]],
) -> None:
    keys = json.loads(run_rcot("recipe", "keys", "predict.rounds", "--json").stdout)
    assert [k["key"] for k in keys] == ["predict.rounds"] and keys[0]["default"] == "5"
    shown = run_rcot("recipe", "show", "laptop", "seed=7")
    assert "seed: 7" in shown.stdout and "command line" in shown.stdout
    assert run_rcot("recipe", "show", "laptop", "sed=7").returncode == 2
    refused = run_rcot("train", "laptop", "--stage", "data")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
