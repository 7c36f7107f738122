"""ReasonVOS as its public script scores it, against means worked out here from the masks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from rcot_rl.evaluation.benchmarks import evaluate
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.monitoring.terminal.run_summary import public_lines


def mean_of(world, masks: dict, pairs: Iterable[tuple[str, str]]) -> tuple[float, float]:
    scores = [np.mean(jf_video(world.truth(*p), masks[p]), axis=1) for p in pairs]
    jaccard, boundary = 100 * np.mean(scores, axis=0)
    return float(jaccard), float(boundary)


def edit_video(world, video: str, change: Callable[[dict], object]) -> None:
    path = world.root / "meta_expressions.json"
    document = json.loads(path.read_text())
    change(document["videos"][video])
    path.write_text(json.dumps(document))


def script(world, root: Path, **options: int) -> dict:
    return evaluate("reasonvos", world.root, "valid", root, **options)["public_script"]


def test_expressions_with_missing_masks_are_skipped(make_world, make_predictions) -> None:
    world = make_world("reasonvos")
    root, masks = make_predictions(world)
    shutil.rmtree(root / "clip-0" / "1")
    (root / "clip-1" / "0" / f"{world.frames[2]}.png").unlink()
    (root / "clip-2" / "3" / f"{world.frames[4]}.png").write_bytes(b"not a PNG")
    shutil.rmtree(world.root / "Annotations" / "MOSE_clip-2_2")
    lost = {("clip-0", "1"), ("clip-1", "0"), ("clip-2", "3")}
    lost |= {("clip-2", e) for _, e in world.pairs() if world.targets(e) == ["2"]}
    kept = [pair for pair in world.pairs() if pair not in lost]
    result = evaluate("reasonvos", world.root, "valid", root)
    figures = result["public_script"]
    assert (figures["J"], figures["F"]) == pytest.approx(mean_of(world, masks, kept), abs=1e-9)
    assert figures["J&F"] == pytest.approx((figures["J"] + figures["F"]) / 2)
    assert figures["n_skipped"] == len(lost) == result["n_expressions"] - len(kept)
    assert result["J"] < figures["J"]  # there, the missing masks count 0
    (line,) = public_lines(result)
    assert f"without {len(lost)} skipped" in line and f"J {figures['J']:.1f}" in line


def test_complete_predictions_give_the_main_figures(make_world, make_predictions) -> None:
    world = make_world("reasonvos")
    root, _ = make_predictions(world)
    result = evaluate("reasonvos", world.root, "valid", root)
    figures = result["public_script"]
    assert (figures["n_skipped"], figures["n_replaced"]) == (0, 0)
    keys = ("J", "F", "J&F")
    assert [figures[k] for k in keys] == pytest.approx([result[k] for k in keys], abs=1e-9)
    assert script(world, root, limit=4, workers=2) == script(world, root, limit=4)


def test_a_repeated_key_counts_once(make_world, make_predictions) -> None:
    world = make_world("reasonvos", n_videos=1)
    root, masks = make_predictions(world)
    before = script(world, root)
    edit_video(world, "clip-0", lambda v: v["expressions"].append(v["expressions"][3]))
    after = script(world, root)
    assert after == {**before, "n_replaced": 1}
    # another object has another key, although both share one prediction
    other = {"obj_id": "2", "exp_id": "0", "exp_text": "0", "is_sent": True}
    edit_video(world, "clip-0", lambda v: v["expressions"].append(other))
    jaccard, _ = jf_video(world.masks["clip-0"]["2"], masks["clip-0", "0"])
    expected = (5 * before["J"] + 100 * jaccard.mean()) / 6
    assert script(world, root)["J"] == pytest.approx(expected, abs=1e-9)


def test_expressions_of_several_objects_are_skipped(make_world, make_predictions) -> None:
    world = make_world("reasonvos", n_videos=1)
    root, masks = make_predictions(world)
    edit_video(world, "clip-0", lambda v: v["expressions"][4].update(obj_id=["1", "2"]))
    kept = [pair for pair in world.pairs() if pair[1] != "4"]
    figures = script(world, root)
    assert (figures["J"], figures["F"]) == pytest.approx(mean_of(world, masks, kept), abs=1e-9)
    assert figures["n_skipped"] == 1


def test_without_predictions_there_are_no_figures(make_world, tmp_path: Path) -> None:
    world = make_world("reasonvos")
    result = evaluate("reasonvos", world.root, "valid", tmp_path)
    empty = {"J": None, "F": None, "J&F": None, "n_skipped": 15, "n_replaced": 0}
    assert result["public_script"] == empty and result["J"] == 0
    assert "J&F unknown" in public_lines(result)[0]
    json.dumps(result, allow_nan=False)


def test_only_reasonvos_has_the_figures(make_world, make_predictions) -> None:
    world = make_world("mevis", n_videos=1)
    root, _ = make_predictions(world)
    result = evaluate("mevis", world.root, "valid_u", root)
    assert "public_script" not in result and public_lines(result) == []
