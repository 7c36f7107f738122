"""`data.store`: which runs share corpora, texts and shards, and how they are linked."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import is_execution_only
from rcot_rl.stages.data_stage import corpus_root
from rcot_rl.stages.data_store import shared_data, store_folders


def of(store: Path, *overrides: str) -> Recipe:
    return load_recipe("laptop", ["data.seed=1", f"data.store={store}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["seed=2"], {"corpora", "texts", "shards"}),
        (
            ["eval.heldout_prompts=3", "name=other", "data.workers=1"],
            {"corpora", "texts", "shards"},
        ),
        (["predict.variants={none: {rounds: 0}}"], {"corpora", "texts", "shards"}),
        (["data.seed=2"], {"corpora"}),
        (["data.response=answer"], {"corpora"}),
        (["train.grpo-ktg.reward=ktg-soft"], {"corpora"}),
        (["models.policy=elsewhere"], {"corpora"}),
        (["toy.seed=2"], set()),
    ],
)
def test_runs_share_what_their_settings_make_equal(
    tmp_path: Path, overrides: list[str], shared: set[str]
) -> None:
    one, other = (store_folders(of(tmp_path, *o), tmp_path) for o in ([], overrides))
    assert {name for name in one if one[name] == other[name]} == shared


def test_without_a_seed_of_the_data_each_seed_has_its_own_rows(tmp_path: Path) -> None:
    one, other = (
        store_folders(load_recipe("laptop", [f"seed={seed}"]), tmp_path) for seed in (1, 2)
    )
    assert one["shards"] != other["shards"] and one["corpora"] == other["corpora"]


def test_runs_see_the_same_files_and_the_folder_can_be_moved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("a", "b"):
        (out / name).mkdir(parents=True)
        with shared_data(of(out / "data", f"seed={len(name)}"), out / name):
            (out / name / "shards" / name).write_text("rows")
    assert {p.name for p in (out / "a" / "shards").iterdir()} == {"a", "b"}
    with shared_data(of(out / "data"), out / "a"):  # a second attempt finds its links
        pass
    moved = out.rename(tmp_path / "moved")
    assert (moved / "b" / "shards" / "a").read_text() == "rows"


def test_corpora_have_one_name_for_all_runs(tmp_path: Path) -> None:
    """The name is part of a shard set's fingerprint: another one would build the set again."""
    from rcot_rl.runfolder import RunFolder

    roots = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipe = of(tmp_path / "data")
        with shared_data(recipe, tmp_path / name):
            roots.add(corpus_root(RunFolder(tmp_path / name), recipe, "mevis", None))
    assert len(roots) == 1


def test_a_run_with_data_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "shards").mkdir(parents=True)
    with (
        pytest.raises(InputError, match=r"run/shards: exists, and data\.store"),
        shared_data(of(tmp_path / "data"), tmp_path / "run"),
    ):
        pass


def test_two_runs_do_not_build_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    second = threading.Event()

    def other() -> None:
        with shared_data(of(tmp_path / "data"), tmp_path / "b"):
            second.set()

    with shared_data(of(tmp_path / "data"), tmp_path / "a"):
        thread = threading.Thread(target=other)
        thread.start()
        assert not second.wait(0.5)
    thread.join(10)
    assert second.is_set()


def test_without_a_store_nothing_is_linked(tmp_path: Path) -> None:
    with shared_data(load_recipe("laptop", []), tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    assert is_execution_only("data.store")
