"""Cost of a GRPO step's trainer part under several settings, with verl's worker but no Ray or vLLM.

    python benchmarks/gpu/engine_step.py [--shape 3b] [--prompts 4] [--json FILE] [KEY=VALUE …]

The batch is that of `bench_gpu_step.py` with fewer prompts: an image of 900 vision tokens and 8
random responses of 300 tokens each. Configuration, worker, engine and loss are those of the 3B
recipe on one GPU. One worker runs every setting in turn: micro-batch size, vision tower once per
response or once per group, gradient checkpointing on or off. Prints a JSON line for each: seconds
of the forward pass (the cost of old log-probabilities and of the reference) and of the update, peak
memory, the share of the device's peak (MFU), and the ratio to the first setting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_gpu_step
from gpu.flops import PEAK_FLOPS, passes
from gpu.random_model import SHAPES, write_model
from gpu.record import BenchRecord

from rcot_rl.training.shared_vision import TOWER, share_vision

VISION, TEXT = 900, 250
PATCHES = (1, 60, 60)
"""Patches of 14 pixels in an 840 x 840 image; four make a token."""


def batch(model: Path, prompts: int, n: int, response: int) -> Any:
    """Return a batch of `prompts` x `n` sequences in the form that verl's agent loop produces."""
    import torch
    from tensordict import NonTensorStack, TensorDict
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

    config = json.loads((model / "config.json").read_text())
    ids = {k: config[f"{k}_token_id"] for k in ("vision_start", "image", "vision_end")}
    image = [ids["vision_start"], *[ids["image"]] * VISION, ids["vision_end"]]
    words = torch.arange(TEXT) % 400 + 100  # no special tokens in the shipped tokenizer
    prompt = torch.cat([torch.tensor(image), words])
    rows: list[dict[str, Any]] = []
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
    positions = nested_tensor_from_tensor_list(columns.pop("position_ids"), ragged_idx=2)
    media = NonTensorStack(*columns.pop("multi_modal_inputs"))
    fields: dict[str, Any] = {"multi_modal_inputs": media, "position_ids": positions}
    for key, values in columns.items():  # jagged even for equal lengths, as from the queue
        fields[key] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return TensorDict(fields, batch_size=[len(rows)])


@dataclass(frozen=True)
class Setting:
    """One setting of the trainer part."""

    name: str
    micro_batch: int
    shared_vision: bool
    checkpointing: bool


SETTINGS = (
    Setting("micro-batch 4, as before", 4, shared_vision=False, checkpointing=True),
    Setting("micro-batch 8", 8, shared_vision=False, checkpointing=True),
    Setting("micro-batch 8, shared vision", 8, shared_vision=True, checkpointing=True),
    Setting("micro-batch 4, shared vision", 4, shared_vision=True, checkpointing=True),
    Setting("micro-batch 4, shared vision, no checkpointing", 4, True, False),
)


def actor_worker(config: Any) -> Any:
    """Start verl's actor worker in this process."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    worker = ActorRolloutRefWorker(config, role="actor")
    worker.init_model()
    return worker


def apply(setting: Setting, actor: Any, original_forward: dict[Any, Any]) -> None:
    """Switch the model of a running worker to `setting`.

    Args:
        setting: The setting.
        actor: The worker.
        original_forward: Vision tower -> its `forward` before vision was shared.
    """
    module = actor.actor.engine.module
    if setting.checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        module.gradient_checkpointing_disable()
    for tower, forward in original_forward.items():
        tower.forward = forward
    if setting.shared_vision:
        share_vision(module)


def towers(actor: Any) -> dict[Any, Any]:
    """Return vision tower -> the `forward` of its class."""
    modules = actor.actor.engine.module.modules()
    return {m: type(m).forward.__get__(m) for m in modules if TOWER in type(m).__name__}


def step(actor: Any, data: Any, config: Any, micro_batch: int) -> dict[str, float]:
    """Run a forward pass and an update on `data` and return their seconds and metrics."""
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    values: dict[str, float] = {}
    cuda = torch.cuda.is_available()

    def timed(name: str, call: Any) -> Any:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = call(data.clone(recurse=False))
        if cuda:
            torch.cuda.synchronize()
            values[f"peak_gib/{name}"] = torch.cuda.max_memory_allocated() / 2**30
        values[f"seconds/{name}"] = time.perf_counter() - started
        return result

    forward_settings: dict[str, Any] = {"compute_loss": False, "calculate_entropy": False}
    forward_settings |= {"micro_batch_size_per_gpu": micro_batch}
    tu.assign_non_tensor(data, temperature=config.rollout.temperature, **forward_settings)
    out = timed("forward", actor.compute_log_prob)
    log_probs = response_from_nested(out["log_probs"], data["response_mask"])
    data["old_log_probs"] = data["ref_log_prob"] = log_probs
    size = len(data)
    update_settings: dict[str, Any] = {"global_batch_size": size, "mini_batch_size": size}
    update_settings |= {"epochs": 1, "seed": 1}
    update_settings |= {"dataloader_kwargs": {"shuffle": False}, "compute_loss": True}
    tu.assign_non_tensor(data, **update_settings)
    metrics = tu.get(timed("update", actor.update_actor), "metrics")
    value = metrics["grad_norm"]
    values["grad_norm"] = float(value[-1] if isinstance(value, list) else value)
    return values


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="start no setting after this many seconds")
    parser.add_argument("--out", type=Path, help="folder of the model; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    os.environ |= {"RCOT_RL_PLUGIN": "required"}
    with tempfile.TemporaryDirectory(prefix="rcot-gpu-") as temporary:
        folder = (options.out or Path(temporary)).resolve()
        recipe = bench_gpu_step.recipe_for(folder, 1, options.settings)
        if recipe.device == "cpu":
            os.environ["VERL_PLATFORM"] = "cpu"
        import verl  # noqa: F401  loads the plug-in

        from rcot_rl.training.verl_config import grpo_config

        record = BenchRecord(
            options.json, options.seconds, settings=options.settings, shape=options.shape
        )
        section = recipe.grpo("grpo-aks")
        model = write_model(folder / "model", options.shape, recipe.device)
        files = Path(temporary)
        config = grpo_config(recipe, "grpo-aks", model=model, train=[files], val=[files], out=files)
        actor = actor_worker(config.actor_rollout_ref)
        original_forward = towers(actor)
        length = VISION + 2 + TEXT + section.max_response_length
        work = passes(model, options.prompts * section.n, length, PATCHES[1] * PATCHES[2])
        first: dict[str, Any] = {}
        for setting in SETTINGS:
            apply(setting, actor, original_forward)
            for run in ("first", "second"):  # the first one loads kernels
                if record.left() < 10:
                    return
                data = batch(model, options.prompts, section.n, section.max_response_length)
                values = step(actor, data, config.actor_rollout_ref, setting.micro_batch)
                seconds = values["seconds/update"]
                first = first or values
                if run == "second" and setting is SETTINGS[0]:
                    first = values
                derived = {
                    "sequences": options.prompts * section.n,
                    "mfu/update": work["update"] / seconds / PEAK_FLOPS,
                    "ratio/update": seconds / first["seconds/update"],
                    "ratio/forward": values["seconds/forward"] / first["seconds/forward"],
                }
                record.add(asdict(setting) | {"run": run} | values | derived)


if __name__ == "__main__":
    main()
