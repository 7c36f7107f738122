"""What a stage was made of: every part of it changes the hashes, and nothing else does."""

from __future__ import annotations

from pathlib import Path

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.provenance import provenance, reward_hashes, shard_hash


def shards(root: Path, text: str) -> Path:
    root.mkdir()
    (root / "manifest.json").write_text(text)
    return root


def test_each_part_changes_its_own_hash(tmp_path: Path) -> None:
    a, b = shards(tmp_path / "a", "{}"), shards(tmp_path / "b", "{ }")
    base = provenance(load_recipe("laptop"), "grpo-ktg", a)
    assert base == provenance(load_recipe("laptop"), "grpo-ktg", a)
    assert base["reward"] == "ktg" and len(base["reward_sha256"]) == 64
    other = provenance(
        load_recipe("laptop", ["train.grpo-ktg.reward=ktg-zero-target"]), "grpo-ktg", b
    )
    assert {k for k in base if base[k] != other[k]} == set(base) - {"stage"}


def test_sft_has_no_reward(tmp_path: Path) -> None:
    facts = provenance(load_recipe("laptop"), "sft", shards(tmp_path / "s", "{}"))
    assert set(facts) == {"stage", "recipe_sha256", "shards_sha256"}


def test_an_edited_reward_has_another_hash(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    recipe = load_recipe("laptop", [f"train.grpo-ktg.reward={file}:score"])
    hashes = []
    for value in (1.0, 2.0):
        file.write_text(f"def score(response, ground_truth):\n    return {value}\n")
        hashes.append(reward_hashes(recipe)["grpo-ktg"]["sha256"])
    assert hashes[0] != hashes[1]


def test_a_shard_sets_hash_is_that_of_its_manifest(tmp_path: Path) -> None:
    assert shard_hash(shards(tmp_path / "a", "1")) == shard_hash(shards(tmp_path / "b", "1"))
    assert shard_hash(tmp_path / "a") != shard_hash(shards(tmp_path / "c", "2"))
