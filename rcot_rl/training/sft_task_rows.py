"""verl's SFT rows, restricted to some tasks (`train.<sft>.tasks`; Table 5 of the paper).

The rows stay those of one shard set: SFT on one task sees the same rows of it as SFT on both tasks.
"""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset


class TaskRows(MultiTurnSFTDataset):
    """Rows whose `extra_info.task` is in `data.rcot.tasks` of verl's configuration."""

    def __init__(self, parquet_files: Any, tokenizer: Any, config: Any, **kwargs: Any) -> None:
        self.tasks = frozenset(config.rcot.tasks)
        super().__init__(parquet_files, tokenizer, config, **kwargs)

    def _read_files_and_process(self) -> None:
        super()._read_files_and_process()
        keep = [info["task"] in self.tasks for info in self.dataframe["extra_info"]]
        self.dataframe = self.dataframe[keep]
        # the other lists of verl's dataset need columns that our rows do not have
        self.messages = [m for m, kept in zip(self.messages, keep, strict=True) if kept]
