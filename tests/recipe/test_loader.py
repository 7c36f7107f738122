"""The recipe loader: composition, precedence, and errors that say where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import RootModel

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import RECIPES, dump_recipe, load_recipe, recipe_hash

BASE = """\
name: base
data:
  corpora: [{dataset: mevis}]
  sets:
    sft-a: {ktg: 30, aks: 10}
    grpo-b: {aks: 8}
grpo:
  n: 4
  learning_rate: 1.0e-5
grpo_aks: {shard_set: grpo-b, reward: aks, steps: 3}
grpo_ktg:
  shard_set: grpo-b
  reward: ktg
  steps: 5
  n: 6
cluster: {gpus_per_node: 1}
"""
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def fault(path: Path, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def leaves(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, (*prefix, key))
    else:
        yield prefix, value


# --- extends ------------------------------------------------------------------------------------


def test_extends_is_a_chain_in_which_the_nearest_file_wins(write: Write) -> None:
    write("far/grand.yaml", BASE + "seed: 1\nprompts: compact\nsft: {epochs: 3, lora_rank: 2}\n")
    write("far/parent.yaml", "extends: grand.yaml\nname: parent\nseed: 2\nsft: {lora_rank: 4}\n")
    child = write("child.yaml", "extends: far/parent.yaml\nname: child\nsft: {batch_size: 16}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.prompts) == ("child", 2, "compact")
    assert (recipe.sft.epochs, recipe.sft.lora_rank, recipe.sft.batch_size) == (3, 4, 16)
    assert recipe.sft.warmup_ratio == 0.1  # said nowhere: the schema's


def test_data_sets_of_a_child_replace_its_parents(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ndata: {sets: {sft-c: {ktg: 4}}, workers: 3}\n")
    recipe = load_recipe(child)
    assert list(recipe.data.sets) == ["sft-c"]
    assert recipe.data.workers == 3
    assert [c.dataset for c in recipe.data.corpora] == ["mevis"]  # the rest of `data` merges


def test_data_sets_of_a_parent_are_kept_by_a_child_that_gives_none(write: Write) -> None:
    write("base.yaml", BASE)
    recipe = load_recipe(write("child.yaml", "extends: base.yaml\ndata: {workers: 3}\n"))
    assert sorted(recipe.data.sets) == ["grpo-b", "sft-a"]


def test_lists_are_replaced_not_joined(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ndata: {corpora: [{dataset: revos}]}\n")
    assert [c.dataset for c in load_recipe(child).data.corpora] == ["revos"]


def test_cyclic_extends_names_the_circle(write: Write) -> None:
    write("b.yaml", "extends: c.yaml\n")
    write("c.yaml", "extends: a.yaml\n")
    error = fault(write("a.yaml", "extends: b.yaml\n" + BASE))
    assert error.key == "extends"
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in error.message


def test_missing_parent_names_the_line(write: Write) -> None:
    path = write("a.yaml", "name: a\nextends: nowhere.yaml\n")
    error = fault(path)
    assert (error.file, error.line, error.key) == (str(path), 2, "extends")
    assert "nowhere.yaml" in error.message


# --- overrides and the shared section ------------------------------------------------------------


def test_overrides_win_over_files_and_later_ones_over_earlier(write: Write) -> None:
    path = write("base.yaml", BASE)
    recipe = load_recipe(path, ["seed=7", "grpo_aks.steps=9", "seed=8", "sft.epochs=2"])
    assert (recipe.seed, recipe.grpo_aks.steps, recipe.sft.epochs) == (8, 9, 2)
    assert recipe.grpo_aks.shard_set == "grpo-b"  # the section's other keys stay


def test_an_override_of_a_mapping_merges_into_it(write: Write) -> None:
    path = write("base.yaml", BASE)
    recipe = load_recipe(path, ["sft={epochs: 2}", "sft.lora_rank=3", "data.sets.sft-a.aks=20"])
    assert (recipe.sft.epochs, recipe.sft.lora_rank) == (2, 3)
    assert (recipe.data.sets["sft-a"].aks, recipe.data.sets["sft-a"].ktg) == (20, 30)
    assert "grpo-b" in recipe.data.sets


def test_override_values_are_yaml(write: Write) -> None:
    path = write("base.yaml", BASE)
    texts = ["stages=[data, sft]", "data.single_multi=null", "predict.vdg=false", "name=a=b"]
    recipe = load_recipe(path, texts[:3])
    assert (recipe.stages, recipe.data.single_multi) == (["data", "sft"], None)
    assert recipe.predict.vdg is False
    assert "'a=b'" in fault(path, texts[3]).message  # only the first = divides


def test_keys_that_do_not_go_together_are_said_plainly() -> None:
    error = fault(Path("laptop"), "cluster.nodes=99")
    assert error.message.startswith("grpo_aks.prompts_per_step x n = 128 is no multiple of")


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[1"])
def test_malformed_overrides_are_refused(write: Write, text: str) -> None:
    assert fault(write("base.yaml", BASE), text).file == "command line"


def test_an_override_may_not_pass_through_a_scalar(write: Write) -> None:
    error = fault(write("base.yaml", BASE), "seed.deep=3")
    assert (error.file, error.key) == ("command line", "seed")


def test_shared_grpo_keys_are_defaults_of_both_stages(write: Write) -> None:
    recipe = load_recipe(write("base.yaml", BASE))
    assert recipe.grpo_aks.learning_rate == recipe.grpo_ktg.learning_rate == 1e-5
    assert (recipe.grpo_aks.n, recipe.grpo_ktg.n) == (4, 6)  # the stage's own key wins


def test_shared_grpo_reaches_through_extends_and_overrides(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ngrpo: {clip_ratio: 0.3, temperature: 0.5}\n")
    recipe = load_recipe(child, ["grpo.temperature=0.7"])
    for stage in (recipe.grpo_aks, recipe.grpo_ktg):
        assert (stage.clip_ratio, stage.temperature, stage.learning_rate) == (0.3, 0.7, 1e-5)


def test_a_shared_key_on_the_command_line_beats_a_stages_own_in_a_file(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ngrpo_aks: {temperature: 0.5}\n")
    recipe = load_recipe(child, ["grpo.temperature=0.7"])
    assert (recipe.grpo_aks.temperature, recipe.grpo_ktg.temperature) == (0.7, 0.7)
    both = load_recipe(child, ["grpo_ktg.temperature=0.9", "grpo.temperature=0.7"])
    assert (both.grpo_aks.temperature, both.grpo_ktg.temperature) == (0.7, 0.9)


def test_a_childs_shared_key_beats_a_stages_own_in_its_parent(write: Write) -> None:
    write("base.yaml", BASE + "\n")
    child = write("child.yaml", "extends: base.yaml\ngrpo: {steps: 77}\n")
    recipe = load_recipe(child)
    assert (recipe.grpo_aks.steps, recipe.grpo_ktg.steps) == (77, 77)


def test_yaml_that_holds_itself_is_refused(write: Write) -> None:
    for text in ("a: &x [*x]\n", "a: &x {b: *x}\n"):
        with pytest.raises(InputError, match="holds itself"):
            load_recipe(write("loop.yaml", text))


def test_aliases_that_expand_without_end_are_refused(write: Write) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    with pytest.raises(InputError, match="more than"):
        load_recipe(write("bomb.yaml", "\n".join(lines) + "\n"))


def test_shared_grpo_must_be_a_mapping(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\nname: x\ngrpo: 5\n")
    error = fault(child)
    assert (error.file, error.line, error.key) == (str(child), 3, "grpo")


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addition", "line", "key", "nearest"),
    [
        ("sead: 1", 1, "sead", "seed"),
        ("sft:\n  learning_rat: 1", 2, "sft.learning_rat", "sft.learning_rate"),
        ("data:\n  corpora:\n  - {datset: mevis}", 3, "data.corpora.0.datset", "dataset"),
        ("data:\n  sets:\n    sft-a:\n      ktgs: 1", 4, "data.sets.sft-a.ktgs", "sft-a.ktg"),
        (
            "eval:\n  benchmarks:\n  - {dataset: mevis,\n     splt: x}",
            4,
            None,
            "benchmarks.0.split",
        ),
        (
            "toy:\n  corpora:\n  - {layout: mevis, split: train,\n     videoz: 3}",
            4,
            "toy.corpora.0.videoz",
            "toy.corpora.0.videos",
        ),
        ("grpo:\n\n  kl_los_coef: 1", 3, "grpo.kl_los_coef", "grpo.kl_loss_coef"),
        ("grpo_ktg:\n  stepz: 1", 2, "grpo_ktg.stepz", "grpo_ktg.steps"),
    ],
)
def test_unknown_keys_name_place_and_nearest(
    write: Write, addition: str, line: int, key: str | None, nearest: str
) -> None:
    write("base.yaml", BASE)
    path = write("bad.yaml", f"{addition}\nextends: base.yaml\n")
    error = fault(path)
    assert (error.file, error.line) == (str(path), line)
    assert key is None or error.key == key
    assert error.faults[0].endswith(f"{nearest}?")
    assert str(error).startswith(f"{path}:{line}: ")


def test_all_faults_are_listed_each_on_its_line(write: Write) -> None:
    write("base.yaml", BASE)
    text = (
        "extends: base.yaml\nsead: 1\nsft: {epochs: 0, learning_rat: 1}\ngrpo: {stepz: 1, n: 1}\n"
    )
    path = write("bad.yaml", text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, ["device=gpu"])
    places = sorted(line.split(": ")[:2] for line in caught.value.faults)
    assert places == sorted([
        [f"{path}:2", "sead"], [f"{path}:3", "sft.learning_rat"], [f"{path}:4", "grpo.stepz"],
        [f"{path}:3", "sft.epochs"], [f"{path}:4", "grpo.n"], ["command line", "device"],
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer=adam", "known sections"),
        ("grpo_aks.optimizer=adam", "known here"),
        ("learning_rate=1", "did you mean sft.learning_rate or grpo.learning_rate?"),
        ("gpus_per_node=2", "did you mean cluster.gpus_per_node?"),
        ("grpo.lr=1", "did you mean grpo.learning_rate or grpo.lora_rank?"),
        ("stages=[data, grpo_aks]", "did you mean grpo-aks?"),
        ("device=gpu", "(is 'gpu')"),
    ],
)
def test_a_suggestion_is_made_only_if_it_is_close(write: Write, override: str, said: str) -> None:
    message = fault(write("base.yaml", BASE), override).message
    assert said in message
    assert "did you mean" in said or "did you mean" not in message


def test_a_fault_names_the_key_that_was_typed(write: Write) -> None:
    path = write("base.yaml", BASE)
    for typed in (
        "grpo.stepz=1",
        "grpo_aks.stepz=1",
        "grpo.steps=many",
        "grpo_ktg.n=1",
        "grpo.n=1",
    ):
        assert fault(path, typed).key == typed.partition("=")[0]
    assert fault(path, "grpo.n=1", "grpo_aks.n=4", "grpo_ktg.n=0").key == "grpo_ktg.n"


def test_a_misspelt_recipe_file_is_answered_with_one_that_is_there(write: Write) -> None:
    path = write("mine.yaml", BASE)
    beside = fault(path.with_name("mien.yaml"))
    assert beside.message == f"no such file; did you mean {path}?"
    assert fault(Path("labtop")).message.startswith("no such recipe; did you mean laptop?")
    assert fault(Path("recipes/rcot_seg_3.yaml")).message.endswith("?")
    assert "did you mean" not in fault(path.with_name("optimizer.yaml")).message
    child = fault(write("child.yaml", "extends: mine.yml\n"))
    assert (child.key, child.message) == (
        "extends", f"no such recipe: mine.yml; did you mean {path}?"
    )  # fmt: skip


def test_an_unknown_key_of_a_parent_names_the_parents_file(write: Write) -> None:
    parent = write("base.yaml", BASE + "sft: {epoch: 1}\n")
    error = fault(write("child.yaml", "extends: base.yaml\n"))
    assert (error.file, error.line) == (str(parent), BASE.count("\n") + 1)


def test_an_unknown_override_names_the_command_line(write: Write) -> None:
    error = fault(write("base.yaml", BASE), "predict.round=3")
    assert (error.file, error.key) == ("command line", "predict.round")
    assert error.message.endswith("predict.rounds?")


def test_free_sections_take_any_key(write: Write) -> None:
    recipe = load_recipe(write("base.yaml", BASE), ["grpo_aks.verl={a.b: 1}", "engine.vllm.x=2"])
    assert recipe.grpo_aks.verl == {"a.b": 1}
    assert recipe.engine.vllm == {"x": 2}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: a\nseed: 1\nname: b\n", 3, "name"),
        ("name: a\nsft:\n  epochs: 1\n  epochs: 2\n", 4, "sft.epochs"),
        (
            "data:\n  corpora:\n  - dataset: mevis\n    dataset: revos\n",
            4,
            "data.corpora.0.dataset",
        ),
    ],
)
def test_keys_given_twice(write: Write, text: str, line: int, key: str) -> None:
    path = write("twice.yaml", text)
    error = fault(path)
    assert (error.file, error.line, error.key) == (str(path), line, key)
    assert "twice" in error.message


@pytest.mark.parametrize(
    ("addition", "line", "key", "shown"),
    [
        ("seed: many", 1, "seed", "'many'"),
        ("sft:\n  epochs: 1.5", 2, "sft.epochs", "1.5"),
        ("grpo:\n  n: 1", 2, "grpo.n", "1"),
        ("device: tpu", 1, "device", "'tpu'"),
        ("canvas:\n  image: 100", 2, "canvas.image", "100"),
        ("data:\n  corpora:\n  - {dataset: coco}", 3, "data.corpora.0.dataset", "'coco'"),
        ("stages: [data,\n  sfd]", 2, "stages.1", "'sfd'"),
    ],
)
def test_wrong_types_and_values_name_key_line_and_value(
    write: Write, addition: str, line: int, key: str, shown: str
) -> None:
    text = BASE.replace("  n: 4\n", "")
    write("base.yaml", text)
    path = write("bad.yaml", f"{addition}\nextends: base.yaml\n")
    error = fault(path)
    assert (error.file, error.line, error.key) == (str(path), line, key)
    assert f"(is {shown})" in error.message


def test_a_missing_key_names_it_and_the_section_that_lacks_it(write: Write) -> None:
    path = write("bad.yaml", BASE.replace("  steps: 5\n", ""))
    error = fault(path)
    assert (error.file, error.key) == (str(path), "grpo_ktg.steps")
    assert error.line == BASE.splitlines().index("grpo_ktg:") + 1


DATA = "name: d\ndata:\n  corpora: [{dataset: mevis}]\n  sets: {grpo-b: {ktg: 8}}\n"
KTG = "grpo_ktg: {shard_set: grpo-b, reward: ktg, steps: 2}\n"


def test_a_command_needs_only_the_sections_that_it_reads(write: Write) -> None:
    alone = write("alone.yaml", DATA + "cluster: {gpus_per_node: 3}\n")
    assert load_recipe(alone, needs=("data",)).grpo_stages == []
    with pytest.raises(InputError) as caught:
        load_recipe(alone)
    assert [line.split(": ")[1] for line in caught.value.faults] == ["grpo_aks", "grpo_ktg"]
    one = write("one.yaml", DATA + KTG + "grpo: {n: 4}\nstages: [data, sft, grpo-ktg]\n")
    recipe = load_recipe(one)
    assert recipe.grpo_aks is None and recipe.grpo("grpo-ktg").n == 4
    assert recipe.grpo_stages == ["grpo-ktg"]
    with pytest.raises(InputError, match="grpo_aks: missing"):
        recipe.grpo("grpo-aks")
    predict = "stages=[data, sft, grpo-ktg, predict]"
    assert "grpo_aks: missing, and predict reads held-out rows" in str(fault(one, predict))
    load_recipe(one, [predict, "eval.heldout_prompts=0"])
    load_recipe(write("again.yaml", dump_recipe(recipe)))  # as the processes of stages read it


def test_a_section_that_is_begun_is_checked_whole(write: Write) -> None:
    begun = write("begun.yaml", DATA + "grpo_aks: {steps: 3}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(begun, needs=("data",))
    keys = sorted(line.split(": ")[1] for line in caught.value.faults)
    assert keys == ["grpo_aks.reward", "grpo_aks.shard_set"]
    assert fault(write("typo.yaml", DATA + "grpo: {stepz: 3}\n"), "stages=[data]").key


def test_batches_must_divide_among_the_ranks(write: Write) -> None:
    error = fault(write("base.yaml", BASE), "cluster.gpus_per_node=3")
    assert "sft.batch_size = 64" in error.message


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "mapping"), ("", "mapping"), ("a: [1\n", "not valid YAML"), ("a: b: c", "YAML")],
)
def test_files_that_are_no_mapping(write: Write, content: str, message: str) -> None:
    path = write("bad.yaml", content)
    error = fault(path)
    assert error.file == str(path) and error.line is not None
    assert message in error.message


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 5000, "\x01", "2020-01-01T99:00:00"])
def test_what_yaml_chokes_on_is_one_line(write: Write, value: str) -> None:
    path = write("bad.yaml", f"name: a\nseed: {value}\n")
    error = fault(path)
    assert error.file == str(path) and error.message.startswith("not valid YAML: ")
    error = fault(Path("laptop"), f"seed={value}")
    assert (error.file, error.key) == ("command line", "seed")


def test_unreadable_files(tmp_path: Path) -> None:
    assert fault(tmp_path / "none.yaml").file == str(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    assert "cannot be read" in fault(binary).message


def test_yaml_tags_construct_nothing(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    bad = write("bad.yaml", f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert fault(bad).line == 1
    assert (
        "YAML" in fault(write("base.yaml", BASE), f"name=!!python/name:os.mkdir '{mark}'").message
    )
    assert not mark.exists()


def test_unknown_names_list_the_shipped_recipes() -> None:
    error = fault(Path("no-such-recipe"))
    assert "laptop" in error.message and "rcot_seg_3b" in error.message


# --- the hash -------------------------------------------------------------------------------------


def test_the_hash_does_not_see_order_composition_or_defaults_spelt_out(write: Write) -> None:
    plain = load_recipe(write("base.yaml", BASE))
    tree = yaml.safe_load(BASE)
    turned = {k: tree[k] for k in reversed(tree)}
    turned["cluster"] = {"nodes": 1, "gpus_per_node": 1}
    again = load_recipe(write("turned.yaml", yaml.safe_dump(turned, sort_keys=False)))
    assert recipe_hash(again) == recipe_hash(plain)
    dumped = load_recipe(write("dumped.yaml", dump_recipe(plain)))
    assert (dumped, recipe_hash(dumped)) == (plain, recipe_hash(plain))


def test_the_hash_is_pinned_to_the_canonical_json(write: Write) -> None:
    import hashlib

    recipe = load_recipe(write("base.yaml", BASE))
    text = json.dumps(json.loads(recipe.model_dump_json()), sort_keys=True, separators=(",", ":"))
    assert recipe_hash(recipe) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_changes_with_every_single_value() -> None:
    recipe = load_recipe("laptop")
    hashes = {recipe_hash(recipe)}
    tree = recipe.model_dump(mode="json")
    assert recipe_hash(RootModel(tree)) == recipe_hash(recipe)
    count = 0
    for path, value in leaves(tree):
        section: Any = tree
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = f"{value}?"
        hashes.add(recipe_hash(RootModel(tree)))  # whether or not the schema would let it in
        section[path[-1]] = value
        count += 1
    assert len(hashes) == count + 1 > 100


# --- shipped recipes ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_by_path_and_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(path.stem) == recipe
    for stage in ("grpo-aks", "grpo-ktg"):
        assert recipe.grpo(stage).shard_set in recipe.data.sets
    assert recipe.sft.shard_set in recipe.data.sets
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5  # type: ignore[misc]
