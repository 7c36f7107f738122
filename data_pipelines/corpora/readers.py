"""The reader of each dataset, and `open_corpus`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_pipelines.corpora.corpus import Corpus
from data_pipelines.corpora.davis17 import Davis17
from data_pipelines.corpora.mevis import Mevis
from data_pipelines.corpora.reasonvos import ReasonVos
from data_pipelines.corpora.refytvos import RefYoutubeVos
from data_pipelines.corpora.revos import Revos
from rcot_rl.errors import InputError
from rcot_rl.suggestions import did_you_mean
from rcot_rl.system.paths import check_path

READERS: Mapping[str, type[Corpus]] = {
    reader.dataset: reader for reader in (RefYoutubeVos, Mevis, Revos, ReasonVos, Davis17)
}
"""Dataset -> reader."""


def open_corpus(dataset: str, root: str | Path, split: str, strict: bool = True) -> Corpus:
    """Open one published split of the corpus at `root`.

    Only checks that the folders and the expressions file exist. Masks and frames are read on
    demand. Raises InputError.

    Args:
        strict: Raise InputError for a broken metadata entry when videos are read. Otherwise the
            entry is left out and listed in `Corpus.faults`.
    """
    if dataset not in READERS:
        hint = did_you_mean(dataset, READERS)
        raise InputError(f"unknown dataset{hint} (known: {', '.join(READERS)})", key=dataset)
    check_path(root)
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no such folder (the root of {dataset})", file=root)
    reader = READERS[dataset]
    if split not in reader.splits:
        raise InputError(
            f"{dataset} has no split '{split}'{did_you_mean(split, reader.splits)} "
            f"(it has: {', '.join(reader.splits)})",
            file=root,
            key=split,
        )
    corpus = reader(root, split, strict)
    if not corpus.expressions_file.is_file():
        raise InputError(
            f"no such file (the expressions of {dataset} {split})", file=corpus.expressions_file
        )
    return corpus
