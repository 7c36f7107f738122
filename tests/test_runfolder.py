"""The run folder: which recipe it belongs to, what is done, and atomic files."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe, recipe_hash
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder, versions, write_json


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("laptop")


def test_claiming_records_the_recipe_and_the_versions(tmp_path: Path, recipe: Recipe) -> None:
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
    other = load_recipe("laptop", ["seed=2", "train.grpo-aks.steps=5", "toy.preset=rich"])
    with pytest.raises(InputError) as caught:
        RunFolder.claim(tmp_path, other)
    assert caught.value.file == str(tmp_path / "recipe.yaml")
    assert "(differs in: seed, toy.preset, train.grpo-aks.steps)" in caught.value.message
    RunFolder.claim(tmp_path, recipe)  # and it is still the first one's


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        RunFolder.claim(tmp_path, recipe)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(InputError, match="cannot be written") as caught:
        RunFolder.claim(path, recipe)
    assert caught.value.file == str(path)
    assert path.read_text() == "mine"


def test_the_lock_is_exclusive_and_released(tmp_path: Path, recipe: Recipe) -> None:
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


def test_attempts_are_numbered_by_value_and_not_as_text(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.new_attempt("sft").name for _ in range(3)] == [f"attempt-{k}" for k in (1, 2, 3)]
    (tmp_path / "sft" / "attempt-10").mkdir()
    assert folder.new_attempt("sft").name == "attempt-11"  # as text, 3 comes after 10
    assert folder.new_attempt("eval").name == "attempt-1"
    assert all(p.is_dir() for p in (tmp_path / "sft").iterdir())


def test_a_stage_is_done_once_marked(tmp_path: Path) -> None:
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


def test_a_folder_with_no_started_stage_takes_another_recipe(tmp_path: Path) -> None:
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


def test_a_pinned_fact_cannot_change(tmp_path: Path, recipe: Recipe) -> None:
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


def test_facts_of_several_commands_are_recorded_together(tmp_path: Path, recipe: Recipe) -> None:
    """`rcot run sft`, then `rcot run grpo_aks`, then `rcot run grpo_ktg`, in one folder."""
    folder = RunFolder.claim(tmp_path, recipe)
    for facts in ({}, {"grpo-aks": {"sha256": "1"}}, {"grpo-ktg": {"sha256": "2"}}):
        folder.pin("rewards", facts)
    noted = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["rewards"]
    assert noted == {"grpo-aks": {"sha256": "1"}, "grpo-ktg": {"sha256": "2"}}
    with pytest.raises(InputError, match=r"grpo-aks\.sha256"):
        folder.pin("rewards", {"grpo-aks": {"sha256": "3"}, "grpo-ktg": {"sha256": "2"}})


WIDER = ["cluster.gpus_per_node=2", "train.sft.micro_batch_size=16"]


def test_a_run_continues_on_other_hosts(tmp_path: Path) -> None:
    first = load_recipe("laptop")
    folder = RunFolder.claim(tmp_path / "run", first)
    folder.new_attempt("sft")
    folder.pin("shards", {"sft-384": "abc"})
    wider = load_recipe("laptop", WIDER)
    RunFolder.claim(tmp_path / "run", wider)
    record = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert record["recipe"]["cluster"]["gpus_per_node"] == 2
    assert record["shards"] == {"sft-384": "abc"}
    other = load_recipe("laptop", [*WIDER, "seed=9"])
    with pytest.raises(InputError, match="seed"):
        RunFolder.claim(tmp_path / "run", other)


def test_a_record_without_a_newer_key_has_its_default(tmp_path: Path, recipe: Recipe) -> None:
    """At another value than the default, the key makes another recipe."""
    root = tmp_path / "run"
    RunFolder.claim(root, recipe).new_attempt("sft")
    file = root / "recipe.yaml"
    record = yaml.safe_load(file.read_text())
    del record["recipe"]["train"]["grpo-ktg"]["clip_ratio"]
    file.write_text(yaml.safe_dump(record | {"recipe_hash": "of then"}, sort_keys=False))
    assert RunFolder.claim(root, recipe).root == root.resolve()
    assert yaml.safe_load(file.read_text())["recipe_hash"] == recipe_hash(recipe)
    other = load_recipe("laptop", ["train.grpo-ktg.clip_ratio=0.3"])
    file.write_text(yaml.safe_dump(record | {"recipe_hash": "of then"}, sort_keys=False))
    with pytest.raises(InputError, match=r"train.grpo-ktg.clip_ratio"):
        RunFolder.claim(root, other)


def test_a_run_of_fixed_stages_is_refused_with_the_translation(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Recipes once had the sections sft, grpo_aks and grpo_ktg in place of `train`."""
    RunFolder.claim(tmp_path, recipe).new_attempt("sft")
    file = tmp_path / "recipe.yaml"
    record = yaml.safe_load(file.read_text())
    train = record["recipe"].pop("train")
    record["recipe"] |= {"sft": train["sft"], "grpo_aks": train["grpo-aks"], "grpo_ktg": None}
    file.write_text(yaml.safe_dump(record, sort_keys=False))
    with pytest.raises(InputError) as caught:
        RunFolder.claim(tmp_path, recipe)
    assert caught.value.message == (
        "was made by an earlier version, whose stages were sft, grpo_aks and grpo_ktg; move them "
        "under train: as sft {kind: sft}, grpo-aks and grpo-ktg {kind: grpo} (docs/recipes.md), "
        "or choose another folder with --out"
    )


LATER = "{kind: grpo, shard_set: grpo-ktg-960, reward: ktg, steps: 4}"


def test_a_later_stage_may_be_added_and_one_before_a_started_stage_may_not(
    tmp_path: Path, recipe: Recipe
) -> None:
    folder = RunFolder.claim(tmp_path, recipe)
    folder.new_attempt("sft")
    folder.new_attempt("grpo-aks")
    more = load_recipe("laptop", [f"train.polish={LATER}"])
    assert RunFolder.claim(tmp_path, more).root == tmp_path
    record = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert list(record["recipe"]["train"]) == ["sft", "grpo-aks", "grpo-ktg", "polish"]
    moved = load_recipe("laptop", [f"train.polish={LATER}", "train.grpo-ktg.after=sft"])
    with pytest.raises(InputError, match=r"\(differs in: train\.grpo-ktg\.after\)"):
        RunFolder.claim(tmp_path, moved)
    stages = dict(recipe.train)
    between = {"sft": stages["sft"], "early": more.train["polish"]} | stages
    inserted = recipe.model_copy(update={"train": between})
    refusal = RunFolder(tmp_path).refusal(inserted)
    assert refusal is not None and "train.grpo-aks.after" in refusal.message


AHEAD = ["engine.max_model_len=1024", "predict.max_frames=9", "eval.baselines=false"]
OPERATION = [
    "grpo.keep_checkpoints=1",
    "grpo.save_every=4",
    "grpo.max_num_seqs=64",
    "predict.videos_per_engine=8",
    "grpo.dump_rollouts=false",
    "grpo.max_num_batched_tokens=4096",
    "data.workers=1",
    "wandb.mode=disabled",
    "train.sft.save_every=7",
]


@pytest.mark.parametrize("change", [*AHEAD, *OPERATION])
def test_keys_that_fixes_name_may_change_during_a_run(tmp_path: Path, change: str) -> None:
    root = tmp_path / "run"
    folder = RunFolder.claim(root, load_recipe("laptop", ["data.describe=template"]))
    folder.new_attempt("sft")
    changed = load_recipe("laptop", ["data.describe=template", change])
    assert folder.refusal(changed) is None
    assert RunFolder.claim(root, changed).root == root.resolve()
    for stage in ("predict", "eval"):
        folder.stage(stage).mkdir()
        folder.mark_done(stage)
    again = load_recipe("laptop", ["data.describe=template"])
    if change in AHEAD:
        refusal = folder.refusal(again)
        assert refusal is not None and "another recipe" in refusal.message
        with pytest.raises(InputError, match="another recipe"):
            RunFolder.claim(root, again)
    else:
        assert RunFolder.claim(root, again).root == root.resolve()


@pytest.mark.parametrize("user", ["data.describe=model", "train.grpo-aks.agent=agentic-aks"])
def test_keys_that_earlier_stages_used_may_not_change(tmp_path: Path, user: str) -> None:
    given = [user, "data.clip_frames=6", "data.clip_tasks=[aks]", "train.grpo-ktg.rehearse=null"]
    RunFolder.claim(tmp_path, load_recipe("laptop", given)).new_attempt("sft")
    with pytest.raises(InputError, match=r"predict\.max_frames"):
        RunFolder.claim(tmp_path, load_recipe("laptop", [*given, "predict.max_frames=9"]))


@pytest.mark.parametrize("text", ["", "[1", "- a", "recipe: 5", "\0"])
def test_an_invalid_record_is_replaced_only_before_the_first_stage(
    tmp_path: Path, recipe: Recipe, text: str
) -> None:
    root = tmp_path / "run"
    RunFolder.claim(root, recipe)
    (root / "recipe.yaml").write_text(text)
    RunFolder.claim(root, recipe)  # nothing has begun: it is written again
    RunFolder.claim(root, recipe).new_attempt("sft")
    (root / "recipe.yaml").write_text(text)
    refusal = RunFolder(root).refusal(recipe)
    assert refusal is not None and "not the record" in refusal.message
    with pytest.raises(InputError, match="not the record"):
        RunFolder.claim(root, recipe)


def test_a_record_without_a_newer_key_is_not_refused(tmp_path: Path, recipe: Recipe) -> None:
    RunFolder.claim(tmp_path, recipe).new_attempt("sft")
    file = tmp_path / "recipe.yaml"
    record = yaml.safe_load(file.read_text())
    del record["recipe"]["train"]["grpo-ktg"]["dump_rollouts"]
    file.write_text(yaml.safe_dump(record, sort_keys=False))
    assert RunFolder(tmp_path).refusal(recipe) is None


def test_a_new_variant_reopens_a_finished_run_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    first = load_recipe("laptop", ["predict.variants.light.reevaluate_frames=4"])
    folder = RunFolder.claim(tmp_path, first)
    for stage in first.order:
        folder.stage(stage).mkdir()
        folder.mark_done(stage)
    more = load_recipe(
        "laptop",
        ["predict.variants.light.reevaluate_frames=4", "predict.variants.no-aks.rounds=0"],
    )
    RunFolder.claim(tmp_path, more)
    done = {stage for stage in more.order if folder.is_done(stage)}
    assert done == set(more.order) - {"predict", "eval", "report"}
    for stage in ("predict", "eval", "report"):
        folder.mark_done(stage)
    changed = load_recipe(
        "laptop",
        ["predict.variants.light.reevaluate_frames=8", "predict.variants.no-aks.rounds=0"],
    )
    with pytest.raises(InputError, match=r"differs in: predict\.variants\.light"):
        RunFolder.claim(tmp_path, changed)
    assert all(folder.is_done(stage) for stage in more.order)
