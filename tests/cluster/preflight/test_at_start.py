"""Faults that are known beforehand stop a run before it writes: `preflight.plan.check_run`."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.preflight import at_start as preflight
from cluster.preflight.plan import check_launch, check_run
from rcot_rl.chain import run
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder

ALL = ("data", "sft", "grpo-aks", "grpo-ktg", "predict")


def check(recipe, root, stages) -> list[str]:
    shown: list[str] = []
    check_run(recipe, root, tuple(stages), shown.append)
    return shown


def fault(tmp_path, *overrides: str, stages=ALL) -> str:
    with pytest.raises(InputError) as caught:
        check(load_recipe("laptop", list(overrides)), tmp_path / "run", stages)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_the_laptop_recipe_passes(tmp_path):
    assert check(load_recipe("laptop"), tmp_path, ALL) == []


def test_a_running_ray_that_would_be_ignored_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    message = fault(tmp_path)
    assert "RAY_ADDRESS=10.0.0.1:6379" in message and "cluster.ray_address" in message


def test_an_address_where_no_ray_answers_is_an_error(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "no Ray answers" in fault(tmp_path, f"cluster.ray_address=127.0.0.1:{port}")


def test_a_ray_that_answers_is_accepted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        recipe = load_recipe("laptop", [f"cluster.ray_address={address}"])
        check(recipe, tmp_path, ALL)


def test_wandb_online_needs_a_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "wandb login" in fault(tmp_path, "wandb.mode=online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check(load_recipe("laptop", ["wandb.mode=online"]), tmp_path, ALL)


OWN = "https://wandb.corp.example:8443"
LOGIN = "machine {} login user password " + "k" * 40 + "\n"


@pytest.mark.parametrize(
    ("variable", "setting", "entry", "refused"),
    [
        (OWN, None, "wandb.corp.example:8443", None),
        (None, OWN, "wandb.corp.example:8443", None),
        (None, None, "api.wandb.ai", None),
        (OWN, "https://api.wandb.ai", "wandb.corp.example:8443", None),
        (OWN, None, "api.wandb.ai", f"wandb login --host={OWN}"),
        (None, OWN, "api.wandb.ai", f"wandb login --host={OWN}"),
        (None, None, "wandb.corp.example:8443", "wandb login`"),
        (None, None, "api.wandb.ai.example", "wandb login`"),
        ("wandb.corp.example", None, "wandb.corp.example", "is no URL"),
    ],
)
@pytest.mark.parametrize("place", ["NETRC", "HOME"])
def test_a_login_must_be_for_the_server_that_wandb_uses(
    tmp_path, monkeypatch, variable, setting, entry, refused, place
):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / (".netrc" if place == "HOME" else "mine")
    file.write_text(LOGIN.format(entry))
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(file))
    if variable:
        monkeypatch.setenv("WANDB_BASE_URL", variable)
    if setting:
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config/wandb/settings").write_text(f"[default]\nbase_url = {setting}\n")
    recipe = load_recipe("laptop", ["wandb.mode=online"])
    if refused is None:
        preflight.check_wandb(recipe)
    else:
        with pytest.raises(InputError, match="W&B") as caught:
            preflight.check_wandb(recipe)
        assert refused in str(caught.value)
    file.write_text("secret-secret nonsense\n")
    if refused != "is no URL":
        with pytest.raises(InputError, match="as a netrc file") as caught:
            preflight.check_wandb(recipe)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    preflight.check_wandb(recipe)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "FREE_BYTES", 1 << 62)
    assert "GiB free" in fault(tmp_path)


def test_a_missing_corpus_is_named(tmp_path):
    message = fault(tmp_path, "data.corpora=[{dataset: mevis, root: /nowhere/mevis}]")
    assert "no such corpus" in message and "/nowhere/mevis" in message


def test_a_model_folder_without_a_processor_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert str(tmp_path / "model") in fault(tmp_path, f"models.policy={tmp_path / 'model'}")


def test_an_unknown_reward_is_named_with_those_that_exist(tmp_path):
    message = fault(tmp_path, "train.grpo-ktg.reward=nonsense")
    assert message.startswith("train.grpo-ktg.reward: nonsense: no such reward recipe (shipped: ")


def test_an_unknown_prompt_set_is_an_error(tmp_path):
    assert "prompt set" in fault(tmp_path, "prompts=nonsense")


def test_a_folder_that_is_no_segmenter_is_an_error(tmp_path):
    assert "Sam2Video" in fault(tmp_path, f"models.segmenter={tmp_path}")


def test_a_users_reward_must_keep_its_contract(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(response, ground_truth):\n    return 'much'\n")
    message = fault(tmp_path, f"train.grpo-ktg.reward={file}:score")
    assert "train.grpo-ktg.reward" in message and "rcot score --check" in message
    file.write_text("def score(response, ground_truth):\n    return 1 / (1 + len(response))\n")
    recipe = load_recipe("laptop", [f"train.grpo-ktg.reward={file}:score"])
    check(recipe, tmp_path / "run", ALL)


# --- when, and what for ---------------------------------------------------------------------------


TYPO = "grpo.verl={trainer.balance_batchs: true}"


def test_a_run_stops_before_it_writes_anything(tmp_path):
    recipe = load_recipe("laptop", [TYPO, "train.grpo-aks.top_k=0"])
    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []
    typo, top_k = sorted(caught.value.faults)
    assert typo.startswith("grpo.verl: verl has no key trainer.balance_batchs; did you mean")
    assert top_k.startswith("train.grpo-aks.top_k=0: ") and top_k.endswith(
        "fix: train.grpo-aks.top_k=-1"
    )


def test_only_stages_that_are_not_done_are_checked(tmp_path):
    recipe = load_recipe("laptop", ["train.grpo-aks.verl={trainer.balance_batchs: true}"])
    root = tmp_path / "run"
    folder = RunFolder.claim(root, recipe)
    (root / "grpo-aks").mkdir()
    folder.mark_done("grpo-aks")
    check(recipe, root, ALL)
    for stage in ALL:
        (root / stage).mkdir(exist_ok=True)
        folder.mark_done(stage)
    broken = load_recipe("laptop", ["models.policy=/nowhere"])
    assert check(broken, root, ALL) == []  # nothing is left to do


def test_a_command_for_one_stage_needs_the_results_of_the_others(tmp_path):
    assert "the result of sft" in fault(tmp_path, stages=["grpo-aks"])
    assert "is no shard set" in fault(tmp_path, stages=["sft"])
    assert "the result of grpo-aks" in fault(tmp_path, stages=["sft", "grpo-ktg"])
    assert "no stage makes sft" in fault(tmp_path, stages=["predict"])


def test_warnings_are_short_and_do_not_stop(tmp_path):
    shown = check(load_recipe("laptop", ["grpo.kl_loss_coef=0"]), tmp_path, ALL)
    assert len(shown) == 2 and shown[0].startswith("warning: grpo.kl_loss_coef=0, and")


def test_space_that_a_resumed_run_uses_already_is_not_counted_again(tmp_path, monkeypatch):
    recipe = load_recipe("laptop")
    old = tmp_path / "run" / "grpo-aks" / "checkpoints" / "global_step_12"
    RunFolder.claim(tmp_path / "run", recipe)
    from cluster.preflight.checks import case as cases

    real = cases.shutil.disk_usage
    little = 2**31 + 2**20
    monkeypatch.setattr(
        cases.shutil,
        "disk_usage",
        lambda path: type(real(path))(*real(path)[:2], little if "shm" not in str(path) else 2**40),
    )
    monkeypatch.setattr("cluster.preflight.checks.estimates.shard_bytes", lambda case: None)
    from cluster.preflight.checks import estimates

    monkeypatch.setattr(
        estimates, "disk", lambda case: estimates.Estimate(2.5, "checkpoints of a large model")
    )
    assert "the run will write 2.5 GiB" in fault(tmp_path)
    old.mkdir(parents=True)
    with (old / "model.pt").open("wb") as file:
        file.truncate(2**30)
    check(recipe, tmp_path / "run", ALL)


@pytest.mark.parametrize("launcher", ["ray", "slurm", "kuberay"])
def test_every_launcher_checks_the_recipe_first(tmp_path, launcher, run_rcot):
    words = ["launch", launcher, "laptop", "--dry-run"]
    settings = ["cluster.ray_address=auto", "train.grpo-ktg.top_k=0", TYPO]
    done = run_rcot(*words, *settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    typo, top_k = sorted(line for line in done.stderr.splitlines() if line.startswith("rcot: "))
    assert "trainer.balance_batchs" in typo and "train.grpo-ktg.top_k=0" in top_k


def test_a_launcher_does_not_need_the_files_of_other_hosts(tmp_path):
    shown: list[str] = []
    settings = [
        "models.policy=/scratch/model",
        "models.segmenter=/scratch/sam2",
        "prompts=/scratch/p.yaml",
        "data.corpora=[{dataset: mevis, root: /scratch/mevis}]",
        "cluster.gpus_per_node=8",
        "train.grpo-aks.reward=/scratch/mine.py:f",
        "train.grpo-ktg.reward=pkg://mine",
        "toy=null",
        f"eval.benchmarks={json.dumps([{'dataset': 'mevis', 'root': '/scratch/mevis'}])}",
        "grpo.micro_batch_size=16",
        "train.sft.micro_batch_size=4",
    ]
    recipe = load_recipe("laptop", settings)
    check_launch(recipe, Path("/scratch/run"), shown.append)
    assert shown[0].startswith("not checked here: ") and "grpo-aks.reward" in shown[0]
    shared: list[str] = []
    check_launch(recipe, Path("/scratch/run"), shared.append, shared=False)
    assert shared == shown
    with pytest.raises(InputError, match="mine"):  # the files are this host's too
        check_launch(recipe, tmp_path / "run", shared.append, shared=True)


def test_on_shared_files_a_missing_corpus_is_a_warning(tmp_path):
    shown: list[str] = []
    corpora = "data.corpora=[{dataset: mevis, root: /nowhere/mevis}]"
    check_launch(load_recipe("laptop", [corpora]), tmp_path, shown.append, shared=True)
    assert any("/nowhere/mevis" in line for line in shown)


@pytest.mark.slow
def test_a_misspelt_verl_key_stops_the_command_before_anything_is_written(tmp_path):
    """Runs the installed console script in an empty folder."""
    program = Path(sys.executable).with_name("rcot")
    done = subprocess.run(
        [program, "run", "laptop", TYPO, "--out", tmp_path / "runs" / "a"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rcot: grpo.verl: verl has no key trainer.balance_batchs")
    assert list(tmp_path.iterdir()) == []
