"""From where a stage's policy starts, as the preflight sees it."""

from collections.abc import Callable

from cluster.checks.findings import Report


def test_a_stage_of_both_tasks_starts_at_sft_without_a_warning(look: Callable[..., Report]) -> None:
    assert "stages.start" not in {f.code for f in look("rcot_seg_3b_joint").findings}
    assert "stages.start" in {f.code for f in look("grpo_ktg").findings}
