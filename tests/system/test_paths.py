"""Every command refuses a path that a package would interpret; other paths are used literally."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.launch import ray_jobs, render, slurm
from cluster.preflight.plan import examine
from rcot_rl.cli import main as cli
from rcot_rl.cli.main import main
from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import check_model
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages.data_stage import build_shards
from rcot_rl.system.files import suffix_counts, visible
from rcot_rl.system.paths import check_path, path_fault
from reward_fns.user.sources import absolute

INTERPRETED = {
    "k[12]": "'['",
    "ktg[lr=1e-6]": "'['",
    "a?b": "'?'",
    "a*b": "'*'",
    "a::b": "'::'",
    "a$HOME": "'$H'",
    "a${oc.env:HOME}": "'${'",
    "a\nb": "'\\n'",
    "a\x1bb": "'\\x1b'",
    "s3://bucket/run": "URL",
    "hf://datasets/x": "URL",
    "file:///data/run": "URL",
    "~/run": "'~'",
    "caf\udce9": "UTF-8",
}
"""Name -> part of the error message."""
NAMES = r"""
k1 lr=1e-6 a,b a{b} {1..3} a#b a%20b a%05d ./~ ~backup9 -x a$ a$(b) x]y é
a\b a'b a"b a;b a&b a|b a!b a^b .hid a:b (1)
"""
LITERAL = [*NAMES.split(), "a b"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", INTERPRETED)
def test_error_names_the_path_and_the_interpreted_characters(name: str, here: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_path(name, handed_on=True)
    assert INTERPRETED[name] in caught.value.message
    assert caught.value.file == name
    assert "\n" not in str(caught.value) and str(caught.value).encode()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", LITERAL)
def test_other_names_are_accepted(name: str, here: Path) -> None:
    check_path(name, handed_on=True)


@given(st.text(min_size=1, max_size=20))
def test_any_name_gets_at_most_a_one_line_error(name: str) -> None:
    for handed_on in (False, True):
        fault = path_fault(name, handed_on=handed_on)
        if fault is not None:
            assert len(str(InputError(fault, file=name)).splitlines()) == 1


def test_working_directory_and_link_targets_are_checked_too(here: Path, monkeypatch) -> None:
    (here / "k[1]").mkdir()
    (here / "plain").symlink_to(here / "k[1]")
    with pytest.raises(InputError, match=r"'\['"):
        check_path("plain/run", handed_on=True)
    monkeypatch.chdir(here / "k[1]")
    with pytest.raises(InputError, match=r"'\['"):
        check_path("run", handed_on=True)
    check_path("corpus")


@pytest.mark.parametrize("name", ["k[12]", "a::b", "~/run", "s3://bucket/run"])
def test_every_command_refuses_the_folder_before_it_writes_anything(name: str, here: Path) -> None:
    recipe = load_recipe("laptop")
    placed = load_recipe("laptop", [f"launch.run_dir='{name}'"])
    (here / "model").mkdir()
    commands = [
        lambda: RunFolder.claim(Path(name), recipe),
        lambda: build_shards(recipe, Path(name)),
        lambda: check_model(Path(name)),
        lambda: slurm.script(placed, "laptop"),
        lambda: ray_jobs.request(placed, "laptop"),
        lambda: render.run_folder(placed, here),
        lambda: absolute(f"{name}/reward.py:f"),
    ]
    for command in commands:
        with pytest.raises(InputError) as caught:
            command()
        assert caught.value.file is not None and "\n" not in str(caught.value)
    codes = {f.code for f in examine(recipe, Path(name)).findings if f.severity == "error"}
    assert "folder.name" in codes
    assert [p.name for p in here.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "setting",
    [
        "models.policy=/m/k[12]",
        "models.segmenter=s3://bucket/sam2",
        "prompts=/p/a*b.yaml",
        "grpo.reward=/r/a::b/reward.py:f",
        "data.corpora=[{dataset: mevis, root: ~/mevis}]",
        "data.describe=hf://texts.jsonl",
        "eval.benchmarks=[{dataset: mevis, root: 's3://x'}]",
    ],
)
def test_error_of_a_recipe_path_names_its_key(setting: str, here: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("laptop", [setting])
    assert caught.value.key is not None
    assert caught.value.key.split(".")[0].startswith(setting.split("=")[0].split(".")[0])
    assert any(s in caught.value.message for s in ("URL", "'~'", "'['", "'*'", "'::'"))


def test_corpus_folder_may_have_any_name_and_package_reward_is_not_a_url(here: Path) -> None:
    loaded = load_recipe(
        "laptop",
        [
            "data.corpora=[{dataset: mevis, root: '/c/MeViS [v2] *?$'}]",
            "grpo.reward=pkg://my.rewards:f",
        ],
    )
    assert loaded.data.corpora[0].root == "/c/MeViS [v2] *?$"
    assert loaded.grpo("grpo-aks").reward == "pkg://my.rewards:f"


@pytest.mark.parametrize("text", ["/data/run #2", "/data/run  #", "a\n #b"])
def test_override_that_yaml_would_shorten_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="put the value in quotes"):
        load_recipe("laptop", [f"models.policy={text}"])
    quoted = load_recipe("laptop", ["models.policy='/data/run #2'"])
    assert quoted.models.policy == "/data/run #2"


@pytest.mark.parametrize("kind", ["run", "preflight", "train", "launch"])
def test_console_prints_one_line_and_writes_nothing(
    kind: str, here: Path, run_rcot: Callable[..., CompletedProcess[str]]
) -> None:
    words = {
        "run": ["run", "laptop", "--out", "k[12]"],
        "preflight": ["preflight", "laptop", "--out", "k[12]"],
        "train": ["train", "laptop", "--out", "k[12]"],
        "launch": ["launch", "slurm", "laptop", "launch.run_dir='k[12]'", "--dry-run"],
    }[kind]
    done = run_rcot(*words)
    assert done.returncode == 2
    assert "k[12]" in done.stderr and "'['" in done.stderr and "Traceback" not in done.stderr
    if kind in ("run", "launch"):  # others list what they lack, too
        assert done.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


def test_argument_that_names_a_file_is_not_an_option(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "-x.mp4").touch()
    (here / "--x.mp4").touch()
    (here / "--every").touch()
    given = ["segment", "-x.mp4", "--x.mp4", "-y.mp4", "--every", "2", "--", "-x.mp4"]
    wanted = ["segment", "./-x.mp4", "./--x.mp4", "-y.mp4", "--every", "2", "--", "-x.mp4"]
    assert cli._with_paths(given) == wanted
    seen = []
    monkeypatch.setattr(
        "rcot_rl.inference.segment.segment", lambda video, *a, **k: seen.append(video) or _stop()
    )
    monkeypatch.setattr(sys, "argv", ["rcot", "segment", "-x.mp4", "the dog"])
    with pytest.raises(SystemExit):
        main()
    assert seen == [Path("./-x.mp4")]


def _stop() -> None:
    raise InputError("seen")


def test_hidden_files_do_not_make_a_folder_used(here: Path) -> None:
    for name in (".DS_Store", "._recipe.yaml"):
        (here / name).write_bytes(b"x")
    assert RunFolder.claim(here, load_recipe("laptop")).root == here


def test_files_are_counted_by_type() -> None:
    names = ["b.JPG", "a.jpg", ".DS_Store", "c.webp", "._a.jpg"]
    shown = visible(Path(n) for n in names)
    assert [p.name for p in shown] == ["a.jpg", "b.JPG", "c.webp"]
    assert suffix_counts(shown) == "2 .jpg (a.jpg) and 1 .webp (c.webp)"
