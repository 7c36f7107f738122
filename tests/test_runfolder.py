"""A run's folder: whose it is, what is done, and that files are whole."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml

from cluster.preflight.at_start import check_folder
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe, recipe_hash
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder, versions, write_json


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("laptop")


def test_claiming_writes_the_recipe_with_what_it_ran_on(tmp_path: Path, recipe: Recipe) -> None:
    folder = RunFolder.claim(tmp_path / "deep" / "run", recipe)
    record = yaml.safe_load((folder.root / "recipe.yaml").read_text())
    assert Recipe.model_validate(record["recipe"]) == recipe
    assert record["recipe_hash"] == recipe_hash(recipe)
    assert record["versions"] == versions()
    assert record["versions"]["verl"] and record["python"].startswith("3.")
    assert [p.name for p in folder.root.iterdir()] == ["recipe.yaml"]


def test_claiming_again_changes_nothing(tmp_path: Path, recipe: Recipe) -> None:
    path = RunFolder.claim(tmp_path, recipe).root / "recipe.yaml"
    before = path.read_bytes()
    (tmp_path / "sft").mkdir()
    assert RunFolder.claim(tmp_path, load_recipe("laptop")).root == tmp_path
    assert path.read_bytes() == before


def test_another_recipes_run_is_refused_with_the_keys_that_differ(
    tmp_path: Path, recipe: Recipe
) -> None:
    RunFolder.claim(tmp_path, recipe).stage("data").mkdir()
    other = load_recipe("laptop", ["seed=2", "grpo_aks.steps=5", "toy.preset=rich"])
    with pytest.raises(InputError) as caught:
        RunFolder.claim(tmp_path, other)
    assert caught.value.file == str(tmp_path / "recipe.yaml")
    assert "(differs in: grpo_aks.steps, seed, toy.preset)" in caught.value.message
    RunFolder.claim(tmp_path, recipe)  # and it is still the first one's


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        RunFolder.claim(tmp_path, recipe)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_where_the_folder_should_be(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(InputError, match="cannot be written") as caught:
        RunFolder.claim(path, recipe)
    assert caught.value.file == str(path)
    assert path.read_text() == "mine"


def test_the_lock_is_exclusive_and_given_back(tmp_path: Path, recipe: Recipe) -> None:
    first, second = RunFolder.claim(tmp_path, recipe), RunFolder.claim(tmp_path, recipe)
    with first.locked(), pytest.raises(InputError, match="another command"), second.locked():
        pass
    with pytest.raises(RuntimeError), second.locked():
        raise RuntimeError
    with first.locked():
        pass


def test_a_locked_folder_can_be_claimed_again(tmp_path: Path, recipe: Recipe) -> None:
    folder = RunFolder.claim(tmp_path, recipe)
    with folder.locked():
        RunFolder.claim(tmp_path, recipe)


def test_attempts_are_numbered_onwards_and_not_as_text(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.new_attempt("sft").name for _ in range(3)] == [f"attempt-{k}" for k in (1, 2, 3)]
    (tmp_path / "sft" / "attempt-10").mkdir()
    assert folder.new_attempt("sft").name == "attempt-11"  # as text, 3 comes after 10
    assert folder.new_attempt("eval").name == "attempt-1"
    assert all(p.is_dir() for p in (tmp_path / "sft").iterdir())


def test_done_is_what_was_marked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_done("sft")
    folder.mark_done("sft", minutes=1.5)
    assert folder.is_done("sft") and not folder.is_done("data")
    assert folder.done("sft")["minutes"] == 1.5
    assert folder.done("sft")["finished"] > 0


def test_json_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["facts.json"]


def test_readers_never_see_half_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    values = [{"k": [i] * 5000} for i in range(40)]
    write_json(path, values[0])
    seen: list[dict[str, list[int]]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads(path.read_text()))

    reader = threading.Thread(target=read)
    reader.start()
    for value in values:
        write_json(path, value)
    stop.set()
    reader.join()
    seen.append(json.loads(path.read_text()))
    assert all(value in values for value in seen)
    assert seen[-1] == values[-1]


def test_a_folder_in_which_no_stage_has_begun_takes_another_recipe(tmp_path: Path) -> None:
    first = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))
    with first.locked():
        pass  # what a start leaves that was refused before its first stage
    changed = load_recipe("laptop", ["seed=7"])
    second = RunFolder.claim(tmp_path / "run", changed)
    assert yaml.safe_load((second.root / "recipe.yaml").read_text())["recipe"]["seed"] == 7
    second.stage("data").mkdir()
    with pytest.raises(InputError, match="another recipe"):
        RunFolder.claim(tmp_path / "run", load_recipe("laptop"))


def test_a_start_does_not_take_a_folder_from_a_running_one(tmp_path: Path) -> None:
    first = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))
    with first.locked(), pytest.raises(InputError, match="another command"):
        RunFolder.claim(tmp_path / "run", load_recipe("laptop", ["seed=7"]))


def test_a_pinned_fact_is_noted_once_and_held(tmp_path: Path, recipe: Recipe) -> None:
    folder = RunFolder.claim(tmp_path, recipe)
    rewards = {"grpo-aks": {"name": "aks", "sha256": "1"}, "grpo-ktg": {"name": "k", "sha256": "2"}}
    folder.pin("rewards", rewards)
    folder.pin("rewards", rewards)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["rewards"] == rewards
    changed = rewards | {"grpo-ktg": {"name": "k", "sha256": "3"}}
    with pytest.raises(InputError, match=r"grpo-ktg\.sha256") as caught:
        folder.pin("rewards", changed)
    assert caught.value.key == "rewards"
    assert RunFolder.claim(tmp_path, recipe).root == tmp_path


def test_facts_of_another_commands_stages_are_noted_beside(tmp_path: Path, recipe: Recipe) -> None:
    """`rcot run sft`, then `rcot run grpo_aks`, then `rcot run grpo_ktg`, in one folder."""
    folder = RunFolder.claim(tmp_path, recipe)
    for facts in ({}, {"grpo-aks": {"sha256": "1"}}, {"grpo-ktg": {"sha256": "2"}}):
        folder.pin("rewards", facts)
    noted = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["rewards"]
    assert noted == {"grpo-aks": {"sha256": "1"}, "grpo-ktg": {"sha256": "2"}}
    with pytest.raises(InputError, match=r"grpo-aks\.sha256"):
        folder.pin("rewards", {"grpo-aks": {"sha256": "3"}, "grpo-ktg": {"sha256": "2"}})


WIDER = ["cluster.gpus_per_node=2", "sft.micro_batch_size=16"]


def test_a_run_goes_on_on_other_hosts(tmp_path: Path) -> None:
    first = load_recipe("laptop")
    folder = RunFolder.claim(tmp_path / "run", first)
    folder.new_attempt("sft")
    folder.pin("shards", {"sft-1536": "abc"})
    wider = load_recipe("laptop", WIDER)
    RunFolder.claim(tmp_path / "run", wider)
    record = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert record["recipe"]["cluster"]["gpus_per_node"] == 2
    assert record["shards"] == {"sft-1536": "abc"}
    other = load_recipe("laptop", [*WIDER, "seed=9"])
    with pytest.raises(InputError, match="seed"):
        RunFolder.claim(tmp_path / "run", other)


def test_a_run_of_an_earlier_schema_goes_on(tmp_path: Path, recipe: Recipe) -> None:
    """A key that did not exist then, at its default, is no other recipe; at another value it is."""
    root = tmp_path / "run"
    RunFolder.claim(root, recipe).new_attempt("sft")
    file = root / "recipe.yaml"
    record = yaml.safe_load(file.read_text())
    del record["recipe"]["grpo_ktg"]["clip_ratio"]
    file.write_text(yaml.safe_dump(record | {"recipe_hash": "of then"}))
    assert RunFolder.claim(root, recipe).root == root.resolve()
    assert yaml.safe_load(file.read_text())["recipe_hash"] == recipe_hash(recipe)
    other = recipe.model_copy(
        update={"grpo_ktg": recipe.grpo_ktg.model_copy(update={"clip_ratio": 0.3})}
    )
    file.write_text(yaml.safe_dump(record | {"recipe_hash": "of then"}))
    with pytest.raises(InputError, match=r"grpo_ktg.clip_ratio"):
        RunFolder.claim(root, other)


AHEAD = ["engine.max_model_len=1024", "predict.max_frames=9", "eval.baselines=false"]
OPERATION = [
    "grpo.keep_checkpoints=1", "grpo.save_every=4", "grpo.max_num_seqs=64", "predict.batch=8",
    "grpo.dump_rollouts=false", "grpo.max_num_batched_tokens=4096", "data.workers=1",
    "wandb.mode=disabled", "sft.save_every=7",
]  # fmt: skip


@pytest.mark.parametrize("change", [*AHEAD, *OPERATION])
def test_what_a_remedy_asks_for_may_change_under_way(tmp_path: Path, change: str) -> None:
    root = tmp_path / "run"
    folder = RunFolder.claim(root, load_recipe("laptop", ["data.describe=template"]))
    folder.new_attempt("sft")
    changed = load_recipe("laptop", ["data.describe=template", change])
    check_folder(root, changed)
    assert RunFolder.claim(root, changed).root == root.resolve()
    for stage in ("predict", "eval"):
        folder.stage(stage).mkdir()
        folder.mark_done(stage)
    again = load_recipe("laptop", ["data.describe=template"])
    if change in AHEAD:
        for refuse in (check_folder, RunFolder.claim):
            with pytest.raises(InputError, match="another recipe"):
                refuse(root, again)
    else:
        assert RunFolder.claim(root, again).root == root.resolve()


@pytest.mark.parametrize("user", ["data.describe=model", "grpo_aks.agent=agentic-aks"])
def test_what_earlier_stages_have_used_may_not(tmp_path: Path, user: str) -> None:
    given = [user, "data.clip_frames=6", "data.clip_tasks=[aks]"]
    RunFolder.claim(tmp_path, load_recipe("laptop", given)).new_attempt("sft")
    with pytest.raises(InputError, match=r"predict\.max_frames"):
        RunFolder.claim(tmp_path, load_recipe("laptop", [*given, "predict.max_frames=9"]))


@pytest.mark.parametrize("text", ["", "[1", "- a", "recipe: 5", "\0"])
def test_a_record_that_is_none(tmp_path: Path, recipe: Recipe, text: str) -> None:
    root = tmp_path / "run"
    RunFolder.claim(root, recipe)
    (root / "recipe.yaml").write_text(text)
    RunFolder.claim(root, recipe)  # nothing has begun: it is written again
    RunFolder.claim(root, recipe).new_attempt("sft")
    (root / "recipe.yaml").write_text(text)
    for refuse in (lambda: RunFolder.claim(root, recipe), lambda: check_folder(root, recipe)):
        with pytest.raises(InputError, match="no record"):
            refuse()


def test_a_record_of_an_earlier_schema_passes_the_preflight(tmp_path: Path, recipe: Recipe) -> None:
    RunFolder.claim(tmp_path, recipe).new_attempt("sft")
    file = tmp_path / "recipe.yaml"
    record = yaml.safe_load(file.read_text())
    del record["recipe"]["grpo_ktg"]["dump_rollouts"]
    file.write_text(yaml.safe_dump(record))
    check_folder(tmp_path, recipe)
