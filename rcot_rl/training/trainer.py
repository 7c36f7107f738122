"""The registered trainer: verl's synchronous PPO trainer with components and group health in sight.

verl 0.9.1 logs only the total reward of training rollouts. `RCoTTrainer` reads what the reward
function returned for each response (kept by verl in TransferQueue) and adds, at every step, each
component's mean and spread, the share of groups without variance (which teach nothing), and how
often each reason code was given; and it writes all of it with the rollouts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from rcot_rl.files import write_text
from rcot_rl.training.checkpoint_store import MANIFEST, make_room
from rcot_rl.training.group_metrics import reward_metrics
from rcot_rl.training.jobs import KEEP

COMPONENT = "component/"


@register_trainer("rcot_sync")
class RCoTTrainer(PPOTrainerSync):
    """`trainer.v1.trainer_mode: rcot_sync`."""

    def __init__(self, config: Any) -> None:
        # verl compares this key with "sync" to choose its buffer and checkpoint contents
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _save_checkpoint(self) -> None:
        """verl's, into a folder that does not count as a checkpoint until it is sealed again."""
        checkpoints = Path(self.config.trainer.default_local_dir)
        (checkpoints / f"global_step_{self.global_steps}" / MANIFEST).unlink(missing_ok=True)
        make_room(checkpoints, self.config.trainer.rcot.get(KEEP))
        super()._save_checkpoint()

    def _compute_metrics(
        self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        rows = self._reward_rows(batch)
        metrics.update(reward_metrics(rows))
        metrics["time"] = time.time()

    def _log_rollout_data(self, batch: Any, timing_raw: dict, rollout_data_dir: str) -> None:
        """One JSON line a response; replaces verl's dump, which leaves out the components."""
        rows = self._reward_rows(batch)
        fields = ["prompts", "responses", "reward_model", "data_source", "extra_info"]
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        pad = self.tokenizer.pad_token_id
        prompts = data["prompts"].to_padded_tensor(padding=pad)
        responses = data["responses"].to_padded_tensor(padding=pad)
        columns = {k: list(data[k]) for k in ("reward_model", "data_source", "extra_info")}
        lines = []
        for i, row in enumerate(rows):
            extra = columns["extra_info"][i] or {}
            line = {
                "prompt_id": row["uid"],
                "sample": row["sample"],
                "data_source": columns["data_source"][i],
                "prompt": self.tokenizer.decode(prompts[i], skip_special_tokens=True),
                "response": self.tokenizer.decode(responses[i], skip_special_tokens=True),
                "ground_truth": columns["reward_model"][i]["ground_truth"],
                "reward": row["reward"],
                "components": row["components"],
                "reasons": row["reasons"],
                "index": extra.get("index"),
                "video": extra.get("video"),
                "expression_id": extra.get("expression_id"),
            }
            lines.append(json.dumps(line, ensure_ascii=False, default=_plain))
        path = Path(rollout_data_dir) / f"{self.global_steps}.jsonl"
        write_text(path, "\n".join(lines) + "\n")

    def _reward_rows(self, batch: Any) -> list[dict[str, Any]]:
        """Per response, ordered by group: uid, sample, reward, components, reasons."""
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["rm_scores", "extra_fields"],
        )
        rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
        rows = []
        for key, reward, fields in zip(batch.keys, rewards, data["extra_fields"], strict=True):
            uid, sample, _ = key.rsplit("_", 2)
            info = fields.get("reward_extra_info", {})
            rows.append(
                {
                    "uid": uid,
                    "sample": int(sample),
                    "reward": reward,
                    "components": {
                        k.removeprefix(COMPONENT): float(v)
                        for k, v in info.items()
                        if k.startswith(COMPONENT)
                    },
                    "reasons": [r for r in str(info.get("reasons", "")).split(";") if r],
                    "seconds": info.get("reward_seconds"),
                }
            )
        return rows


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
