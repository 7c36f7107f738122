"""Our reward manager in verl's real reward loop, as a stage's configuration names it; no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rcot_rl.inference.model_folder import TINY

pytestmark = pytest.mark.slow

CODE = """
import asyncio, json, sys, time
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import grpo_config

model, reward = Path(sys.argv[1]), sys.argv[2]
recipe = load_recipe(
    "laptop", [f"train.grpo-aks.reward={reward}", "grpo.reward_deadline_s=1.0"]
)
config = grpo_config(recipe, "grpo-aks", model=model, train=[Path("t")], val=[], out=Path("o"))
texts = json.loads(sys.argv[3])

async def run():
    worker = RewardLoopWorker(config)
    tokenizer = worker.input_tokenizer
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    longest = max(map(len, ids))
    pad = lambda v, fill: v + [fill] * (longest - len(v))
    responses = torch.tensor([pad(i, tokenizer.pad_token_id) for i in ids])
    mask = torch.tensor([[1, 1] + pad([1] * len(i), 0) for i in ids])
    n = len(texts)
    data = DataProto(
        batch=TensorDict(
            {"prompts": torch.ones(n, 2, dtype=torch.long), "responses": responses,
             "attention_mask": mask}, batch_size=n),
        non_tensor_batch={
            "data_source": np.array(["rcot/aks"] * n, dtype=object),
            "reward_model": np.array([{"ground_truth": '"A"', "style": "rule"}] * n, dtype=object),
            "extra_info": np.array([{"index": i} for i in range(n)], dtype=object),
            "__num_turns__": np.array([2] * n),
            "tool_extra_fields": np.array([{"odd": object()}] * n, dtype=object),
        },
    )
    start = time.monotonic()
    results = await worker.compute_score_batch(data)
    scores = worker.reward_manager.assemble_rm_scores(data, [f["reward_score"] for f in results])
    placed = [[i, float(v)] for row in scores for i, v in enumerate(row) if v]
    last = [len(i) - 1 for i in ids]
    return {"results": results, "seconds": time.monotonic() - start, "placed": placed, "last": last}

print("RESULT " + json.dumps(asyncio.run(run())))
"""

RIGHT = "<think>The target is visible.</think><answer>A</answer>"


@pytest.fixture
def score(run_verl_python) -> Callable[[str, list[str]], dict]:
    """Return a function that scores responses with a reward in verl's reward loop."""

    def run(reward: str, texts: list[str]) -> dict:
        out = run_verl_python(CODE, str(TINY), reward, json.dumps(texts))
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        return json.loads(line.removeprefix("RESULT "))

    return run


def test_a_recipe_scores_in_verls_reward_loop(score) -> None:
    result = score("aks", [RIGHT, "nonsense", RIGHT.replace(">A<", ">B<")])
    assert [f["reward_score"] for f in result["results"]] == [3.0, 0.0, 1.0]
    info = [f["reward_extra_info"] for f in result["results"]]
    assert info[0]["component/format"] == info[0]["component/accuracy"] == 1.0
    assert info[0].keys() == info[1].keys() == info[2].keys()
    # each on the last token of its response
    last = result["last"]
    assert result["placed"] == [[last[0], 3.0], [last[2], 1.0]]


def test_a_batch_comes_back_with_the_hanging_sample_at_zero(score, tmp_path) -> None:
    """It hangs in C code that holds the interpreter lock: no thread or signal can stop it."""
    (tmp_path / "mine.py").write_text(
        "import re\n"
        "def f(solution_str, ground_truth, data_source, extra_info, response_length, num_turns):\n"
        "    if 'nonsense' in solution_str:\n"
        "        re.match(r'(a+)+$', 'a' * 64 + 'b')\n"
        "    return {'score': 1.0, 'index': extra_info['index'], 'turns': num_turns,\n"
        "            'tokens': response_length, 'truth': ground_truth == '\"A\"'}\n"
    )
    result = score(f"{tmp_path}/mine.py:f", [RIGHT, "nonsense", RIGHT, RIGHT])
    assert [f["reward_score"] for f in result["results"]] == [1.0, 0.0, 1.0, 1.0]
    info = [f["reward_extra_info"] for f in result["results"]]
    assert info[1]["reasons"] == "reward_function_timeout;deadline"
    assert [i["component/index"] for i in info] == [0.0, 0.0, 2.0, 3.0]
    assert info[2]["component/turns"] == 2.0 and info[2]["component/truth"] == 1.0
    assert info[2]["component/tokens"] == result["last"][2] + 1
    assert len({tuple(i) for i in info}) == 1
    assert 1.0 <= result["seconds"] < 10


def test_an_async_function_scores_in_verls_reward_loop(score, tmp_path) -> None:
    (tmp_path / "judge.py").write_text(
        "import asyncio\n"
        "async def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    await asyncio.sleep(60 if 'nonsense' in solution_str else 0.5)\n"
        "    return 1.0\n"
    )
    result = score(f"{tmp_path}/judge.py:compute_score", [*[RIGHT] * 16, "nonsense"])
    assert [f["reward_score"] for f in result["results"]] == [1.0] * 16 + [0.0]
    assert result["seconds"] < 6  # one after another: 8 and the deadline


def test_another_custom_reward_function_is_refused() -> None:
    from omegaconf import OmegaConf

    from rcot_rl.errors import InputError
    from rcot_rl.training.reward_manager import RCoTRewardManager

    config = OmegaConf.create({"reward": {"custom_reward_function": {"path": "mine.py"}}})
    with pytest.raises(InputError, match=r"grpo\.reward=FILE\.py:FUNCTION"):
        RCoTRewardManager(config, None, None)
