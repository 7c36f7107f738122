"""CoT-SFT's loss covers the assistant's turn, and nothing of the prompt or the image."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

RESPONSE = '<think>It is round.</think><answer>[{"bbox_2d": [1, 2, 30, 40]}]</answer>'

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
config = sft_config(load_recipe("laptop"), "sft", model=model, train=[Path(sys.argv[1])], val=[],
                    out=Path("/out"))
tokenizer = AutoTokenizer.from_pretrained(model)
rows = create_sft_dataset([sys.argv[1]], config.data, tokenizer, hf_processor(model))
chosen = {}
for task in ("aks", "ktg"):
    recipe = load_recipe("laptop", [f"train.sft.tasks=[{task}]"])
    of_task = sft_config(recipe, "sft", model=model, train=[Path(sys.argv[1])], val=[],
                         out=Path("/out"))
    subset = create_sft_dataset([sys.argv[1]], of_task.data, tokenizer, hf_processor(model))
    learned = [tokenizer.decode(r["input_ids"][r["loss_mask"].bool()]) for r in subset]
    chosen[task] = [text.partition("<|im_end|>")[0] for text in learned]
ids, mask = rows[0]["input_ids"], rows[0]["loss_mask"].bool()
print(json.dumps({"learned": tokenizer.decode(ids[mask]), "given": tokenizer.decode(ids[~mask]),
                  "rows": len(rows), **chosen}))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, run_verl_python) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), 90, np.uint8)).save(picture, "PNG")
    question = {"role": "user", "content": "<image>Find the red circle."}
    rows = [
        {
            "messages": [question, {"role": "assistant", "content": response}],
            "images": [{"bytes": picture.getvalue()}],
            "extra_info": {"task": task},
        }
        for task, response in (("ktg", RESPONSE), ("aks", "A"), ("ktg", "B"), ("aks", "C"))
    ]
    file = tmp_path_factory.mktemp("rows") / "train-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return json.loads(run_verl_python(CODE, str(file)).splitlines()[-1])


def test_the_whole_assistant_turn_is_learned_with_its_end_token(texts: dict[str, Any]) -> None:
    assert texts["learned"].rstrip("\n") == RESPONSE + "<|im_end|>"


def test_nothing_of_the_prompt_is_learned(texts: dict[str, Any]) -> None:
    assert "Find the red circle." in texts["given"]
    assert texts["given"].count("<|image_pad|>") == (112 // 28) ** 2
    assert texts["given"].endswith("<|im_start|>assistant\n")
    assert "answer" not in texts["given"]


def test_a_stage_on_one_task_learns_that_tasks_rows_in_their_order(texts: dict[str, Any]) -> None:
    assert texts["rows"] == 4
    assert texts["ktg"] == [RESPONSE, "B"]
    assert texts["aks"] == ["A", "C"]
