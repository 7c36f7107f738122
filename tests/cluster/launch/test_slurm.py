"""The sbatch script as text: it parses, quotes user text, and contains no secret's value."""

import os
import shlex
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.launch import render, slurm
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import dump_recipe, load_recipe, recipe_hash

TWO = ["cluster.nodes=2"]
NASTY = [
    "a b",
    "it's",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "x\ny",
    "*",
    "\\",
    "!",
    ";rm",
    "",
    "~",
]


def make(*overrides, recipe="rcot_seg_3b", **options):
    loaded = load_recipe(recipe, [*TWO, *overrides])
    return slurm.script(loaded, recipe, [*TWO, *overrides], **options)


def settings_of(text: str) -> str:
    """Return the script's variables, which come before its fixed part."""
    return text[text.index("set -euo pipefail") : text.index("here=$folder")]


def array(text: str, name: str, cwd) -> list[str]:
    """Return one of the script's arrays, as bash expands it."""
    program = f'{settings_of(text)}\nprintf "%s\\0" "${{{name}[@]}}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, cwd=cwd, check=True)
    return [word.decode() for word in done.stdout.split(b"\0")[:-1]]


def test_bash_parses_the_script(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(make().text)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_finding(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(make('models.policy="$(x)"', "launch.slurm.srun=[--mpi=none]").text)
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.stdout == "" and done.returncode == 0


def test_words_stay_literal(tmp_path):
    text = make(command=["echo", *NASTY]).text
    assert array(text, "command", tmp_path) == ["echo", *NASTY]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
def test_any_words_stay_literal(words, tmp_path):
    assert array(make(command=words).text, "command", tmp_path) == words


def test_overrides_reach_the_run_as_given(tmp_path):
    given_overrides = ["models.policy=$(touch pwned)", "wandb.project='a b'"]
    words = array(make(*given_overrides).text, "command", tmp_path)
    assert words[6:] == ["rcot_seg_3b", *TWO, *given_overrides, "cluster.ray_address=auto"]
    assert words[1:4] == ["-m", "rcot_rl.cli", "run"]
    assert list(tmp_path.iterdir()) == []


def test_plain_environment_is_quoted_and_secrets_are_names_only(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-value")
    text = make("launch.secrets=[WANDB_API_KEY]", "launch.environment.NOTE=\"a $(b) 'c'\"").text
    assert "hunter2-value" not in text
    assert "needed=(WANDB_API_KEY)" in text
    assert f"export NOTE={shlex.quote(chr(97) + ' $(b) ' + chr(39) + 'c' + chr(39))}" in text


def test_a_missing_secret_is_named(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    recipe = load_recipe("rcot_seg_3b", ["launch.secrets=[HF_TOKEN]"])
    with pytest.raises(InputError, match=r"launch\.secrets\.0: HF_TOKEN"):
        render.check_environment(recipe)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SB")]


def test_directives_follow_the_recipe():
    settings = [
        "launch.slurm.partition=h100",
        'launch.slurm.time="1-00:00:00"',
        "launch.slurm.sbatch=[--mail-type=END]",
    ]
    options = directives(make(*settings).text)
    assert set(options) >= {
        *("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:4", "--partition=h100", "--exclusive"),
        *("--time=1-00:00:00", "--signal=B:TERM@120", "--no-requeue", "--mail-type=END"),
        # 3 per GPU, 24 workers on two nodes, 4 for Ray and the driver
        f"--cpus-per-task={3 * 4 + 12 + 4}",
    }


def test_every_node_gets_the_metrics_port(tmp_path):
    options = array(make("cluster.metrics_port=8090").text, "node_options", tmp_path)
    assert "--metrics-port=8090" in options
    assert not [o for o in array(make().text, "node_options", tmp_path) if "metrics" in o]


def test_requeue_uses_another_signal_than_scancel():
    """scancel sends TERM: a cancelled job must not come back."""
    options = directives(make("launch.slurm.requeue=true").text)
    assert "--signal=B:USR1@120" in options and "--requeue" in options


def test_a_cpu_recipe_asks_no_gpus():
    text = make("train.sft.micro_batch_size=1", "grpo.micro_batch_size=1", recipe="laptop").text
    assert not [d for d in directives(text) if d.startswith("--gres")]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("launch.slurm.partition='a b'", "launch.slurm.partition"),
        ('launch.slurm.partition="a\\n#SBATCH --uid=0"', "launch.slurm.partition"),
        ("launch.slurm.time=1:00:00", "launch.slurm.time"),
        ('launch.slurm.time="soon"', "launch.slurm.time"),
        ("launch.slurm.sbatch=['--nodes=9']", "launch.slurm.sbatch.0"),
        ("launch.slurm.sbatch=['--comment=a b']", "launch.slurm.sbatch.0"),
        ("launch.slurm.srun=['--mpi=$(x)']", "launch.slurm.srun.0"),
        ("launch.slurm.setup_script=env.sh", "launch.slurm.setup_script"),
        ("launch.slurm.memory=lots", "launch.slurm.memory"),
        ("launch.secrets=['A=B']", "launch.secrets.0"),
        ("launch.environment.WANDB_API_KEY=abc", "launch"),
        ("launch.run_dir='my runs/a'", "launch.run_dir"),
        ("launch.run_dir=runs/%j", "launch.run_dir"),
    ],
)
def test_bad_settings_are_named(override, key):
    with pytest.raises(InputError) as caught:
        make(override)
    assert caught.value.key == key


def test_launch_settings_do_not_change_the_recipe_hash():
    one = load_recipe("rcot_seg_3b")
    other = load_recipe("rcot_seg_3b", ["launch.slurm.partition=other"])
    assert recipe_hash(one) == recipe_hash(other)
    assert "partition" not in dump_recipe(other)


def test_dry_run_with_out_only_writes_the_script(tmp_path, run_rcot):
    words = ["launch", "slurm", "rcot_seg_3b", "--dry-run", "--out", "o"]
    done = run_rcot(*words, cwd=tmp_path, PATH=str(tmp_path / "empty"))  # without sbatch
    assert (done.returncode, done.stdout) == (0, "o/job.sh\n")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    assert (tmp_path / "o" / "job.sh").read_text().startswith("#!/usr/bin/env bash\n#SBATCH ")


def test_variables_of_an_interactive_allocation_do_not_reach_the_job(tmp_path, monkeypatch):
    """srun refuses SLURM_MEM_PER_CPU beside the job's own SLURM_MEM_PER_NODE."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen; echo '12;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "1")
    assert slurm.submit(slurm.SbatchScript("#!/bin/sh\n", tmp_path / "job")) == "12"
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {"SLURM_CONF=1", "MINE=1"} <= set(seen)
    assert not [row for row in seen if row.startswith(("SLURM_MEM", "SLURM_JOB"))]
