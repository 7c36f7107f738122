"""The preflight on stages of any name: starts, references, rewards and rows of each."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.preflight.checks.findings import Report
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.loader import RECIPES
from rcot_rl.runfolder import RunFolder


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


def messages(report: Report, code: str) -> list[str]:
    return [finding.message for finding in report.findings if finding.code == code]


THREE = """\
extends: laptop.yaml
train:
  grpo-aks: null
  grpo-ktg: null
  look: {kind: grpo, shard_set: grpo-aks-480, reward: aks, steps: 24}
  point: {kind: grpo, shard_set: grpo-ktg-960, reward: ktg, steps: 24}
  both: {kind: grpo, shard_set: grpo-mixed, reward: joint, steps: 24, after: look}
data:
  sets:
    sft-384: {ktg: 1024, aks: 512, val: 64}
    grpo-aks-480: {aks: 640, val: 256}
    grpo-ktg-960: {ktg: 960, val: 256}
    grpo-mixed: {aks: 320, ktg: 320, val: 64}
eval: {checkpoints: null}
"""


@pytest.fixture
def three(tmp_path: Path) -> str:
    """Return a recipe with an SFT stage and three GRPO stages of free names."""
    path = tmp_path / "three.yaml"
    path.write_text(THREE.replace("laptop.yaml", str(RECIPES.folder / "laptop.yaml")))
    return str(path)


def test_stages_of_any_name_pass_and_are_planned(look: Callable[..., Report], three: str) -> None:
    report = look(three)
    assert codes(report) <= {"versions"}, report.text()
    for stage in ("look", "point", "both"):
        assert "24 steps x 16 prompts" in report.plan[stage]
    assert {"both: aks prompt", "both: ktg prompt", "look: aks prompt"} <= report.plan.keys()
    assert "look: ktg prompt" not in report.plan


def test_a_fault_of_all_grpo_stages_is_one_line_and_of_some_names_them(
    look: Callable[..., Report], three: str
) -> None:
    together = look(three, "grpo.top_k=0").errors
    assert together == ["grpo.top_k=0: vLLM takes -1 for all tokens, or a number from 1"]
    some = look(three, "train.look.top_k=0", "train.both.top_k=0").errors
    assert [line.partition(":")[0] for line in some] == ["train.look.top_k=0", "train.both.top_k=0"]
    assert codes(look(three, "train.both.top_k=0")) >= {"both.top_k"}


def test_a_stage_needs_its_start_and_its_reference(
    look: Callable[..., Report], three: str, tmp_path: Path
) -> None:
    lone = "stages=[data, both]"
    needed = messages(look(three, lone), "stages.order")
    assert ["both needs the result of sft" in line for line in needed] == [True, False]
    assert "both needs the result of look" in needed[1]
    root = tmp_path / "run"
    (root / "both" / "checkpoints" / "global_step_2").mkdir(parents=True)
    needed = messages(look(three, lone, root=root), "stages.order")
    assert len(needed) == 1 and "the result of sft" in needed[0], "a checkpoint has the policy"
    RunFolder(root).mark_done("sft")
    assert not messages(look(three, lone, root=root), "stages.order")


def test_an_adapter_continues_only_one_of_its_rank_and_model(
    look: Callable[..., Report], three: str
) -> None:
    assert "both.adapter" not in codes(look(three, "grpo.lora_rank=4"))
    wrong = look(three, "grpo.lora_rank=4", "train.look.verl.actor_rollout_ref.model.lora_rank=8")
    assert {"point.adapter", "both.adapter"} <= codes(wrong)
    other = look(three, "grpo.lora_rank=4", "train.both.reference=base")
    assert messages(other, "both.adapter")[0].startswith("train.both.reference is base, that of")


def test_a_reward_must_score_the_rows_of_its_stage(
    look: Callable[..., Report], three: str, tmp_path: Path
) -> None:
    assert messages(look(three, "train.both.reward=kfg"), "both.reward_task")
    assert "320 aks rows of 640" in messages(look(three, "train.both.reward=aks"), "both.task")[0]
    swapped = messages(look(three, "train.look.reward=ktg"), "look.reward_task")
    assert swapped == ["train.look.reward: ktg is a reward of ktg, and the stage's rows ask aks"]
    reward = tmp_path / "own.py"
    reward.write_text("def score(response, ground_truth):\n    return 1 / (1 + len(response))\n")
    assert look(three, f"train.both.reward={reward}:score").ok, "a function may score all rows"


def test_every_sft_stage_is_checked(look: Callable[..., Report], three: str) -> None:
    second = "train.warmup={kind: sft, shard_set: sft-384, max_length: 20, after: sft}"
    report = look(three, second, "train.warmup.lora_alpha=900", "train.warmup.batch_size=8")
    assert {"warmup.tokens", "warmup.lora_alpha"} <= codes(report)
    assert not {"sft.tokens", "sft.lora_alpha"} & codes(report)


def test_missing_held_out_rows_are_an_error(look: Callable[..., Report], three: str) -> None:
    stages = ("stages=[predict]", "eval.checkpoints=[base]")
    assert len(messages(look(three, *stages), "eval.heldout")) == 1, "both measures both tasks"
    assert not messages(look(three, *stages, "eval.heldout_prompts=0"), "eval.heldout")


def test_grpo_without_sft_needs_no_sft(look: Callable[..., Report]) -> None:
    report = look("rcot_seg_3b_no_sft")
    assert "stages.order" not in codes(report) and report.plan["grpo-aks"]
    assert "sft" not in report.plan["checkpoints"]
    assert "stages.order" in codes(look("rcot_seg_3b_no_sft", "stages=[data, grpo-ktg]"))


def test_a_joint_stage_starts_at_sft(look: Callable[..., Report]) -> None:
    assert "stages.order" not in codes(look("rcot_seg_3b_joint"))
    assert "stages.order" in codes(look("grpo_ktg"))


def test_a_benchmark_without_masks_is_a_warning(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    """Ref-YouTube-VOS publishes its validation split, and others their test splits, so."""
    root = tmp_path / "ytvos"
    write_corpus(root, "ref-youtube-vos", "valid", 2, 1, "lattice")
    benchmark = f"eval.benchmarks=[{{dataset: ref-youtube-vos, root: {root}}}]"
    assert "eval.masks" not in {f.code for f in look("laptop", benchmark).findings}
    shutil.rmtree(root / "valid" / "Annotations")
    (root / "valid" / "meta.json").unlink(missing_ok=True)
    assert "eval.masks" in {f.code for f in look("laptop", benchmark).findings}
