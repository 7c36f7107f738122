"""`rcot data …` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.toy.layouts import write_corpus
from rcot_rl.cli.main import app
from rcot_rl.errors import InputError

RUN = CliRunner()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli-data")
    write_corpus(folder / "mevis", "mevis", "train", 24, 6, "lattice")
    path = folder / "recipe.yaml"
    data = {
        "corpora": [{"dataset": "mevis", "root": str(folder / "mevis")}],
        "sets": {
            "sft-1536": {"ktg": 16, "aks": 8},
            "grpo-aks-640": {"aks": 8},
            "grpo-ktg-960": {"ktg": 8},
        },
        "describe": "template",
    }
    path.write_text(yaml.safe_dump({"extends": "laptop.yaml", "name": "cli-data", "data": data}))
    return path


@pytest.fixture(scope="module")
def shards(recipe) -> Path:
    out = recipe.parent / "shards"
    done = RUN.invoke(app, ["data", "build", str(recipe), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_the_plan_comes_first_and_the_sets_last(recipe, tmp_path):
    done = RUN.invoke(app, ["data", "build", str(recipe), "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert "ktg single" in done.stderr and "shards sft-1536" in done.stderr
    assert done.stderr.index("available") < done.stderr.index("shards sft-1536")
    assert "sft-1536: 24 train, 0 val\n" in done.stdout


@pytest.mark.parametrize("what", ["describe", "trace"])
def test_a_build_that_would_ask_a_model_says_what_to_do_first(recipe, tmp_path, what):
    with pytest.raises(InputError, match=f"data.{what}: .*`rcot data {what}` first"):
        RUN.invoke(
            app,
            ["data", "build", str(recipe), f"data.{what}=model", "--out", str(tmp_path / "no")],
            catch_exceptions=False,
        )
    assert not (tmp_path / "no").exists()


def test_check_with_the_policys_own_processor(shards):
    done = RUN.invoke(app, ["data", "check", str(shards), "--json", "--model", "tiny"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"] and found["counts"]["sft-1536"]["train"]["ktg"] == 16


def test_check_finds_what_the_processor_would_resize(shards, tmp_path):
    """A policy of the same tokenizer whose limit of pixels is below the canvas."""
    import shutil

    from rcot_rl.inference.model_folder import TINY

    other = tmp_path / "model"
    shutil.copytree(TINY, other)
    path = other / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"]["longest_edge"] = 84 * 84
    path.write_text(json.dumps(config))
    done = RUN.invoke(app, ["data", "check", str(shards / "sft-1536"), "--model", str(other)])
    assert done.exit_code == 2
    assert "the processor makes 84 x 84 pixels of 112 x 112" in done.stderr
    assert "prompt_tokens" in done.stderr


def test_show(shards, tmp_path):
    for name in ("rows.png", "rows.html"):
        out = tmp_path / name
        done = RUN.invoke(app, ["data", "show", str(shards / "sft-1536"), "--out", str(out)])
        assert done.exit_code == 0 and out.is_file()
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.width > 1000
    one = RUN.invoke(
        app,
        ["data", "show", str(shards / "sft-1536"), "--row", "3", "--out", str(tmp_path / "1.png")],
    )
    assert one.stdout.startswith("1 rows")
    (tmp_path / "folder.png").mkdir()
    for name in ("x.gif", "folder.png"):
        bad = RUN.invoke(app, ["data", "show", str(shards), "--out", str(tmp_path / name)])
        assert isinstance(bad.exception, InputError)


def test_push_checks_first_and_then_makes_the_librarys_own_call(shards, tmp_path, monkeypatch):
    import shutil

    import datasets

    pushed = []
    monkeypatch.setattr(
        datasets.DatasetDict,
        "push_to_hub",
        lambda self, repo, private: pushed.append((repo, private, self.num_rows)),
    )
    done = RUN.invoke(app, ["data", "push", str(shards / "grpo-ktg-960"), "you/ktg"])
    assert done.exit_code == 0, done.output
    assert pushed == [("you/ktg", True, {"train": 8})]
    broken = tmp_path / "set"
    shutil.copytree(shards / "grpo-ktg-960", broken)
    next(broken.glob("*.parquet")).write_bytes(b"")
    bad = RUN.invoke(app, ["data", "push", str(broken), "you/ktg"])
    assert isinstance(bad.exception, InputError) and len(pushed) == 1


def test_rows_longer_than_training_takes_stop_the_build(recipe, tmp_path):
    done = RUN.invoke(
        app,
        ["data", "build", str(recipe), "grpo.max_prompt_length=40", "--out", str(tmp_path)],
    )
    assert isinstance(done.exception, InputError)
    assert "more prompt_tokens than the 40" in str(done.exception)
    manifest = json.loads((tmp_path / "grpo-ktg-960" / "manifest.json").read_text())
    assert len(manifest["tokens"]["over"]["prompt_tokens"]) == 8
    check = RUN.invoke(app, ["data", "check", str(tmp_path / "grpo-ktg-960")])
    assert check.exit_code == 2 and "more than the 40 that training takes" in check.stderr


def test_without_the_policy_rows_are_not_counted_and_it_is_said(recipe, tmp_path):
    done = RUN.invoke(
        app,
        ["data", "build", str(recipe), "models.policy=nobody/nothing", "--out", str(tmp_path)],
    )
    assert done.exit_code == 0, done.output
    assert "tokens are not counted" in done.stderr
    assert json.loads((tmp_path / "sft-1536" / "manifest.json").read_text())["tokens"] is None
    assert RUN.invoke(app, ["data", "check", str(tmp_path)]).exit_code == 0


def test_describing_with_a_model_that_is_not_there(recipe, tmp_path):
    done = RUN.invoke(
        app,
        ["data", "describe", str(recipe), f"data.describer.model={tmp_path / 'none'}",
         "--out", str(tmp_path / "texts")],
    )  # fmt: skip
    assert done.exit_code != 0
    assert "no such model folder" in str(done.exception)


def test_shards_are_built_by_a_recipe_of_data_alone(tmp_path: Path) -> None:
    corpus, recipe = tmp_path / "mevis", tmp_path / "d.yaml"
    made = RUN.invoke(
        app,
        ["data", "toy", str(corpus), "--layout", "mevis", "--videos", "4", "--preset", "lattice"],
    )
    assert made.exit_code == 0, made.output
    recipe.write_text(
        f"name: d\nmodels: {{policy: tiny}}\ncanvas: {{image: 112}}\nprompts: compact\n"
        f"data:\n  corpora: [{{dataset: mevis, root: {corpus}}}]\n  allow_smaller: true\n"
        "  keyframe: any_visible\n  sets: {grpo-ktg-4: {ktg: 4, val: 1}}\n"
    )
    out = tmp_path / "shards"
    done = RUN.invoke(app, ["data", "build", str(recipe), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "grpo-ktg-4" / "manifest.json").is_file()
    assert RUN.invoke(app, ["run", str(recipe)]).exit_code != 0

    assert RUN.invoke(app, ["data", "check", str(out)]).exit_code == 0
    shard = next((out / "grpo-ktg-4").glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])  # the preflight's advice for a spoilt set:
    assert RUN.invoke(app, ["data", "check", str(out)]).exit_code == 2
    shutil.rmtree(out / "grpo-ktg-4")
    assert RUN.invoke(app, ["data", "build", str(recipe), "--out", str(out)]).exit_code == 0
    assert RUN.invoke(app, ["data", "check", str(out)]).exit_code == 0
