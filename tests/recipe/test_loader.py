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
from rcot_rl.recipe.loader import RECIPES, dump_recipe, load_recipe, recipe_hash, resolve_recipe

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
train:
  sft: {kind: sft}
  grpo-aks: {kind: grpo, shard_set: grpo-b, reward: aks, steps: 3}
  grpo-ktg:
    kind: grpo
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
    write("far/grand.yaml", BASE + "seed: 1\nprompts: compact\n")
    write(
        "far/parent.yaml",
        "extends: grand.yaml\nname: parent\nseed: 2\ntrain: {sft: {lora_rank: 4, epochs: 3}}\n",
    )
    child = write(
        "child.yaml", "extends: far/parent.yaml\nname: child\ntrain: {sft: {batch_size: 16}}\n"
    )
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.prompts) == ("child", 2, "compact")
    sft = recipe.sft("sft")
    assert (sft.epochs, sft.lora_rank, sft.batch_size) == (3, 4, 16)
    assert sft.warmup_ratio == 0.1  # said nowhere: the schema's


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


def test_circular_extends_names_the_chain(write: Write) -> None:
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


OTHER = """\
name: other
seed: 9
data: {corpora: [{dataset: revos}], sets: {sft-z: {ktg: 8}}}
train: {sft: {kind: sft, shard_set: sft-z, epochs: 4}}
cluster: {gpus_per_node: 1}
"""


def test_an_override_of_extends_replaces_what_the_file_extends(write: Write) -> None:
    write("far/grand.yaml", BASE + "seed: 1\n")
    write("far/parent.yaml", "extends: grand.yaml\nseed: 2\nprompts: compact\n")
    child = write(
        "far/child.yaml", "extends: parent.yaml\nname: child\ntrain: {sft: {epochs: 2}}\n"
    )
    other = write("other.yaml", OTHER)
    recipe = load_recipe(child, [f"extends={other}", "seed=3"])
    assert (recipe.name, recipe.seed, recipe.prompts) == ("child", 3, "qwen")
    assert list(recipe.train) == ["sft"] and recipe.sft("sft").shard_set == "sft-z"
    assert recipe.sft("sft").epochs == 2, "the file wins over its new base"
    without = write("without.yaml", "prompts: compact\n")
    assert load_recipe(without, [f"extends={other}"]).name == "other"
    assert load_recipe(child, ["extends=laptop", "grpo.n=4"]).data.sets.keys() == (
        load_recipe("laptop").data.sets.keys()
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("laptopp", "laptopp: no such recipe; did you mean laptop?"),
        ("null", "command line: extends: must be the name or the path of a recipe"),
        ("[laptop]", "command line: extends: must be the name or the path of a recipe"),
    ],
)
def test_an_override_of_extends_must_name_a_recipe(write: Write, value: str, message: str) -> None:
    child = write("child.yaml", BASE)
    if value == "null":
        assert load_recipe(child, ["extends=null"]) == load_recipe(child)
        return
    assert message in str(fault(child, f"extends={value}"))


def test_a_file_cannot_extend_itself_by_an_override(write: Write) -> None:
    child = write("child.yaml", BASE)
    assert "circular" in str(fault(child, f"extends={child}"))


# --- overrides and the shared section ------------------------------------------------------------


def test_overrides_win_over_files_and_later_ones_over_earlier(write: Write) -> None:
    path = write("base.yaml", BASE)
    recipe = load_recipe(path, ["seed=7", "train.grpo-aks.steps=9", "seed=8", "train.sft.epochs=2"])
    assert (recipe.seed, recipe.grpo("grpo-aks").steps, recipe.sft("sft").epochs) == (8, 9, 2)
    assert recipe.grpo("grpo-aks").shard_set == "grpo-b"  # the section's other keys stay


def test_an_override_of_a_mapping_merges_into_it(write: Write) -> None:
    path = write("base.yaml", BASE)
    recipe = load_recipe(
        path, ["train.sft={epochs: 2}", "train.sft.lora_rank=3", "data.sets.sft-a.aks=20"]
    )
    assert (recipe.sft("sft").epochs, recipe.sft("sft").lora_rank) == (2, 3)
    assert (recipe.data.sets["sft-a"].aks, recipe.data.sets["sft-a"].ktg) == (20, 30)
    assert "grpo-b" in recipe.data.sets


def test_override_values_are_yaml(write: Write) -> None:
    path = write("base.yaml", BASE)
    texts = ["stages=[data, sft]", "data.single_multi=null", "predict.vdg=false", "name=a=b"]
    recipe = load_recipe(path, texts[:3])
    assert (recipe.stages, recipe.data.single_multi) == (["data", "sft"], None)
    assert recipe.predict.vdg is False
    assert "'a=b'" in fault(path, texts[3]).message  # only the first = divides


def test_values_that_conflict_name_the_given_key() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("laptop", ["cluster.nodes=99"])
    keys = [line.split(": ")[1] for line in caught.value.faults]
    assert set(keys) == {"grpo.prompts_per_step"}, "where the value was given"
    assert caught.value.message.startswith("prompts_per_step x n = 128 is not a multiple of")


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[1"])
def test_malformed_overrides_are_refused(write: Write, text: str) -> None:
    assert fault(write("base.yaml", BASE), text).file == "command line"


def test_an_override_may_not_pass_through_a_scalar(write: Write) -> None:
    error = fault(write("base.yaml", BASE), "seed.deep=3")
    assert (error.file, error.key) == ("command line", "seed")


def test_shared_grpo_keys_are_defaults_of_all_grpo_stages(write: Write) -> None:
    recipe = load_recipe(write("base.yaml", BASE))
    assert recipe.grpo("grpo-aks").learning_rate == recipe.grpo("grpo-ktg").learning_rate == 1e-5
    assert (recipe.grpo("grpo-aks").n, recipe.grpo("grpo-ktg").n) == (
        4,
        6,
    )  # the stage's own key wins


def test_shared_grpo_reaches_through_extends_and_overrides(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ngrpo: {clip_ratio: 0.3, temperature: 0.5}\n")
    recipe = load_recipe(child, ["grpo.temperature=0.7"])
    for stage in (recipe.grpo("grpo-aks"), recipe.grpo("grpo-ktg")):
        assert (stage.clip_ratio, stage.temperature, stage.learning_rate) == (0.3, 0.7, 1e-5)


def test_a_shared_key_on_the_command_line_beats_a_stages_own_in_a_file(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ntrain: {grpo-aks: {temperature: 0.5}}\n")
    recipe = load_recipe(child, ["grpo.temperature=0.7"])
    assert (recipe.grpo("grpo-aks").temperature, recipe.grpo("grpo-ktg").temperature) == (0.7, 0.7)
    both = load_recipe(child, ["train.grpo-ktg.temperature=0.9", "grpo.temperature=0.7"])
    assert (both.grpo("grpo-aks").temperature, both.grpo("grpo-ktg").temperature) == (0.7, 0.9)


def test_a_childs_shared_key_beats_a_stages_own_in_its_parent(write: Write) -> None:
    write("base.yaml", BASE + "\n")
    child = write("child.yaml", "extends: base.yaml\ngrpo: {steps: 77}\n")
    recipe = load_recipe(child)
    assert (recipe.grpo("grpo-aks").steps, recipe.grpo("grpo-ktg").steps) == (77, 77)


def test_recursive_yaml_aliases_are_refused(write: Write) -> None:
    for text in ("a: &x [*x]\n", "a: &x {b: *x}\n"):
        with pytest.raises(InputError, match="recursive YAML alias"):
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
        ("train:\n  sft:\n    learning_rat: 1", 3, "train.sft.learning_rat", "sft.learning_rate"),
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
        ("train:\n  grpo-ktg:\n    stepz: 1", 3, "train.grpo-ktg.stepz", "grpo-ktg.steps"),
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
        "extends: base.yaml\nsead: 1\ntrain: {sft: {epochs: 0, learning_rat: 1}}\n"
        "grpo: {stepz: 1, n: 1}\n"
    )
    path = write("bad.yaml", text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, ["device=gpu"])
    places = sorted(line.split(": ")[:2] for line in caught.value.faults)
    assert places == [
        [f"{path}:2", "sead"],
        [f"{path}:3", "train.sft.epochs"],
        [f"{path}:3", "train.sft.learning_rat"],
        [f"{path}:4", "grpo.n"],
        [f"{path}:4", "grpo.stepz"],
        ["command line", "device"],
    ]


@pytest.mark.parametrize(
    ("override", "message_part"),
    [
        ("optimizer=adam", "known sections"),
        ("train.grpo-aks.optimizer=adam", "known here"),
        ("learning_rate=1", "did you mean train.<sft stage>.learning_rate or grpo.learning_rate?"),
        ("gpus_per_node=2", "did you mean cluster.gpus_per_node?"),
        ("grpo.lr=1", "did you mean grpo.learning_rate or grpo.lora_rank?"),
        ("stages=[data, grpo_aks]", "did you mean grpo-aks?"),
        ("device=gpu", "(is 'gpu')"),
    ],
)
def test_a_suggestion_is_made_only_if_it_is_close(
    write: Write, override: str, message_part: str
) -> None:
    message = fault(write("base.yaml", BASE), override).message
    assert message_part in message
    assert "did you mean" in message_part or "did you mean" not in message


def test_a_fault_names_the_key_that_was_typed(write: Write) -> None:
    path = write("base.yaml", BASE)
    for typed in (
        "grpo.stepz=1",
        "train.grpo-aks.stepz=1",
        "grpo.steps=many",
        "train.grpo-ktg.n=1",
        "grpo.n=1",
    ):
        assert fault(path, typed).key == typed.partition("=")[0]
    assert (
        fault(path, "grpo.n=1", "train.grpo-aks.n=4", "train.grpo-ktg.n=0").key
        == "train.grpo-ktg.n"
    )


def test_a_misspelt_recipe_file_gets_an_existing_one_as_suggestion(write: Write) -> None:
    path = write("mine.yaml", BASE)
    beside = fault(path.with_name("mien.yaml"))
    assert beside.message == f"no such recipe; did you mean {path}?"
    assert fault(Path("labtop")).message.startswith("no such recipe; did you mean laptop?")
    assert fault(Path("recipes/rcot_seg_3.yaml")).message.endswith("?")
    assert "did you mean" not in fault(path.with_name("optimizer.yaml")).message
    child = fault(write("child.yaml", "extends: mine.yml\n"))
    assert child.key == "extends"
    assert child.message == f"no such recipe: mine.yml; did you mean {path}?"


def test_an_unknown_key_of_a_parent_names_the_parents_file(write: Write) -> None:
    parent = write("base.yaml", BASE + "launch: {epoch: 1}\n")
    error = fault(write("child.yaml", "extends: base.yaml\n"))
    assert (error.file, error.line) == (str(parent), BASE.count("\n") + 1)


def test_an_unknown_override_names_the_command_line(write: Write) -> None:
    error = fault(write("base.yaml", BASE), "predict.round=3")
    assert (error.file, error.key) == ("command line", "predict.round")
    assert error.message.endswith("predict.rounds?")


def test_free_sections_take_any_key(write: Write) -> None:
    recipe = load_recipe(
        write("base.yaml", BASE), ["train.grpo-aks.verl={a.b: 1}", "engine.vllm.x=2"]
    )
    assert recipe.grpo("grpo-aks").verl == {"a.b": 1}
    assert recipe.engine.vllm == {"x": 2}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: a\nseed: 1\nname: b\n", 3, "name"),
        ("name: a\nmodels:\n  policy: a\n  policy: b\n", 4, "models.policy"),
        (
            "data:\n  corpora:\n  - dataset: mevis\n    dataset: revos\n",
            4,
            "data.corpora.0.dataset",
        ),
    ],
)
def test_duplicate_keys_are_refused(write: Write, text: str, line: int, key: str) -> None:
    path = write("twice.yaml", text)
    error = fault(path)
    assert (error.file, error.line, error.key) == (str(path), line, key)
    assert "twice" in error.message


@pytest.mark.parametrize(
    ("addition", "line", "key", "shown"),
    [
        ("seed: many", 1, "seed", "'many'"),
        ("train:\n  sft:\n    epochs: 1.5", 3, "train.sft.epochs", "1.5"),
        ("grpo:\n  n: 1", 2, "grpo.n", "1"),
        ("device: tpu", 1, "device", "'tpu'"),
        ("canvas:\n  image: 100", 2, "canvas.image", "100"),
        ("data:\n  corpora:\n  - {dataset: coco}", 3, "data.corpora.0.dataset", "'coco'"),
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
    path = write("bad.yaml", BASE.replace("    steps: 5\n", ""))
    error = fault(path)
    assert (error.file, error.key) == (str(path), "train.grpo-ktg.steps")
    assert error.line == BASE.splitlines().index("  grpo-ktg:") + 1


DATA = (
    "name: d\ndata:\n  corpora: [{dataset: mevis}]\n  sets: {sft-a: {ktg: 8}, grpo-b: {ktg: 8}}\n"
)
KTG = "{kind: grpo, shard_set: grpo-b, reward: ktg, steps: 2}"


def test_batches_are_checked_for_the_stages_of_the_command(write: Write) -> None:
    path = write("base.yaml", BASE)
    with pytest.raises(InputError):
        load_recipe(path, ["cluster.gpus_per_node=3"])
    load_recipe(path, ["cluster.gpus_per_node=3"], stages=())
    load_recipe(path, ["cluster.gpus_per_node=3", "stages=[data]"])


# --- stages as data -------------------------------------------------------------------------------


def test_stages_of_any_number_and_name_run_in_their_order(write: Write) -> None:
    text = DATA + f"train: {{warm-up: {KTG}, main: {KTG}, last: {KTG}}}\ngrpo: {{n: 3}}\n"
    recipe = load_recipe(write("three.yaml", text + "cluster: {gpus_per_node: 1}\n"), stages=())
    assert recipe.stages == ["data", "warm-up", "main", "last", "predict", "eval", "report"]
    assert [recipe.start_of(s) for s in recipe.train] == ["base", "warm-up", "main"]
    assert [recipe.reference_of(s) for s in recipe.train] == ["base"] * 3
    assert [s.n for s in recipe.grpo_stages.values()] == [3, 3, 3]
    assert recipe.scored_checkpoints == ["base", "last"]
    assert recipe.heldout_stages == {"ktg": "last"}


def test_the_reference_is_the_last_sft_stage_that_the_policy_descends_from(write: Write) -> None:
    text = BASE + "eval: {heldout_prompts: 0}\n"
    more = [
        "train.sft-2={kind: sft}",
        f"train.more={KTG}",
        f"train.zero={KTG}",
        "train.zero.after=base",
    ]
    recipe = load_recipe(write("base.yaml", text), more, stages=())
    references = {name: recipe.reference_of(name) for name in recipe.grpo_stages}
    assert references == {"grpo-aks": "sft", "grpo-ktg": "sft", "more": "sft-2", "zero": "base"}
    assert recipe.start_of("sft-2") == "grpo-ktg"


def test_a_recipe_without_training_scores_the_base(write: Write) -> None:
    recipe = load_recipe(write("base.yaml", DATA))
    assert recipe.stages == ["data", "predict", "eval", "report"]
    assert recipe.scored_checkpoints == ["base"] and recipe.heldout_stages == {}


def test_the_last_checkpoint_also_predicts_baselines_and_upper_bounds(write: Write) -> None:
    settings = ["eval.checkpoints=[sft, grpo-ktg]", "predict.variants={no-aks: {rounds: 0}}"]
    base = write("base.yaml", BASE)
    recipe = load_recipe(base, [*settings, "eval.oracles=true"])
    assert list(recipe.predictions_of("sft")) == ["sft", "sft@no-aks"]
    oracles = ["oracle-keyframe", "oracle-boxes", "oracle-both"]
    own = ["grpo-ktg", "grpo-ktg@no-aks"]
    assert list(recipe.predictions_of("grpo-ktg")) == [*own, "first-frame", *oracles]
    only = load_recipe(base, [*settings, "eval.oracles=true", "eval.baselines=false"])
    assert list(only.predictions_of("grpo-ktg")) == [*own, *oracles]
    assert list(load_recipe(base, settings).predictions_of("grpo-ktg")) == [*own, "first-frame"]
    error = fault(base, "predict.variants={oracle-both: {rounds: 0}}")
    assert error.key == "predict.variants" and "is built in" in error.message


LIKE = """\
extends: base.yaml
train:
  early: {like: late, after: base, tasks: [ktg]}
  late: {like: sft, epochs: 3}
  again: {like: grpo-ktg, after: grpo-aks, reference: sft, n: 8}
"""


def test_like_copies_settings_but_not_the_place_in_the_chain(write: Write) -> None:
    write("base.yaml", BASE.replace("steps: 5", "steps: 5\n    after: sft"))
    child = write("child.yaml", LIKE)
    recipe = load_recipe(child)
    assert list(recipe.train) == ["sft", "grpo-aks", "grpo-ktg", "early", "late", "again"]
    sft = recipe.sft("sft")
    assert recipe.sft("late") == sft.model_copy(update={"epochs": 3})
    update = {"epochs": 3, "after": "base", "tasks": ["ktg"]}
    assert recipe.sft("early") == sft.model_copy(update=update), "like of like, in any order"
    ktg, again = recipe.grpo("grpo-ktg"), recipe.grpo("again")
    update = {"after": "grpo-aks", "reference": "sft", "n": 8}
    assert again == ktg.model_copy(update=update)
    assert again.learning_rate == 1e-5, "shared GRPO keys arrive through the other stage"
    assert (ktg.after, recipe.start_of("late")) == ("sft", "early")


def test_like_follows_overrides_of_the_other_stage_and_of_all_grpo_stages(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", LIKE)
    recipe = load_recipe(child, ["train.grpo-ktg.steps=7", "train.sft.epochs=9"])
    assert recipe.grpo("again").steps == 7
    assert (recipe.sft("late").epochs, recipe.sft("sft").epochs) == (3, 9)
    recipe = load_recipe(child, ["grpo.n=2"])
    assert {stage.n for stage in recipe.grpo_stages.values()} == {2}
    assert load_recipe(child, ["grpo.n=2", "train.again.n=5"]).grpo("again").n == 5
    file, _ = resolve_recipe(child)[1].place(("train", "again", "steps"))
    assert file == str(child.parent / "base.yaml")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            "x: {like: grpo-kgt}",
            "train.x.like: 'grpo-kgt' is not a stage of train; did you mean gr",
        ),
        ("x: {like: [sft]}", "is not a stage of train"),
        ("x: {like: y}\n  y: {like: x}", "circular: x -> y -> x"),
        ("x: {like: x}", "circular: x -> x"),
        ("x: {like: sft, kind: sft}", "remove `kind` or `like`"),
        ("x: {like: sft, epochz: 3}", "train.x.epochz: unknown key; did you mean train.x.epochs"),
        ("x: {like: sft, epochs: 0}", "train.x.epochs: input should be greater"),
        ("x: {like: y}\n  y: 5", "'y' is no mapping of settings"),
        ("x: {like: grpo-aks, tasks: [aks]}", "train.x.tasks: unknown key"),
        (
            "x: {like: sft, shard_set: sft-k, tasks: [aks]}",
            "train.x.tasks: sft-k has no rows of aks",
        ),
        ("x: {like: grpo-ktg, rehearse: sft}", "train.x.rehearse: 'sft' is not an earlier GRPO st"),
        ("x: {like: grpo-ktg, rehearse: x}", "train.x.rehearse: 'x' is not an earlier GRPO stage"),
        (
            "x: {like: grpo-ktg, rehearse: grpo-kgt}",
            "(grpo-aks, grpo-ktg); did you mean grpo-ktg?",
        ),
        (
            "x: {like: grpo-ktg, rehearse: grpo-ktg}",
            "train.x.rehearse: grpo-ktg has the same task: aks",
        ),
    ],
)
def test_faults_of_like_name_its_place(write: Write, stages: str, message: str) -> None:
    write("base.yaml", BASE.replace("sft-a:", "sft-k: {ktg: 64}\n    sft-a:"))
    child = write("child.yaml", f"extends: base.yaml\ntrain:\n  {stages}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(child)
    assert message in str(caught.value)
    assert f"{child}:3" in str(caught.value) or f"{child}:4" in str(caught.value)


def test_null_removes_a_stage(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", f"extends: base.yaml\ntrain: {{sft: null, mine: {KTG}}}\n")
    recipe = load_recipe(child, ["train.grpo-aks=null"], stages=())
    assert list(recipe.train) == ["grpo-ktg", "mine"]
    assert (recipe.grpo("mine").n, recipe.grpo("mine").learning_rate) == (4, 1e-5), "defaults apply"
    error = fault(child, "train.grpo-akt=null")
    assert (error.key, error.message) == (
        "train.grpo-akt",
        "no such stage to remove; did you mean grpo-ktg?",
    )


def test_a_stage_of_another_kind_inherits_nothing(write: Write) -> None:
    write("base.yaml", BASE)
    child = write("child.yaml", "extends: base.yaml\ntrain: {grpo-ktg: {kind: sft, epochs: 4}}\n")
    recipe = load_recipe(child)
    assert recipe.sft("grpo-ktg").epochs == 4 and list(recipe.grpo_stages) == ["grpo-aks"]


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        (
            "train.grpo-ktg.after=stf",
            "train.grpo-ktg.after",
            "not an earlier stage (base, sft, grpo-aks)",
        ),
        ("train.sft.after=grpo-aks", "train.sft.after", "not an earlier stage (base)"),
        ("train.grpo-aks.reference=base", "train.grpo-aks.reference", "must be sft"),
        ("train.grpo-ktg.after=base", "train.grpo-ktg", None),
        ("train.grpo-ktg.reference=base", "train.grpo-ktg", None),
        ("train.predict={kind: sft}", "train.predict", "is reserved"),
        ("train.Two Words={kind: sft}", "train.Two Words", "lower-case words"),
        ("train.grpo-akz.steps=3", "train.grpo-akz.kind", "did you mean train.grpo-aks?"),
        ("train.grpo-aks.kind=ppo", "train.grpo-aks.kind", "must be sft or grpo (is 'ppo')"),
        ("train.grpo-aks=5", "train.grpo-aks", ""),
        ("train=5", "train", "must be a mapping"),
        ("stages=[data, sfd]", "stages", "'sfd' is not a stage of the recipe"),
        ("eval.checkpoints=[grpo]", "eval.checkpoints", "'grpo' is not one of base, sft"),
        ("grpo_ktg.steps=3", "grpo_ktg", "is now `train.grpo-ktg`"),
        ("sft.epochs=3", "sft", "is now `train.sft`"),
    ],
)
def test_faults_of_stages_name_key_and_remedy(
    write: Write, override: str, key: str, message: str | None
) -> None:
    path = write("base.yaml", BASE)
    if message is None:
        load_recipe(path, [override])
        return
    error = fault(path, override)
    assert (error.file, error.key) == ("command line", key)
    assert message in error.message


def test_a_recipe_of_an_earlier_version_says_how_to_translate_it(write: Write) -> None:
    old = DATA + "sft: {epochs: 2}\ngrpo_aks: {shard_set: grpo-b, reward: aks, steps: 1}\n"
    with pytest.raises(InputError) as caught:
        load_recipe(write("old.yaml", old))
    keys = [line.split(": ")[1] for line in caught.value.faults]
    assert keys == ["sft", "grpo_aks"]
    assert all("`train:` maps each stage's name to" in line for line in caught.value.faults)


def test_batches_must_divide_among_the_ranks(write: Write) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write("base.yaml", BASE), ["cluster.gpus_per_node=3"])
    keys = [line.split(": ")[1] for line in caught.value.faults]
    assert keys == ["train.sft.batch_size", "train.grpo-aks.prompts_per_step"]
    assert "batch_size = 64 is not a multiple" in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "mapping"), ("", "mapping"), ("a: [1\n", "not valid YAML"), ("a: b: c", "YAML")],
)
def test_files_that_are_not_mappings_are_refused(write: Write, content: str, message: str) -> None:
    path = write("bad.yaml", content)
    error = fault(path)
    assert error.file == str(path) and error.line is not None
    assert message in error.message


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 5000, "\x01", "2020-01-01T99:00:00"])
def test_yaml_errors_are_one_line(write: Write, value: str) -> None:
    path = write("bad.yaml", f"name: a\nseed: {value}\n")
    error = fault(path)
    assert error.file == str(path) and error.message.startswith("not valid YAML: ")
    error = fault(Path("laptop"), f"seed={value}")
    assert (error.file, error.key) == ("command line", "seed")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
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


def test_the_hash_ignores_key_order_composition_and_explicit_defaults(write: Write) -> None:
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
    values = json.loads(recipe.model_dump_json())
    values["train"] = [[name, stage] for name, stage in values["train"].items()]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert recipe_hash(recipe) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_changes_with_every_single_value() -> None:
    recipe = load_recipe("laptop")
    hashes = {recipe_hash(recipe)}
    tree = recipe.model_dump(mode="json")
    assert recipe_hash(RootModel(tree)) == recipe_hash(recipe)
    count = 0
    for path, value in list(leaves(tree)):
        section: Any = tree
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = f"{value}?"
        hashes.add(recipe_hash(RootModel(tree)))  # whether or not the schema would let it in
        section[path[-1]] = value
        count += 1
    assert len(hashes) == count + 1 > 100


# --- shipped recipes ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.folder.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_by_path_and_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(path.stem) == recipe
    for stage in recipe.train.values():
        assert stage.shard_set in recipe.data.sets
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5  # type: ignore[misc]


def test_the_hash_changes_with_the_order_of_stages(write: Write) -> None:
    stages = {"a": KTG, "b": KTG}
    first, second = (
        load_recipe(
            write(
                "order.yaml",
                DATA + "train: {" + ", ".join(f"{n}: {stages[n]}" for n in names) + "}\n",
            ),
            stages=(),
        )
        for names in ("ab", "ba")
    )
    assert recipe_hash(first) != recipe_hash(second)


def test_a_kind_below_a_stage_is_an_ordinary_value(write: Write) -> None:
    """Only a stage's own `kind` decides what it inherits."""
    write("base.yaml", BASE + "engine: {vllm: {x: {kind: a, size: 1}}}\n")
    child = write("child.yaml", "extends: base.yaml\nengine: {vllm: {x: {kind: b}}}\n")
    assert load_recipe(child).engine.vllm == {"x": {"kind": "b", "size": 1}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{table-3: {VDG: sft, first frame: grpo-ktg}}", ""),
        ("{table-33: {VDG: sft}}", "no table 'table-33'"),
        ("{table-3: {vdg: sft}}", "table-3 has no row 'vdg' (its rows: first frame; VDG; "),
        (
            "{table-3: {VDG: grpo-kgt}}",
            "VDG: 'grpo-kgt' is not scored (sft, grpo-ktg); did you mean",
        ),
        ("{table-3: {VDG: base}}", "VDG: 'base' is not scored (sft, grpo-ktg)"),
    ],
)
def test_tables_of_the_paper_name_their_rows_and_scored_checkpoints(
    write: Write, given: str, message: str
) -> None:
    path = write("base.yaml", BASE)
    override = f"report.paper_tables={given}"
    if not message:
        assert load_recipe(path, [override]).report.paper_tables["table-3"]["VDG"] == "sft"
    else:
        assert message in str(fault(path, override))
