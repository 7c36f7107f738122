"""The whole chain on the real stack: Ray, verl, FSDP2, vLLM, SAM2, with the shipped models.

One run serves most tests here. It is stopped by Ctrl-C in the middle of GRPO, and resumed.
"""

import json
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages.stage_run import model_of
from rcot_rl.training.checkpoint_store import find_checkpoint, settle

pytestmark = pytest.mark.slow


def metrics(run: Path, stage: str) -> list[dict]:
    path = run / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rollouts(stage: Path, step: int) -> tuple[list[dict], list[dict]]:
    """Return the responses of a step to the stage's own rows, and to rehearsed ones."""
    files = [stage / folder / f"{step}.jsonl" for folder in ("rollouts", "rehearsed")]
    texts = [file.read_text().splitlines() if file.is_file() else [] for file in files]
    own, rehearsed = [[json.loads(line) for line in lines] for lines in texts]
    return own, rehearsed


def newest(run: Path, stage: str) -> Path:
    return find_checkpoint(run / stage / "checkpoints" / "latest")


def logs(run: Path, stage: str) -> str:
    return "".join(p.read_text(errors="replace") for p in sorted((run / stage).glob("*/log.txt")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start_rcot, survivors, small):
    """Return the run's folder, the output of its commands, and what Ctrl-C left alive."""
    run = tmp_path_factory.mktemp("chain") / "run"
    command = ["run", "laptop", *small, "--out", str(run)]
    first = start_rcot(*command, mark="first", stderr=subprocess.PIPE)
    deadline = time.monotonic() + 900
    while len(metrics(run, "grpo-aks")) < 1 and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    _, first_output = first.communicate(timeout=120)
    interrupted = {
        "status": first.returncode,
        "output": first_output,
        "survivors": survivors("first"),
        "steps": [line["step"] for line in metrics(run, "grpo-aks")],
    }
    second = start_rcot(*command, mark="second", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    table, errors = second.communicate(timeout=1500)
    assert second.returncode == 0, errors[-3000:]
    return run, table, interrupted, errors, survivors("second")


def test_ctrl_c_stops_every_process_and_prints_how_to_resume(finished):
    _, _, interrupted, _, _ = finished
    assert interrupted["status"] == 130
    assert "rerun the same command to resume" in interrupted["output"]
    assert interrupted["survivors"] == []


def test_the_second_command_resumes(finished):
    run, _, _, log, _ = finished
    assert "sft: done before" in log
    assert len(list((run / "sft").glob("attempt-*"))) == 1
    assert len(list((run / "grpo-aks").glob("attempt-*"))) == 2
    steps = [line["step"] for line in metrics(run, "grpo-aks")]
    assert steps == [1, 2, 3], "every step once, whichever attempt did it"


def test_the_rows_come_in_the_order_of_a_run_that_was_never_interrupted(finished):
    """The order is derived from the seed alone. grpo-aks had two attempts, grpo-ktg one."""
    from torch import Generator, randperm

    run, *_ = finished
    # the rows of the AKS stage follow those of the KTG stage, which rehearses them
    for stage, rows, steps in (("grpo-aks", 6, 3), ("grpo-ktg", 32 + 6, 2)):
        generator, batches = Generator().manual_seed(1), []
        while len(batches) < steps:  # epoch after epoch, without the rows of a last partial batch
            order = randperm(rows, generator=generator).tolist()
            batches += [set(order[k : k + 4]) for k in range(0, rows - 3, 4)]
        for step in range(1, steps + 1):
            own, rehearsed = rollouts(run / stage, step)
            seen = {row["index"] for row in own} | {32 + row["index"] for row in rehearsed}
            assert seen == batches[step - 1], (stage, step)


def test_nothing_outlives_a_finished_run(finished):
    assert finished[4] == []


def test_every_stage_leaves_the_files_of_the_run_folder_contract(finished):
    run, table, *_ = finished
    for stage in ("data", "sft", "grpo-aks", "grpo-ktg", "predict", "eval", "report"):
        assert (run / stage / "done.json").is_file(), stage
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recorded["versions"]["verl"] == "0.9.1"
    for stage, steps in (("grpo-aks", 3), ("grpo-ktg", 2)):
        latest = run / stage / "checkpoints" / "latest"
        assert latest.read_text() == f"global_step_{steps}\n"
        for step in range(1, steps + 1):
            own, rehearsed = rollouts(run / stage, step)
            assert len(own) + len(rehearsed) == 32
            row = own[0]
            assert {row["data_source"] for row in own} == {f"rcot/{stage.removeprefix('grpo-')}"}
            assert {row["data_source"] for row in rehearsed} <= {"rcot/aks"}
            assert {"prompt_id", "response", "ground_truth", "reward", "components"} <= row.keys()
    answers = run / "predict" / "heldout" / "ktg" / "grpo-ktg-sampled.jsonl"
    assert len(answers.read_text().splitlines()) == 4 * 2  # prompts x samples
    masks = list((run / "predictions" / "mevis-valid_u").rglob("*.png"))
    assert masks and (run / "eval" / "mevis-valid_u.json").is_file()
    assert "J&F of mevis" in table and str(run / "report.html") in table


def test_training_and_rollouts_ran_on_the_real_engines(finished):
    run, *_ = finished
    for stage in ("grpo-aks", "grpo-ktg"):
        attempt = sorted((run / stage).glob("attempt-*"))[-1]
        config = yaml.safe_load((attempt / "verl.yaml").read_text())
        assert config["actor_rollout_ref"]["rollout"]["name"] == "vllm"
        assert config["actor_rollout_ref"]["actor"]["strategy"] == "fsdp2"
        log = logs(run, stage)
        assert "CpuWorkerExtension" in log and "vLLMHttpServer" in log
        saved = json.loads((newest(run, stage) / "actor/fsdp_config.json").read_text())
        assert saved["FSDP_version"] == 2


def test_rollouts_have_the_advantages_and_lengths_of_their_step(finished):
    run, *_ = finished
    for step in metrics(run, "grpo-ktg"):
        own, rehearsed = rollouts(run / "grpo-ktg", step["step"])
        rows = own + rehearsed
        lengths = [row["response_tokens"] for row in rows]
        assert sum(lengths) / len(lengths) == pytest.approx(step["response_length/mean"])
        groups: dict[str, list[dict]] = {}
        for row in rows:
            groups.setdefault(row["prompt_id"], []).append(row)
        for group in groups.values():  # eq. 14, with the standard deviation of a sample
            rewards = [row["reward"] for row in group]
            mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
            derived = [(reward - mean) / (spread + 1e-6) for reward in rewards]
            assert [row["advantage"] for row in group] == pytest.approx(derived, abs=1e-3)


def test_every_step_has_the_figures_of_the_system(finished):
    run, *_ = finished
    hosts = {"disk/free_gib", "memory_gib/node/used_max", "timing_s/step", "perf/throughput"}
    parts = {f"timing_s/{part}" for part in ("gen", "ref", "update_actor", "update_weights")}
    store = {"object_store/host0/used_gib", "object_store/host0/total_gib"}
    for stage, names in (("sft", hosts), ("grpo-ktg", hosts | parts | store)):
        for step in metrics(run, stage):
            assert names <= step.keys(), (stage, names - step.keys())
            assert not [name for name in step if name.startswith("gpu/")], "there is no GPU here"
    last = metrics(run, "grpo-ktg")[-1]
    late = ("checkpoint.json", "rcot.json")  # the manifest, and a card that is added to the model
    files = [p for p in newest(run, "grpo-ktg").rglob("*") if p.name not in late]
    size = sum(p.stat().st_size for p in files if p.is_file())
    assert last["checkpoint/size_gib"] == pytest.approx(size / 2**30)
    assert last["timing_s/save_checkpoint"] > 0
    assert 0 < last["object_store/host0/used_gib"] < last["object_store/host0/total_gib"]


def test_the_engine_samples_from_the_weights_that_were_just_trained(finished):
    """Each weight sync gives the engine the new weights.

    The actor has moved away from the reference (KL), and the engine's probabilities of its samples
    still equal the actor's.
    """
    run, *_ = finished
    last = metrics(run, "grpo-aks")[-1]
    assert last["actor/kl_loss"] > 1e-5
    assert last["actor/rollout_probs_diff_mean"] < 1e-4


def test_the_second_stage_starts_where_the_first_ended_with_sft_as_reference(finished):
    run, *_ = finished
    import torch
    from safetensors.torch import load_file

    aks = load_file(run / "grpo-aks/model/model.safetensors")
    sft = load_file(run / "sft/model/model.safetensors")
    start = torch.load(  # written by the run above
        run / "grpo-ktg/checkpoints/global_step_0/actor/model_world_size_1_rank_0.pt",
        weights_only=False,
    )
    name = next(n for n in aks if n.endswith("mlp.down_proj.weight") and "visual" not in n)
    tail = name[name.index("layers.") :]  # transformers drops a level of the name on disk
    (inside,) = [n for n in start if n.endswith(f"language_model.{tail}")]
    tensor = start[inside]
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    assert torch.equal(tensor.float(), aks[name].float())
    assert not torch.equal(aks[name], sft[name])
    first = metrics(run, "grpo-ktg")[0]
    assert first["actor/kl_loss"] > 0, "the reference is CoT-SFT's model, not the start"


def test_the_vision_tower_is_frozen_in_sft(finished):
    run, *_ = finished
    import torch
    from safetensors.torch import load_file

    from rcot_rl.inference.model_folder import find_model

    base = load_file(find_model("tiny") / "model.safetensors")
    sft = load_file(run / "sft/model/model.safetensors")
    assert base.keys() == sft.keys()
    moved = {name for name in base if not torch.equal(base[name], sft[name])}
    assert moved and not any("visual" in name for name in moved)


def test_rerunning_a_finished_run_does_nothing(finished, start_rcot, small):
    run, *_ = finished
    started = time.monotonic()
    again = start_rcot("run", "laptop", *small, "--out", str(run), stdout=subprocess.PIPE)
    table, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "J&F of mevis" in table
    assert time.monotonic() - started < 30


def test_a_copy_that_follows_links_is_a_whole_run(finished, small, tmp_path):
    """As object stores and file systems without links leave it."""
    copy = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    recipe = load_recipe("laptop", small)
    folder = RunFolder.claim(copy, recipe)
    for stage in ("sft", "grpo-aks", "grpo-ktg"):
        assert model_of(folder, recipe, stage) == copy / stage / "model"
        checkpoints = copy / stage / "checkpoints"
        assert settle(checkpoints) == int(newest(copy, stage).name.removeprefix("global_step_"))


def test_another_recipe_is_refused(finished, start_rcot, small):
    run, *_ = finished
    other = start_rcot("run", "laptop", *small, "seed=2", "--out", str(run), stderr=subprocess.PIPE)
    _, error = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "another recipe (differs in: seed)" in error and error.count("\n") == 1
