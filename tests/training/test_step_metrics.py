"""What our GRPO trainer adds to a step's metrics, with verl's own step replaced."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

CODE = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from rcot_rl.training.grpo_trainer import RCoTTrainer

    class Hosts:
        calls = 0

        def metrics(self):
            self.calls += 1
            return {"gpu/host0/memory_gib/max": float(self.calls)}

    def compute(self, batch, metrics, timing_raw, global_steps, epoch):
        metrics["response_length/mean"] = 30.0

    PPOTrainer.step = lambda self, metrics, timing_raw: timing_raw.update(gen=2.0)
    PPOTrainer._compute_metrics = compute
    trainer = object.__new__(RCoTTrainer)
    trainer._hosts, trainer.global_steps, trainer.steps_per_epoch = Hosts(), 1, 1
    trainer.config = OmegaConf.create({"trainer": {"default_local_dir": sys.argv[1]}})
    row = {"uid": "a", "sample": 0, "turn": 0, "reward": 1.0, "components": {}, "reasons": [],
           "rehearsed": False}
    other = {"uid": "b", "reward": 3.0, "components": {"x": 3.0}, "rehearsed": True}
    trainer._reward_rows = lambda batch: [row, row | {"sample": 1}, row | other]
    steps = []
    for _ in range(2):
        metrics, timing = {}, {}
        batch = trainer.step(metrics, timing)
        trainer._save_metrics(Path(sys.argv[1]) / "global_step_1")
        trainer._compute_metrics(batch, metrics, timing, 1, 0)
        steps.append(metrics)
    saved = json.loads((Path(sys.argv[1]) / "global_step_1" / "metrics.json").read_text())
    print("RESULT" + json.dumps([*steps, saved]))
    """
)


def test_a_step_that_saves_takes_the_hosts_figures_once(run_verl_python, tmp_path: Path):
    output = run_verl_python(CODE, str(tmp_path))
    first, second, saved = json.loads(output.partition("RESULT")[2].splitlines()[0])
    name = "gpu/host0/memory_gib/max"
    assert [first[name], second[name]] == [1.0, 2.0]
    assert saved[name] == 2.0, "the checkpoint holds the figures of its own step"
    assert first["perf/response_tokens_per_s"] == pytest.approx(3 * 30 / 2.0)
    assert (first["reward/mean"], first["rehearsed/reward/mean"]) == (1.0, 3.0)
    assert first["rehearsed/reward/x/mean"] == 3.0 and "reward/x/mean" not in first
    assert first["disk/free_gib"] > 0


ROWS = textwrap.dedent(
    """
    import json, sys
    from types import SimpleNamespace
    import torch
    from omegaconf import OmegaConf
    from tensordict import NonTensorStack, TensorDict
    from rcot_rl.training import grpo_trainer

    class Counting(TensorDict):
        reads = 0

        def __getitem__(self, key):
            Counting.reads += isinstance(key, str)
            return super().__getitem__(key)

    def batch(size):
        scores = torch.nested.as_nested_tensor(
            [torch.tensor([0.0] * i + [float(i)]) for i in range(size)], layout=torch.jagged)
        extra = [{"reward_extra_info": {"component/x": i, "reasons": "a;b"}} for i in range(size)]
        sources = ["rcot/aks" if i == 0 else "rcot/ktg" for i in range(size)]
        columns = {"data_source": NonTensorStack(*sources), "rm_scores": scores,
                   "extra_fields": NonTensorStack(*extra),
                   "metrics": NonTensorStack(*[{"generate_sequences": i / 2} for i in range(size)])}
        return Counting(columns, batch_size=[size])

    kwargs = {"reward": "ktg", "rehearsed": {"rcot/aks": "aks"}}
    reward = {"custom_reward_function": {"reward_kwargs": kwargs}}
    trainer = object.__new__(grpo_trainer.RCoTTrainer)
    trainer.config = OmegaConf.create({"reward": reward})
    results = []
    for size in (3, 30):
        Counting.reads = 0
        grpo_trainer.tq = SimpleNamespace(kv_batch_get=lambda **_: batch(size))
        tags = [{"is_padding": i == 1} for i in range(size)]
        keys = [f"u_{i}_0" for i in range(size)]
        meta = SimpleNamespace(keys=keys, tags=tags, partition_id="train")
        rows = trainer._reward_rows(meta)
        results.append([rows[:2], len(rows), Counting.reads])
    print("RESULT" + json.dumps(results))
    """
)


def test_reading_a_steps_rewards_copies_each_column_once(run_verl_python):
    """A column of objects is copied at every access; one per response made a step quadratic."""
    ((first, row), count, reads), (_, many, same_reads) = json.loads(
        run_verl_python(ROWS).partition("RESULT")[2].splitlines()[0]
    )
    assert (count, many) == (2, 29), "padding is left out"
    assert (row["position"], row["reward"], row["components"]) == (2, 2.0, {"x": 2.0})
    assert (row["reasons"], row["generate_s"]) == (["a", "b"], 1.0)
    assert (first["rehearsed"], row["rehearsed"]) == (True, False)
    assert reads == same_reads
