"""Jobs: shards in, checkpoints found, failures named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training import jobs
from rcot_rl.training.checkpoint_store import TRACKER, seal


def write_shard(path: Path, rows: int) -> Path:
    pq.write_table(pa.table({"a": pa.array(range(rows), pa.int64())}), path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    for k, rows in enumerate((40, 30)):
        write_shard(folder / f"train-0000{k}-of-00002.parquet", rows)
    write_shard(folder / "val-00000-of-00001.parquet", 8)
    return folder


def checkpoints(folder: Path, tracker: str | None, *steps: int) -> Path:
    """Write a folder of sealed checkpoints, and verl's pointer."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        actor = folder / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True)
        for kind in ("model", "optim", "extra_state"):
            (actor / f"{kind}_world_size_1_rank_0.pt").write_bytes(b"x" * step)
        seal(actor.parent)
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    return folder


# --- shards ---------------------------------------------------------------------------------------


def test_files_of_a_split_are_in_order_and_its_own(shards: Path) -> None:
    names = [p.name for p in jobs.split_files(shards, "train")]
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [p.name for p in jobs.split_files(shards, "val")] == ["val-00000-of-00001.parquet"]


def test_a_missing_split_is_named(shards: Path) -> None:
    with pytest.raises(InputError, match="no test shard") as caught:
        jobs.split_files(shards, "test")
    assert caught.value.file == str(shards)


def test_a_folder_without_manifest_is_no_shard_set(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest"):
        jobs.split_files(shards, "train")


def test_rows_are_counted_over_files(shards: Path) -> None:
    assert jobs.count_rows(jobs.split_files(shards, "train")) == 70


def test_an_sft_stage_on_one_task_counts_only_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    tasks = ["aks", "ktg", "ktg"] * 20
    table = pa.table({"extra_info": [{"task": task, "index": k} for k, task in enumerate(tasks)]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    steps = {}
    for given in ("null", "[ktg]", "[aks]"):
        wanted = [f"train.sft.tasks={given}", "train.sft.batch_size=10", "train.sft.epochs=2"]
        recipe = load_recipe("laptop", [*wanted, "train.sft.micro_batch_size=10"])
        attempt = tmp_path / f"attempt-{len(steps)}"
        job = jobs.sft_job(recipe, "sft", TINY, folder, tmp_path / "out", attempt)
        steps[given] = job.total_steps
    assert steps == {"null": 12, "[ktg]": 8, "[aks]": 4}
    limited = load_recipe(
        "laptop", ["train.sft.tasks=[aks]", "train.sft.verl.data.train_max_samples=9"]
    )
    with pytest.raises(InputError, match="train_max_samples"):
        jobs.sft_job(limited, "sft", TINY, folder, tmp_path / "out", tmp_path / "attempt-9")


def test_an_empty_file_is_named(shards: Path) -> None:
    empty = write_shard(shards / "train-00001-of-00002.parquet", 0)
    with pytest.raises(InputError, match="empty") as caught:
        jobs.count_rows(jobs.split_files(shards, "train"))
    assert caught.value.file == str(empty)


@pytest.mark.parametrize("damage", ["cut", "text", "nothing"])
def test_a_corrupt_file_is_named(shards: Path, damage: str) -> None:
    path = shards / "train-00000-of-00002.parquet"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-20], "text": b"not parquet at all", "nothing": b""}[damage])
    with pytest.raises(InputError, match="readable parquet") as caught:
        jobs.count_rows(jobs.split_files(shards, "train"))
    assert caught.value.file == str(path)


# --- jobs -----------------------------------------------------------------------------------------


def test_sft_steps_are_whole_batches_times_epochs(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe("laptop", ["train.sft.batch_size=32", "train.sft.epochs=3"])
    attempt = tmp_path / "sft" / "attempt-1"
    job = jobs.sft_job(recipe, "sft", TINY, shards, tmp_path / "sft", attempt)
    assert (job.total_steps, job.resumes_from) == (6, 0)  # 70 rows: 2 batches of 32, 3 times
    assert (attempt / "verl.yaml").is_file()
    assert job.config == attempt / "verl.yaml"
    assert job.environment["VERL_FILE_LOGGER_PATH"] == str(job.verl_log)
    assert job.environment["RCOT_RL_PLUGIN"] == "required"


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ("trainer.total_epochs: 2", 4),
        ("trainer.total_training_steps: 5", 5),
        ("data.train_batch_size: 64", 3),
        ("data.train_max_samples: 40", 3),
    ],
)
def test_the_last_step_is_that_of_verls_own_configuration(
    shards: Path, tmp_path: Path, keys: str, steps: int
) -> None:
    recipe = load_recipe(
        "laptop", ["train.sft.batch_size=32", "train.sft.epochs=3", f"train.sft.verl={{{keys}}}"]
    )
    job = jobs.sft_job(
        recipe, "sft", TINY, shards, tmp_path / "sft", tmp_path / "sft" / "attempt-1"
    )
    assert job.total_steps == steps


@pytest.mark.parametrize(
    ("stage", "keys", "complaint"),
    [
        ("sft", "trainer.total_training_steps: 7", "is 7, but 70 rows .* make 6 steps"),
        ("grpo-ktg", "trainer.total_epochs: 2", "is 90, but 70 rows .* make 8 steps"),
        ("grpo-ktg", "trainer.save_freq: -1", "at least 1"),
    ],
)
def test_a_last_step_that_verl_would_not_reach_or_save_is_refused(
    shards: Path, tmp_path: Path, stage: str, keys: str, complaint: str
) -> None:
    settings = ["train.sft.batch_size=32", "train.sft.epochs=3", "grpo.prompts_per_step=16"]
    recipe = load_recipe("laptop", [*settings, f"train.{stage}.verl={{{keys}}}"])
    place = (TINY, shards, tmp_path / "out", tmp_path / "out" / "attempt-1")
    with pytest.raises(InputError, match=complaint):
        if stage == "sft":
            jobs.sft_job(recipe, "sft", *place)
        else:
            jobs.grpo_job(recipe, stage, *place)
    assert not (tmp_path / "out").exists()


def test_a_complete_unsealed_checkpoint_is_sealed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "grpo-ktg"
    actor = out / "checkpoints" / "global_step_48" / "actor"
    actor.mkdir(parents=True)
    names = [f"{kind}_world_size_1_rank_0.pt" for kind in ("model", "optim", "extra_state")]
    for path in [*(actor / name for name in names), actor.parent / "data.pt"]:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data", "x")
    assert jobs.sealed_step(out / "checkpoints") == 0
    job = jobs.grpo_job(load_recipe("laptop"), "grpo-ktg", TINY, shards, out, out / "attempt-1")
    assert (job.resumes_from, jobs.sealed_step(out / "checkpoints")) == (48, 48)
    facts = json.loads((actor.parent / "provenance.json").read_text())
    assert facts["stage"] == "grpo-ktg"


def test_too_few_rows_for_one_batch_are_an_error(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe("laptop", ["train.sft.batch_size=96", "grpo.prompts_per_step=128"])
    place = (TINY, shards, tmp_path / "out", tmp_path / "out" / "attempt-1")
    with pytest.raises(InputError, match=r"70 rows.*96"):
        jobs.sft_job(recipe, "sft", *place)
    with pytest.raises(InputError, match=r"70 rows.*128"):
        jobs.grpo_job(recipe, "grpo-ktg", *place)
    assert not (tmp_path / "out").exists()


def test_a_rehearsed_stage_adds_its_rows_and_its_reward(shards: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    others = shutil.copytree(shards, tmp_path / "others")
    (others / "manifest.json").write_text("{} ")
    attempt = tmp_path / "out" / "attempt-1"
    place = (TINY, shards, tmp_path / "out", attempt)
    jobs.grpo_job(load_recipe("laptop"), "grpo-ktg", *place, rehearsed=others)
    config = OmegaConf.load(attempt / "verl.yaml")
    folders = [Path(file).parent for file in config.data.train_files]
    assert folders == [shards, shards, others, others]
    assert [Path(file).parent for file in config.data.val_files] == [shards]
    kwargs = config.reward.custom_reward_function.reward_kwargs
    assert (kwargs.reward, kwargs.rehearsed) == ("ktg", {"rcot/aks": "aks"})
    facts = config.trainer.rcot.provenance
    assert facts.rehearses.shards_sha256 != facts.shards_sha256
    assert (facts.rehearses.stage, facts.rehearses.reward) == ("grpo-aks", "aks")
    unknown = load_recipe("laptop", ["train.grpo-aks.shard_set=elsewhere"])
    with pytest.raises(InputError, match=r"rehearse: needs elsewhere in data\.sets"):
        jobs.grpo_job(unknown, "grpo-ktg", *place, rehearsed=others)


def test_a_grpo_job_resumes_and_passes_the_environment_to_its_workers(
    shards: Path, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    recipe = load_recipe("laptop")
    out = tmp_path / "grpo-ktg"
    checkpoints(out / "checkpoints", "24", 12, 24)
    job = jobs.grpo_job(recipe, "grpo-ktg", TINY, shards, out, out / "attempt-2", "py -x")
    assert (job.total_steps, job.resumes_from) == (90, 24)
    config = OmegaConf.load(out / "attempt-2" / "verl.yaml")
    runtime = config.ray_kwargs.ray_init.runtime_env
    assert runtime.py_executable == "py -x"
    assert dict(runtime.env_vars) == job.environment
    assert [Path(p).name for p in config.data.val_files] == ["val-00000-of-00001.parquet"]


def test_workers_of_a_running_ray_write_their_stacks_into_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("laptop", ["cluster.ray_address=auto"])
    out = Path("grpo-ktg")
    jobs.grpo_job(recipe, "grpo-ktg", TINY, shards, out, out / "attempt-1")
    runtime = OmegaConf.load(out / "attempt-1" / "verl.yaml").ray_kwargs.ray_init.runtime_env
    assert runtime.env_vars["RCOT_STACKS"] == str(tmp_path / "grpo-ktg/attempt-1/stacks")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "steps", "newest"),
    [
        (None, (), 0),
        (None, (10,), 10),  # killed before verl pointed to it
        ("20", (10, 20), 20),
        ("30", (10, 20), 20),  # it points to what is not there
        ("0", (0,), 0),
        ("", (10,), 10),  # killed while verl wrote the pointer
        ("ten", (10,), 10),
    ],
)
def test_the_newest_step_is_that_of_the_newest_whole_checkpoint(
    tmp_path: Path, tracker: str | None, steps: tuple[int, ...], newest: int
) -> None:
    folder = checkpoints(tmp_path / "checkpoints", tracker, *steps)
    assert jobs.newest_step(folder) == newest
    assert jobs.is_started(folder) == bool(steps)
    if newest:
        assert jobs.newest_checkpoint(folder) == folder / f"global_step_{newest}"
    else:
        with pytest.raises(InputError, match="no checkpoint"):
            jobs.newest_checkpoint(folder)


def test_a_missing_checkpoint_folder_has_no_newest_step(tmp_path: Path) -> None:
    assert jobs.newest_step(tmp_path / "none") == 0
    assert not jobs.is_started(tmp_path / "none")


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with and without links (some network mounts and object stores have none)."""
    if request.param == "no links":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "symlink", refuse)


def trained_stage(stage: Path, *steps: int) -> Path:
    """Write a GRPO stage's folder with checkpoints of the tiny model; return the newest."""
    for step in steps:
        checkpoint = stage / "checkpoints" / f"global_step_{step}"
        shutil.copytree(TINY, checkpoint / "actor" / "huggingface")
        (checkpoint / "actor" / "huggingface" / "rcot.json").unlink()  # verl saves none
        (checkpoint / "actor" / "huggingface" / "step").write_text(str(step))
        seal(checkpoint)
    return checkpoint


def test_a_stages_model_is_a_folder_of_its_own_and_replaced(file_system, tmp_path: Path) -> None:
    stage, recipe = tmp_path / "run" / "grpo-ktg", load_recipe("laptop")
    for step in (10, 20):
        jobs.publish_model(trained_stage(stage, step), stage / "model", recipe)
        assert (jobs.stage_model(stage) / "step").read_text() == str(step)
    shutil.rmtree(stage / "checkpoints")
    (tmp_path / "run").rename(tmp_path / "moved")
    model = jobs.stage_model(tmp_path / "moved" / "grpo-ktg")
    assert model == tmp_path / "moved" / "grpo-ktg" / "model"
    assert (model / "rcot.json").is_file()
    assert {p.name for p in model.parent.iterdir()} == {"model"}


@pytest.mark.parametrize("damage", ["none", "links followed", "links lost"])
def test_a_model_that_an_earlier_version_linked_is_found_and_replaced(
    tmp_path: Path, damage: str
) -> None:
    stage, recipe = tmp_path / "grpo-ktg", load_recipe("laptop")
    checkpoint = trained_stage(stage, 10)
    (stage / "model").symlink_to("checkpoints/global_step_10/actor/huggingface")
    jobs.write_card(stage / "model", recipe)  # through the link, as it was written then
    if damage == "links followed":
        stage = Path(shutil.copytree(stage, tmp_path / "copy"))
    elif damage == "links lost":
        (stage / "model").unlink()
    assert (jobs.stage_model(stage) / "step").read_text() == "10"
    checkpoint = stage / "checkpoints" / checkpoint.name
    jobs.publish_model(checkpoint, stage / "model", recipe)
    assert (stage / "model").is_dir() and not (stage / "model").is_symlink()
    assert (checkpoint / "actor" / "huggingface" / "step").read_text() == "10"


def test_a_stage_that_is_not_finished_has_no_model(tmp_path: Path) -> None:
    trained_stage(tmp_path, 10)
    with pytest.raises(InputError, match="has no model yet"):
        jobs.stage_model(tmp_path)


def test_a_checkpoint_without_a_model_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "global_step_1" / "actor").mkdir(parents=True)
    with pytest.raises(InputError, match="Hugging Face"):
        jobs.publish_model(tmp_path / "global_step_1", tmp_path / "model", load_recipe("laptop"))
    assert not (tmp_path / "model").exists()


def test_a_models_card_records_prompts_and_canvases(tmp_path: Path) -> None:
    jobs.write_card(tmp_path, load_recipe("laptop"))
    card = json.loads((tmp_path / "rcot.json").read_text())
    form = {"prompts": "compact", "response": "think_answer"}
    assert card == {**form, "image_canvas": 112, "video_canvas": 112}


# --- failures -------------------------------------------------------------------------------------

RAY = """\
(WorkerDict pid=4242) step 3
\x1b[36m(TaskRunner pid=77)\x1b[0m Traceback (most recent call last):
\x1b[36m(TaskRunner pid=77)\x1b[0m   File "trainer.py", line 12, in fit
\x1b[36m(TaskRunner pid=77)\x1b[0m torch.OutOfMemoryError: CUDA out of memory, 2 GiB asked
Traceback (most recent call last):
  File "grpo_main.py", line 40, in <module>
ray.exceptions.RayTaskError(OutOfMemoryError): \x1b[36mray::TaskRunner.run()\x1b[39m (pid=77)
ray.exceptions.ActorDiedError: The actor died unexpectedly
"""
TORCHRUN = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "sft_main.py", line 9, in <module>
[rank0]: ValueError: sequence of 5000 tokens is longer than max_length=4024
E0101 00:00:00.000000 1 torch/distributed/elastic: failed (exitcode: 1)
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====
sft_main FAILED
"""
CHAINED = """\
KeyError: 'images'

During handling of the above exception, another exception occurred:

rcot_rl.errors.InputError: shards/a: has no images
cleaning up
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (RAY, "torch.OutOfMemoryError: CUDA out of memory, 2 GiB asked"),
        (TORCHRUN, "ValueError: sequence of 5000 tokens is longer than max_length=4024"),
        (CHAINED, "rcot_rl.errors.InputError: shards/a: has no images"),
        (
            "loading\nNo errors so far: Error rate 0\nKilled\n",
            "loading | No errors so far: Error rate 0 | Killed",
        ),
        ("", ""),
    ],
    ids=["ray", "torchrun", "chained", "no exception", "empty"],
)
def test_the_reason_of_a_failure_is_read_from_the_log(
    tmp_path: Path, log: str, reason: str
) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert jobs.failure_reason(path) == reason


def test_hostile_logs_are_read_quickly(tmp_path: Path) -> None:
    import time

    path = tmp_path / "log"
    path.write_bytes(b"(a) " * 50_000 + b"\n" + b"[x]: " * 50_000 + b"\n\xff\xfe" + b"a." * 100_000)
    started = time.monotonic()
    assert len(jobs.failure_reason(path)) <= 600
    assert time.monotonic() - started < 2
