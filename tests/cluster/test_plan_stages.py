"""From where a stage's policy starts, as the preflight sees it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.preflight.checks.findings import Report
from data_pipelines.toy.layouts import write_corpus


def test_a_stage_of_both_tasks_starts_at_sft_without_a_warning(look: Callable[..., Report]) -> None:
    assert "stages.start" not in {f.code for f in look("rcot_seg_3b_joint").findings}
    assert "stages.start" in {f.code for f in look("grpo_ktg").findings}


def test_a_benchmark_without_masks_is_told_before_it_is_predicted(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    """As Ref-YouTube-VOS' validation split is published; test splits are held back likewise."""
    root = tmp_path / "ytvos"
    write_corpus(root, "ref-youtube-vos", "valid", 2, 1, "lattice")
    benchmark = f"eval.benchmarks=[{{dataset: ref-youtube-vos, root: {root}}}]"
    assert "eval.masks" not in {f.code for f in look("laptop", benchmark).findings}
    shutil.rmtree(root / "valid" / "Annotations")
    (root / "valid" / "meta.json").unlink(missing_ok=True)
    assert "eval.masks" in {f.code for f in look("laptop", benchmark).findings}
