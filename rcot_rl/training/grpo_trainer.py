"""The registered GRPO trainers: verl's own, with reward components, group health, and the hosts.

verl 0.9.1 logs only the total reward of training rollouts. `RCoTTrainer` reads what the reward
function returned for each response (verl keeps it in TransferQueue) and adds at every step each
component's mean and spread, the share of groups without variance (which give no gradient), and how
often each reason code occurred; and it writes all of it with the rollouts. `RCoTTrainerAsync` does
the same on verl's colocated asynchronous trainer, whose rollouts for the next step start before
this step's update and continue after it.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils

from rcot_rl.stats.rollout_rows import last_turns
from rcot_rl.system.files import write_text
from rcot_rl.system.prometheus_targets import write_targets
from rcot_rl.training import verl_patches
from rcot_rl.training.advantage import per_task
from rcot_rl.training.checkpoint_store import MANIFEST, METRICS, make_room
from rcot_rl.training.host_metrics import HostMetrics
from rcot_rl.training.jobs import KEEP
from rcot_rl.training.reward_manager import OUTCOME
from rcot_rl.training.reward_metrics import reward_metrics
from rcot_rl.training.storage_metrics import storage_metrics

logger = logging.getLogger(__name__)

REHEARSED = "rehearsed"
"""Folder of the rollouts of rehearsed rows, beside `rollouts`, and prefix of their metrics."""

COMPONENT = "component/"
"""Prefix of a component's key in what the reward function returned."""


class _ObservedTrainer(PPOTrainer):
    """What both trainers add to verl's."""

    _MODE: Literal["sync", "colocate_async"] = "sync"
    """verl's name of the trainer that is extended."""
    _hosts: HostMetrics
    _drawn = 0
    _last_step: tuple[Any, dict, dict, float]

    def __init__(self, config: Any) -> None:
        # verl compares this key with "sync" to choose its buffer and checkpoint contents
        config.trainer.v1.trainer_mode = self._MODE
        super().__init__(config)
        settings = config.trainer.rcot
        logger.info(
            "GRPO trainer: %s, advantage %s, max_lost_share %g, checkpoints in %s",
            self._MODE,
            settings.get("advantage"),
            settings.max_lost_share,
            config.trainer.default_local_dir,
        )

    def on_train_begin(self) -> None:
        """Start to read the hosts, and publish addresses for Prometheus if the recipe asks."""
        self._hosts = HostMetrics()
        targets = self.config.trainer.rcot.get("prometheus")
        if targets is not None:
            write_targets(Path(targets), self.llm_server_manager.server_addresses)
        super().on_train_begin()

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        poll_interval_s = self.config.trainer.rcot.get("poll_interval_s")
        if poll_interval_s is not None:
            # verl's 2 s are most of a small model's step
            verl_patches.replace(buffer, "poll_interval", poll_interval_s)
        return buffer

    def _fetch_one_gen_batch(self) -> Any:
        """Fetch prompts, named in the order in which they are drawn (see `_balance_batch`)."""
        batch = super()._fetch_one_gen_batch()
        names = [f"{self._drawn + i:09d}-{uid}" for i, uid in enumerate(batch["uid"])]
        self._drawn += len(names)
        column: Any = np.array(names, dtype=object)
        named = tensordict_utils.get_tensordict({"uid": column})
        batch["uid"] = named["uid"]
        return batch

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Balance the batch, starting from the order in which prompts were drawn.

        verl starts from the order in which responses arrive, so the same rollouts would give sums
        with different rounding, and different weights, in every run.
        """
        batch.reorder(sorted(range(len(batch)), key=lambda i: drawn_order(batch.keys[i])))
        return super()._balance_batch(batch, *args, **kwargs)

    def _save_checkpoint(self) -> None:
        """Save into a folder that does not count as a checkpoint until it is sealed again."""
        checkpoints = Path(self.config.trainer.default_local_dir)
        (checkpoints / f"global_step_{self.global_steps}" / MANIFEST).unlink(missing_ok=True)
        make_room(checkpoints, self.config.trainer.rcot.get(KEEP))
        self._save_metrics(checkpoints / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        """Run one step, and keep its results for a checkpoint written right after it."""
        started = time.monotonic()
        batch = super().step(metrics, timing_raw)
        metrics.update(self._hosts.metrics())  # once a step: a save computes metrics twice
        self._last_step = (batch, metrics, timing_raw, time.monotonic() - started)
        return batch

    def _save_metrics(self, checkpoint: Path) -> None:
        """Write the step's metrics and rollouts together with its checkpoint.

        verl logs only after the weight sync; a run that fails in between would resume without ever
        having logged the step.
        """
        batch, metrics, timing_raw, seconds = self._last_step
        step_metrics, timing = dict(metrics), dict(timing_raw) | {"step": seconds}
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._compute_metrics(batch, step_metrics, timing, self.global_steps, epoch)
        folder = self.config.trainer.get("rollout_data_dir", None)
        if folder:
            self._log_rollout_data(batch, timing, folder)
        checkpoint.mkdir(parents=True, exist_ok=True)
        line = {"step": self.global_steps, "time": time.time()} | step_metrics
        write_text(checkpoint / METRICS, json.dumps(line, default=_plain) + "\n")

    def _compute_metrics(
        self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        rows = self._reward_rows(batch)
        responses = last_turns(rows, "uid")
        own = [row for row in responses if not row["rehearsed"]]
        rehearsed = [row for row in responses if row["rehearsed"]]
        if own:  # a random batch may have rehearsed rows only
            metrics.update(reward_metrics(own))
        if rehearsed:
            figures = reward_metrics(rehearsed).items()
            metrics.update({f"{REHEARSED}/{name}": value for name, value in figures})
        metrics.update(storage_metrics(Path(self.config.trainer.default_local_dir)))
        if "gen" in timing_raw:
            tokens = metrics["response_length/mean"] * len(rows)
            metrics["perf/response_tokens_per_s"] = tokens / timing_raw["gen"]
        metrics["time"] = time.time()

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """Compute advantages; with `advantage: task`, scaled per task (`advantage.per_task`)."""
        self._check_lost(batch, metrics)
        result = super()._compute_advantage(batch, metrics)
        if self.config.trainer.rcot.get("advantage") != "task":
            return result
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["advantages", "response_mask", "data_source"],
        )
        # verl gives all tokens of a response its one centered reward
        centered = [float(row[0]) for row in data["advantages"].unbind()]
        scaled = per_task(np.array(centered), list(data["data_source"]))
        tokens = [
            value * mask.to(torch.float32)
            for value, mask in zip(scaled, data["response_mask"].unbind(), strict=True)
        ]
        nested = torch.nested.as_nested_tensor(tokens, layout=torch.jagged)
        fields = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(tokens))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _check_lost(self, batch: Any, metrics: dict) -> None:
        """Measure the share of responses that failed in the agent loop, and limit it.

        verl continues without them. A few are accidents; if many prompts fail, there is a fault.

        Raises:
            RuntimeError: The share exceeds `max_lost_share`.
        """
        keys = [k for k, t in zip(batch.keys, batch.tags, strict=True) if not t.get("is_padding")]
        received = len({key.rsplit("_", 1)[0] for key in keys})
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        share = metrics["group/lost_fraction"] = max(0.0, 1 - received / expected)
        max_share = self.config.trainer.rcot.max_lost_share
        if share > max_share:
            raise RuntimeError(
                f"{expected - received} of the {expected} responses of step {self.global_steps} "
                f"failed in the agent loop, more than max_lost_share {max_share:g}; "
                "see Error in _run_prompt"
            )

    def _log_rollout_data(self, batch: Any, timing_raw: dict, rollout_data_dir: str) -> None:
        """Write one JSON line per response; verl's own dump leaves out the components.

        Responses to rehearsed rows go to a folder of their own: `rollouts` has those that the
        stage's reward scored.
        """
        rows = self._reward_rows(batch)
        fields = ["prompts", "responses", "advantages"]
        fields += ["reward_model", "data_source", "extra_info"]
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        pad = self.tokenizer.pad_token_id
        prompts = data["prompts"].to_padded_tensor(padding=pad)
        responses = data["responses"].to_padded_tensor(padding=pad)
        lengths = data["responses"].offsets().diff().tolist()
        # all tokens of a response that the policy wrote have the same advantage (eq. 14)
        advantages = [
            float(values[0]) if len(values) else None for values in data["advantages"].unbind()
        ]
        columns = {k: list(data[k]) for k in ("reward_model", "data_source", "extra_info")}
        own: list[str] = []
        rehearsed: list[str] = []
        for row in rows:
            i = row["position"]
            extra = columns["extra_info"][i] or {}
            line = {
                "prompt_id": row["uid"],
                "sample": row["sample"],
                "turn": row["turn"],
                "data_source": columns["data_source"][i],
                "prompt": self.tokenizer.decode(prompts[i], skip_special_tokens=True),
                "response": self.tokenizer.decode(responses[i], skip_special_tokens=True),
                "response_tokens": lengths[i],
                "ground_truth": row["truth"] or columns["reward_model"][i]["ground_truth"],
                "reward": row["reward"],
                "advantage": advantages[i],
                "components": row["components"],
                "reasons": row["reasons"],
                "index": extra.get("index"),
                "video": extra.get("video"),
                "expression_id": extra.get("expression_id"),
                **({"extra_info": {OUTCOME: row["outcome"]}} if row["outcome"] else {}),
            }
            text = json.dumps(line, ensure_ascii=False, default=_plain)
            (rehearsed if row["rehearsed"] else own).append(f"{text}\n")
        path = Path(rollout_data_dir) / f"{self.global_steps}.jsonl"
        write_text(path, "".join(own))
        if rehearsed:
            write_text(path.parent.with_name(REHEARSED) / path.name, "".join(rehearsed))

    def _reward_rows(self, batch: Any) -> list[dict[str, Any]]:
        """Return a row per sequence, without verl's padding.

        A row has the sequence's uid, sample, turn, position in the batch, reward, components,
        reasons, seconds, whether it is rehearsed and, for an agentic episode, outcome and truth.
        """
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["rm_scores", "extra_fields", "metrics", "data_source"],
        )
        arguments = self.config.reward.custom_reward_function.reward_kwargs
        rehearsed = [s in arguments.get("rehearsed", {}) for s in data["data_source"]]
        rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
        # read once: each access to a column of objects copies the whole column
        all_fields, timings = list(data["extra_fields"]), list(data["metrics"])
        rows = []
        for position, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if tag.get("is_padding", False):
                continue
            fields = all_fields[position]
            uid, sample, turn = drawn_order(key)
            info, outcome = fields.get("reward_extra_info", {}), fields.get(OUTCOME)
            rows.append(
                {
                    "uid": uid,
                    "sample": sample,
                    "turn": turn,
                    "position": position,
                    "rehearsed": rehearsed[position],
                    "outcome": outcome,
                    "truth": json.dumps(outcome["truth"]) if outcome else None,
                    "reward": rewards[position],
                    "components": {
                        k.removeprefix(COMPONENT): float(v)
                        for k, v in info.items()
                        if k.startswith(COMPONENT)
                    },
                    "reasons": [r for r in str(info.get("reasons", "")).split(";") if r],
                    "seconds": info.get("reward_seconds"),
                    "generate_s": dict(timings[position]).get("generate_sequences"),
                }
            )
        return rows


def drawn_order(key: str) -> tuple[str, int, int]:
    """Split a sequence's key into its prompt's name, its number in the group, and its turn."""
    uid, sample, turn = key.rsplit("_", 2)
    return uid, int(sample), int(turn)


@register_trainer("rcot_sync")
class RCoTTrainer(_ObservedTrainer, PPOTrainerSync):
    """verl's synchronous trainer (`trainer.v1.trainer_mode: rcot_sync`)."""


@register_trainer("rcot_colocate_async")
class RCoTTrainerAsync(_ObservedTrainer, PPOTrainerColocateAsync):
    """verl's colocated asynchronous trainer (`trainer_mode: rcot_colocate_async`)."""

    _MODE = "colocate_async"


def _plain(value: Any) -> Any:
    """Convert NumPy values for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
