"""CoT-SFT's loss: on what the assistant said, and on nothing of the prompt or the picture."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SAID = '<think>It is round.</think><answer>[{"bbox_2d": [1, 2, 30, 40]}]</answer>'

CODE = r"""
import json, sys
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.tokenizer import hf_processor
from pathlib import Path
from rcot_rl.inference.model_folder import find_model
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import sft_config

model = find_model("tiny")
config = sft_config(load_recipe("laptop"), model=model, train=[Path(sys.argv[1])], val=[],
                    out=Path("/out"))
tokenizer = AutoTokenizer.from_pretrained(model)
rows = create_sft_dataset([sys.argv[1]], config.data, tokenizer, hf_processor(model))
ids, mask = rows[0]["input_ids"], rows[0]["loss_mask"].bool()
print(json.dumps({"learned": tokenizer.decode(ids[mask]), "given": tokenizer.decode(ids[~mask])}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), 90, np.uint8)).save(picture, "PNG")
    row = {
        "messages": [
            {"role": "user", "content": "<image>Find the red circle."},
            {"role": "assistant", "content": SAID},
        ],
        "images": [{"bytes": picture.getvalue()}],
    }
    file = tmp_path_factory.mktemp("rows") / "train-00000.parquet"
    pq.write_table(pa.Table.from_pylist([row]), file)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(file)],
        env=os.environ | {"VERL_PLATFORM": "cpu", "RCOT_RL_PLUGIN": "required"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_of_the_assistants_turn_is_learned_its_end_too(found: dict[str, str]) -> None:
    assert found["learned"].rstrip("\n") == SAID + "<|im_end|>"


def test_nothing_of_the_prompt_is(found: dict[str, str]) -> None:
    assert "Find the red circle." in found["given"]
    assert found["given"].count("<|image_pad|>") == (112 // 28) ** 2
    assert found["given"].endswith("<|im_start|>assistant\n")
    assert "answer" not in found["given"]
