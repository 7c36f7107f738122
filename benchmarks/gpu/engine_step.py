"""The trainer's part of a GRPO step alone: verl's actor and reference workers, without Ray or vLLM.

    python benchmarks/gpu/engine_step.py [--shape 3b] [--steps 3] [--json FILE] [KEY=VALUE …]

For a host on which no rollout engine can be had. The batch is that of `bench_gpu_step.py`: 16
prompts with an image of 900 vision tokens, 8 responses of 300 tokens each, drawn at random;
configuration, workers, engine and loss are those of the 3B recipe on one GPU. Prints seconds and
tokens a second of the old log-probabilities, the reference's and the update, and the share of the
device's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_gpu_step as whole
from gpu.random_model import SHAPES, write_model

VISION, TEXT = 900, 250
PATCHES = (1, 60, 60)  # of an 840 x 840 image, 14 pixels each; four make a token


def batch(model: Path, prompts: int, n: int, response: int) -> Any:
    """verl's batch of `prompts` x `n` sequences, as its agent loop hands it over."""
    import torch
    from tensordict import NonTensorStack, TensorDict
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

    config = json.loads((model / "config.json").read_text())
    ids = {k: config[f"{k}_token_id"] for k in ("vision_start", "image", "vision_end")}
    image = [ids["vision_start"], *[ids["image"]] * VISION, ids["vision_end"]]
    words = torch.arange(TEXT) % 400 + 100  # of the shipped tokenizer: no special token
    prompt = torch.cat([torch.tensor(image), words])
    rows = []
    for _ in range(prompts):
        pixels = torch.randn(PATCHES[1] * PATCHES[2], 1176)
        for _ in range(n):
            answer = torch.randint(100, 500, (response,))
            length = len(prompt) + response
            rows.append(
                {
                    "prompts": prompt,
                    "responses": answer,
                    "input_ids": torch.cat([prompt, answer]),
                    "response_mask": torch.ones(response, dtype=torch.int64),
                    "loss_mask": torch.ones(response, dtype=torch.int64),
                    "position_ids": torch.arange(length).expand(4, length).clone(),
                    "advantages": torch.randn(()).expand(response).clone(),
                    "multi_modal_inputs": {
                        "pixel_values": pixels,
                        "image_grid_thw": torch.tensor([PATCHES]),
                        "images_seqlens": torch.tensor([PATCHES[1] * PATCHES[2]]),
                    },
                }
            )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    made: dict[str, Any] = {
        "multi_modal_inputs": NonTensorStack(*columns.pop("multi_modal_inputs"))
    }
    places = columns.pop("position_ids")
    made["position_ids"] = nested_tensor_from_tensor_list(places, ragged_idx=2)
    for key, values in columns.items():  # ragged also where all are equally long, as from the queue
        made[key] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return TensorDict(made, batch_size=[len(rows)])


def workers(config: Any) -> tuple[Any, Any]:
    """verl's workers of the actor and of the reference, in this process."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    made = []
    for role in ("ref", "actor"):
        worker = ActorRolloutRefWorker(config, role=role)
        worker.init_model()
        made.append(worker)
    return made[1], made[0]


def step(actor: Any, reference: Any, data: Any, config: Any) -> dict[str, float]:
    """One step on `data`; seconds of each part, and the update's metrics."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_torch_device
    from verl.workers.utils.padding import response_from_nested

    found: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        get_torch_device().synchronize()
        started = time.perf_counter()
        result = call(data.clone(recurse=False))
        get_torch_device().synchronize()
        found[f"seconds/{name}"] = time.perf_counter() - started
        return result

    temperature = config.rollout.temperature
    tu.assign_non_tensor(data, temperature=temperature, compute_loss=False, calculate_entropy=True)
    out = timed("old_log_prob", actor.compute_log_prob)
    data["old_log_probs"] = response_from_nested(out["log_probs"], data["response_mask"])
    tu.assign_non_tensor(data, calculate_entropy=False)
    out = timed("ref", reference.compute_ref_log_prob)
    data["ref_log_prob"] = response_from_nested(out["log_probs"], data["response_mask"])
    size = len(data)
    tu.assign_non_tensor(
        data, global_batch_size=size, mini_batch_size=size, epochs=1, seed=1,
        dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    metrics = tu.get(timed("update_actor", actor.update_actor), "metrics")
    for key in ("mfu", "perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb", "grad_norm"):
        value = metrics.get(key)
        if value is not None:
            found[key] = float(value[-1] if isinstance(value, list) else value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    os.environ |= {
        "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577", "RCOT_RL_PLUGIN": "required",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rcot-gpu-") as temporary:
        recipe = whole.recipe_for(Path(temporary), options.steps, options.settings)
        if recipe.device == "cpu":
            os.environ["VERL_PLATFORM"] = "cpu"
        import verl  # noqa: F401  loads the plug-in

        from rcot_rl.training.verl_config import grpo_config

        section = recipe.grpo_aks
        model = write_model(Path(temporary) / "model", options.shape, recipe.device)
        here = Path(temporary)
        config = grpo_config(recipe, "grpo-aks", model=model, train=[here], val=[here], out=here)
        actor, reference = workers(config.actor_rollout_ref)
        rows = []
        for _ in range(options.steps):
            data = batch(model, section.prompts_per_step, section.n, section.max_response_length)
            rows.append(step(actor, reference, data, config.actor_rollout_ref))
            print(json.dumps(rows[-1]), flush=True)
    tokens = section.prompts_per_step * section.n * (
        VISION + 2 + TEXT + section.max_response_length
    )  # fmt: skip
    last = rows[-1]
    for name in ("old_log_prob", "ref", "update_actor"):
        last[f"tokens/{name}_per_s"] = tokens / last[f"seconds/{name}"]
    last["ratio/update_to_old_log_prob"] = (
        last["seconds/update_actor"] / last["seconds/old_log_prob"]
    )
    for key, value in last.items():
        print(f"{key:<40}{value:14.5g}")
    if options.json:
        found = {"host": whole.host(), "settings": options.settings, "shape": options.shape}
        options.json.write_text(json.dumps(found | {"figures": last, "steps": rows}, indent=1))


if __name__ == "__main__":
    main()
