"""Reward recipes: presets, extends, overrides, routing, hashes, errors."""

import re

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.reward_recipe import REWARDS

GT = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]
PERFECT = (
    '<think>t</think><answer>[{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]</answer>'
)
NEAR = PERFECT.replace("[100, 100, 300, 300]", "[112, 112, 312, 312]")


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("aks", 3.0),
        ("ktg", 6.0),
        ("ktg-zero-target", 6.0),
        ("joint", 6.0),
        ("visionreasoner", 7.0),
        ("seg-zero", 5.0),
    ],
)
def test_maximum_and_hash_of_a_preset(name, most):
    reward = load_reward(name)
    assert reward.max_reward == most
    assert re.fullmatch(r"[0-9a-f]{64}", reward.hash)
    assert (
        reward.hash == load_reward(name).hash == load_reward(f"{REWARDS.folder}/{name}.yaml").hash
    )


def test_hashes_differ_exactly_for_different_rewards(tmp_path):
    hashes = {load_reward(p.stem).hash for p in REWARDS.folder.glob("*.yaml")}
    assert len(hashes) == len(list(REWARDS.folder.glob("*.yaml")))
    same = write(tmp_path, "a.yaml", "extends: ktg\ndescription: mine\ncanvas: 840.0\n")
    assert load_reward(same).hash == load_reward("ktg").hash
    other = {"components.accuracy.gamma_box": 11}
    changed = [
        load_reward("ktg", canvas=112),
        load_reward("ktg", overrides=other),
        load_reward("ktg", overrides={"zero_target": True}),
        load_reward("ktg", overrides={"components.format.weight": 0.5}),
    ]
    assert len({r.hash for r in changed} | {load_reward("ktg").hash}) == 5
    assert load_reward("ktg", overrides={"zero_target": True}).hash in hashes


def test_hash_is_equal_in_another_process(run_python):
    code = "import reward_fns; print(reward_fns.load_reward('joint', canvas=112).hash)"
    assert run_python(code).strip() == load_reward("joint", canvas=112).hash


def test_extends_merges_replaces_and_removes(tmp_path):
    write(tmp_path, "base.yaml", "extends: ktg\ncomponents: {accuracy: {gamma_box: 15}}\n")
    path = write(
        tmp_path,
        "top.yaml",
        "extends: base.yaml\ncomponents: {format: null, accuracy: {weight: 2, alpha_pt: 0}}\n",
    )
    reward = load_reward(path)
    assert reward.component_names == ("accuracy",)
    assert reward.max_reward == 4.0
    assert reward.score(NEAR, GT).reward == 4.0
    assert load_reward("ktg").score(NEAR, GT).components["accuracy"] == 2.0
    swapped = write(
        tmp_path,
        "b.yaml",
        "extends: ktg\ncomponents: {accuracy: {module: visionreasoner_accuracy}}",
    )
    assert load_reward(swapped).score(PERFECT, GT).reward == 6.0


def test_box_only_reward_needs_no_points(tmp_path):
    boxes = [{"bbox_2d": GT[0]["bbox_2d"]}]
    reward = load_reward("ktg", overrides={"components.accuracy.alpha_pt": 0})
    assert reward.score(PERFECT, boxes).components["accuracy"] == 2.0
    with pytest.raises(InputError, match="point_2d"):
        load_reward("ktg").score(PERFECT, boxes)


def test_joint_routes_rows_and_keeps_all_component_keys():
    joint = load_reward("joint", canvas=112)
    ktg = joint.score(PERFECT, GT, data_source="rcot/ktg", index=3)
    aks = joint.score("<think>t</think><answer>A</answer>", "A", data_source="rcot/aks")
    assert (ktg.reward, aks.reward) == (6.0, 3.0)
    assert tuple(ktg.components) == tuple(aks.components) == joint.component_names
    assert joint.route("rcot/ktg").recipe.canvas == 112
    for source in ("rcot/kgt", None, 5):
        with pytest.raises(InputError) as caught:
            joint.score(PERFECT, GT, data_source=source)
        assert caught.value.key == "data_source"


def test_routes_may_have_different_components_and_inline_recipes(tmp_path):
    path = write(
        tmp_path,
        "r.yaml",
        "canvas: 112\nroutes:\n  a: aks\n  k: {extends: ktg, components: {format: null}}\n",
    )
    reward = load_reward(path, overrides={"routes.k.zero_target": True})
    score = reward.score("<answer>[]</answer>", [], data_source="k")
    assert (score.reward, score.components) == (3.0, {"format": 0.0, "accuracy": 3.0})
    assert {part.recipe.canvas for part in reward.routes.values()} == {112}


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("extends: ktg\ncolour: red", "colour", "unknown key"),
        ("extends: ktg\nzero_targt: true", "zero_targt", "did you mean zero_target"),
        (
            "extends: ktg\ncomponents: {accuracy: {gama_box: 1}}",
            "components.accuracy.gama_box",
            "did you mean gamma_box",
        ),
        ("extends: ktg\ncomponents: {accuracy: {gamma_box: -1}}", "gamma_box", "greater than 0"),
        ("extends: ktg\ncomponents: {accuracy: {gamma_pt: .nan}}", "gamma_pt", ""),
        ("extends: ktg\ncomponents: {accuracy: {eta: 1.5}}", "eta", "less than or equal"),
        ("extends: ktg\ncomponents: {accuracy: {iou: exact}}", "iou", "'continuous'"),
        ("extends: ktg\ncomponents: {accuracy: {weight: -1}}", "weight", ""),
        ("extends: ktg\ncomponents: {format: {module: fromat}}", "module", "did you mean format"),
        (
            "extends: ktg\ncomponents: {format: {module: option_accuracy}}",
            "module",
            "scores the tasks aks",
        ),
        ("extends: ktg\ncomponents: {format: 1}", "components.format", "mapping"),
        ("extends: ktg\ntask: null", "task", "required"),
        ("extends: ktg\ncanvas: 0", "canvas", "greater than 0"),
        ("extends: nothing", "nothing", "shipped: aks"),
        ("extends: x.yaml", "extends", "circular `extends`"),
        ("routes: {a: ktgg}", "ktgg", "did you mean ktg"),
        ("routes: {a: {extends: ktg, zap: 1}}", "routes.a.zap", "unknown key"),
        ("routes: {a: x.yaml}", "x.yaml -> x.yaml", "circular `extends`"),
        ("routes: {}", "routes", ""),
        ("task: ktg", "components", ""),
        ("- 1", "", "mapping"),
        ("a: [", "", "not valid YAML"),
        ("a: 2020-13-45", "", "not valid YAML: month"),
        ("a: " + "[" * 5000, "", "nested too deep"),
        ("a: \x01", "", "not valid YAML: unacceptable character"),
        ("extends: ktg\ncomponents: {format: {module: [a]}}", "module", "unknown module ['a']"),
    ],
)
def test_invalid_recipes_raise_with_file_and_key(tmp_path, text, key, part):
    path = write(tmp_path, "x.yaml", text)
    with pytest.raises(InputError) as caught:
        load_reward(path)
    message = str(caught.value)
    assert key in message and part in message and "\n" not in message
    assert "x.yaml" in message or key in ("nothing", "ktgg")


def test_a_fault_names_the_file_and_line_that_gave_the_value(tmp_path):
    base = write(tmp_path, "base.yaml", "extends: ktg\ncomponents:\n  accuracy:\n    gama_box: 1\n")
    top = write(tmp_path, "top.yaml", "extends: base.yaml\nzero_target: true\n")
    routed = write(tmp_path, "routed.yaml", "routes:\n  k:\n    extends: base.yaml\n")
    for path, prefix in ((base, ""), (top, ""), (routed, "routes.k.")):
        with pytest.raises(InputError) as caught:
            load_reward(path)
        assert (caught.value.file, caught.value.line) == (base, 4)
        assert caught.value.key == f"{prefix}components.accuracy.gama_box"
    with pytest.raises(InputError) as caught:
        load_reward("ktg", overrides={"components.accuracy.gama_box": 1})
    assert caught.value.file == "command line"


def test_unknown_names_files_and_overrides_raise():
    with pytest.raises(InputError, match="did you mean visionreasoner"):
        load_reward("visionreasonr")
    with pytest.raises(InputError, match="no such reward recipe"):
        load_reward("missing.yaml")
    with pytest.raises(InputError, match="unknown key"):
        load_reward("ktg", overrides={"components.accuracy.gamma": 3})


@pytest.mark.parametrize(
    "truth",
    [
        "x",
        "{}",
        None,
        5,
        [5],
        [{}],
        [{"bbox_2d": [3, 2, 1, 4], "point_2d": [1, 1]}],
        [{"bbox_2d": [1, 2, 3], "point_2d": [1, 1]}],
        [{"bbox_2d": [1, 2, 3, True], "point_2d": [1, 1]}],
        [{"bbox_2d": [1, 2, 3, 10**400], "point_2d": [1, 1]}],
        [{"bbox_2d": [1, 2, 3, float("nan")], "point_2d": [1, 1]}],
        [{"bbox_2d": [1, 2, 3, 4], "point_2d": "1, 1"}],
        [{"bbox_2d": [1, 2, 3, 4]}],
    ],
)
def test_malformed_ground_truths_raise_with_their_key(truth):
    for name in ("ktg", "visionreasoner"):
        with pytest.raises(InputError) as caught:
            load_reward(name).score(PERFECT, truth)
        assert caught.value.key.startswith("ground_truth")


def test_scoring_imports_no_heavy_module(run_python):
    code = (
        "import sys; from reward_fns.score_lines import load_reward\n"
        "gt = [{'bbox_2d': [1, 2, 3, 4], 'point_2d': [2, 3]}]\n"
        "load_reward('joint').score('<answer>' + repr(gt), gt, data_source='rcot/ktg')\n"
        "heavy = 'numpy scipy torch ray verl vllm transformers wandb'.split()\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"
