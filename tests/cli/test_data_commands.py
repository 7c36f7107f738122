"""`rcot data …` as a user types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import Result

from data_pipelines.toy.layouts import write_corpus
from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli-data")
    write_corpus(folder / "mevis", "mevis", "train", 24, 6, "lattice")
    path = folder / "recipe.yaml"
    data = {
        "corpora": [{"dataset": "mevis", "root": str(folder / "mevis")}],
        "sets": {
            "sft-384": {"ktg": 16, "aks": 8},
            "grpo-aks-480": {"aks": 8},
            "grpo-ktg-960": {"ktg": 8},
        },
        "describe": "template",
    }
    path.write_text(yaml.safe_dump({"extends": "laptop.yaml", "name": "cli-data", "data": data}))
    return path


@pytest.fixture(scope="module")
def shards(recipe, invoke: Callable[..., Result]) -> Path:
    out = recipe.parent / "shards"
    done = invoke("data", "build", recipe, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_the_plan_comes_first_and_the_sets_last(recipe, tmp_path, invoke):
    done = invoke("data", "build", recipe, "--out", tmp_path)
    assert done.exit_code == 0
    assert "ktg single" in done.stderr and "shards sft-384" in done.stderr
    assert done.stderr.index("available") < done.stderr.index("shards sft-384")
    assert "sft-384: 24 train, 0 val\n" in done.stdout


@pytest.mark.parametrize("command", ["describe", "trace"])
def test_a_build_that_needs_model_texts_names_the_command_to_run_first(
    recipe, tmp_path, command, invoke
):
    with pytest.raises(InputError, match=f"data.{command}: .*`rcot data {command}` first"):
        raise invoke(
            "data", "build", recipe, f"data.{command}=model", "--out", tmp_path / "no"
        ).exception
    assert not (tmp_path / "no").exists()


def test_check_accepts_rows_with_the_policys_processor(shards, invoke):
    done = invoke("data", "check", shards, "--json", "--model", "tiny")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["ok"] and report["counts"]["sft-384"]["train"]["ktg"] == 16


def test_check_reports_images_that_the_processor_would_resize(shards, tmp_path, invoke):
    """A policy of the same tokenizer whose limit of pixels is below the canvas."""
    other = tmp_path / "model"
    shutil.copytree(TINY, other)
    path = other / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"]["longest_edge"] = 84 * 84
    path.write_text(json.dumps(config))
    done = invoke("data", "check", shards / "sft-384", "--model", other)
    assert done.exit_code == 2
    assert "the processor makes 84 x 84 pixels of 112 x 112" in done.stderr
    assert "prompt_tokens" in done.stderr


def test_show_writes_a_picture_and_a_page_and_refuses_other_types(shards, tmp_path, invoke):
    for name in ("rows.png", "rows.html"):
        out = tmp_path / name
        done = invoke("data", "show", shards / "sft-384", "--out", out)
        assert done.exit_code == 0 and out.is_file()
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.width > 1000
    one = invoke("data", "show", shards / "sft-384", "--row", "3", "--out", tmp_path / "1.png")
    assert one.stdout.startswith("1 rows")
    (tmp_path / "folder.png").mkdir()
    for name in ("x.gif", "folder.png"):
        bad = invoke("data", "show", shards, "--out", tmp_path / name)
        assert isinstance(bad.exception, InputError)


def test_push_checks_the_set_before_it_uploads(shards, tmp_path, monkeypatch, invoke):
    import datasets

    pushed = []
    monkeypatch.setattr(
        datasets.DatasetDict,
        "push_to_hub",
        lambda self, repo, private: pushed.append((repo, private, self.num_rows)),
    )
    done = invoke("data", "push", shards / "grpo-ktg-960", "you/ktg")
    assert done.exit_code == 0, done.output
    assert pushed == [("you/ktg", True, {"train": 8})]
    broken = tmp_path / "set"
    shutil.copytree(shards / "grpo-ktg-960", broken)
    next(broken.glob("*.parquet")).write_bytes(b"")
    bad = invoke("data", "push", broken, "you/ktg")
    assert isinstance(bad.exception, InputError) and len(pushed) == 1


def test_rows_longer_than_training_accepts_stop_the_build(recipe, tmp_path, invoke):
    done = invoke("data", "build", recipe, "grpo.max_prompt_length=40", "--out", tmp_path)
    assert isinstance(done.exception, InputError)
    assert "training limit of 40 prompt_tokens" in str(done.exception)
    manifest = json.loads((tmp_path / "grpo-ktg-960" / "manifest.json").read_text())
    assert len(manifest["tokens"]["over"]["prompt_tokens"]) == 8
    check = invoke("data", "check", tmp_path / "grpo-ktg-960")
    assert check.exit_code == 2 and "but training accepts at most 40" in check.stderr


def test_a_build_without_the_policy_reports_that_tokens_are_not_counted(recipe, tmp_path, invoke):
    done = invoke("data", "build", recipe, "models.policy=nobody/nothing", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "tokens are not counted" in done.stderr
    assert json.loads((tmp_path / "sft-384" / "manifest.json").read_text())["tokens"] is None
    assert invoke("data", "check", tmp_path).exit_code == 0


def test_describe_names_a_missing_model_folder(recipe, tmp_path, invoke):
    done = invoke(
        "data",
        "describe",
        recipe,
        f"data.describer.model={tmp_path / 'none'}",
        "--out",
        tmp_path / "texts",
    )
    assert done.exit_code != 0
    assert "no such model folder" in str(done.exception)


def test_a_recipe_with_only_a_data_section_builds_shards(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    corpus, recipe = tmp_path / "mevis", tmp_path / "d.yaml"
    drawn = invoke(
        "data", "toy", corpus, "--layout", "mevis", "--videos", "4", "--preset", "lattice"
    )
    assert drawn.exit_code == 0, drawn.output
    recipe.write_text(
        f"name: d\nmodels: {{policy: tiny}}\ncanvas: {{image: 112}}\nprompts: compact\n"
        f"data:\n  corpora: [{{dataset: mevis, root: {corpus}}}]\n  allow_smaller: true\n"
        "  keyframe: any_visible\n  sets: {grpo-ktg-4: {ktg: 4, val: 1}}\n"
    )
    out = tmp_path / "shards"
    done = invoke("data", "build", recipe, "--out", out)
    assert done.exit_code == 0, done.output
    assert (out / "grpo-ktg-4" / "manifest.json").is_file()

    assert invoke("data", "check", out).exit_code == 0
    shard = next((out / "grpo-ktg-4").glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])  # the preflight's advice for a spoilt set:
    assert invoke("data", "check", out).exit_code == 2
    shutil.rmtree(out / "grpo-ktg-4")
    assert invoke("data", "build", recipe, "--out", out).exit_code == 0
    assert invoke("data", "check", out).exit_code == 0
