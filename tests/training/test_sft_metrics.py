"""Metrics that CoT-SFT adds to verl's at every step."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

CODE = textwrap.dedent(
    """
    import json, sys, time
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils as tu
    from rcot_rl.training.gpu_sampler import GpuSampler
    from rcot_rl.training.sft_trainer import RCoTSFTTrainer

    class Engine:
        def get_data_parallel_size(self):
            return 2

    trainer = object.__new__(RCoTSFTTrainer)
    trainer.config = OmegaConf.create({"trainer": {"default_local_dir": sys.argv[1]}})
    trainer.engine = Engine()

    def train_batch(data):
        time.sleep(0.1)
        return tu.get_tensordict({}, {"metrics": {"loss": 1.5}})

    measured, rows = trainer._measured(train_batch, GpuSampler()), []
    for _ in range(2):
        data = tu.get_tensordict({}, {})
        tu.assign_non_tensor_data(data, "global_token_num", [30, 70])
        rows.append(tu.get(measured(data), "metrics"))
        time.sleep(0.2)  # a checkpoint, or rows that are not ready
    print("RESULT" + json.dumps(rows))
    """
)


def test_a_step_has_seconds_throughput_and_figures_of_the_host(run_verl_python, tmp_path: Path):
    output = run_verl_python(CODE, str(tmp_path))
    first, second = json.loads(output.partition("RESULT")[2].splitlines()[0])
    for row in (first, second):
        assert row["loss"] == 1.5, "verl's own metrics stay"
        assert row["timing_s/update"] >= 0.1
        assert row["perf/throughput"] == pytest.approx(100 / row["timing_s/step"] / 2)
        assert row["memory_gib/node/used_max"] > 0 and row["disk/free_gib"] > 0
    assert first["timing_s/step"] == pytest.approx(first["timing_s/update"], abs=0.05)
    waited = second["timing_s/step"] - second["timing_s/update"]
    assert waited >= 0.2, "the wait between two updates belongs to the second"
