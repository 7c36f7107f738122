"""ReVOS' R and A against pixel counts that are worked out here from the masks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.corpora import open_corpus, revos
from data_pipelines.corpora.mask_file import MaskFile
from data_pipelines.corpora.revos import Revos
from rcot_rl.errors import InputError
from rcot_rl.evaluation.benchmarks import (
    benchmark_document,
    evaluate,
    evaluate_all,
    evaluate_masks,
)
from rcot_rl.evaluation.mask_baselines import BASELINES
from rcot_rl.evaluation.revos_robustness import frame_scores
from rcot_rl.monitoring.terminal.run_summary import evaluation_lines, public_lines

HALVES = {"referring": ("0", "4"), "reasoning": ("1", "3"), "no_target": ("2",)}


def counted(world, masks: dict, pair: tuple[str, str]) -> dict[str, tuple[float, float]]:
    """Return (R, A) in percent by counting pixels, without uint8 arithmetic."""
    video, expression = pair
    layers = [world.masks[video][o].astype(int) for o in world.targets(expression)]
    targets = np.sum([np.zeros(masks[pair].shape, int), *layers], axis=0)
    frames: dict[str, list[tuple[float, float]]] = {"legacy": [], "corrected": []}
    for n, mask, any_object in zip(targets, masks[pair], world.foreground(video), strict=True):
        outside, size = int((mask & (n == 0)).sum()), int(any_object.sum())
        overlap = int((mask & (n == 2)).sum())
        lost = (255 * outside + overlap) / (size + 1e-6)
        frames["legacy"].append((max(1 - lost, 0.0), float((~mask & (n == 0)).mean())))
        kept = max(1 - outside / (size + 1e-6), 0.0)
        frames["corrected"].append((kept, float((mask == (n > 0)).mean())))
    return {form: tuple(100 * np.mean(values, axis=0)) for form, values in frames.items()}


def test_figures_equal_pixel_counts_rounded_per_expression(make_world, make_predictions) -> None:
    world = make_world("revos", n_videos=4, seed=2)
    both = [world.masks[v]["1"] & world.masks[v]["2"] for v in world.videos]
    assert np.any(both)  # the targets of expression 1 overlap
    _, masks = make_predictions(world)
    for pair in world.pairs():
        if pair[1] == "1":  # predictions without a pixel outside the targets
            masks[pair] = world.truth(*pair)
    result = evaluate_masks("revos", world.root, "valid", lambda c, v, e: masks[v.id, e.id])
    expected = {pair: counted(world, masks, pair) for pair in world.pairs()}
    for form in ("legacy", "corrected"):
        figures = result["robustness"][form]
        means = {}
        for name, kinds in HALVES.items():
            values = [expected[p][form] for p in world.pairs() if p[1] in kinds]
            means[name] = np.mean(np.round(values, 2), axis=0)
            found = figures["per_subset"][name]
            assert (found["R"], found["A"]) == pytest.approx(tuple(means[name]), abs=1e-9)
        overall = np.mean([means["referring"], means["reasoning"]], axis=0)
        assert (figures["R"], figures["A"]) == pytest.approx(tuple(overall), abs=1e-9)
    exact = [row["robustness"] for row in result["per_expression"] if row["expression_id"] == "1"]
    assert all(r["corrected"]["R"] == 100 for r in exact)
    assert any(0 < r["legacy"]["R"] < 100 for r in exact)
    assert result["robustness"]["reason"] is None
    json.dumps(result, allow_nan=False)


def test_the_scripts_bugs_on_one_frame() -> None:
    foreground = np.zeros((10, 10), np.uint8)
    foreground[:4] = 1  # 40 pixels
    target = np.zeros_like(foreground)
    target[:2] = 1
    mask = target.copy()
    mask[2, :1] = 1  # one pixel outside
    assert frame_scores(target, mask, foreground) == pytest.approx((1 - 1 / 40, 0.99))
    # 255 times 1 pixel exceeds the foreground; no target pixel equals 255
    assert frame_scores(target, 255 * mask, foreground) == pytest.approx((0.0, 0.79))
    # two targets on 20 correct pixels: each costs 255 * 255 mod 256 = 1
    assert frame_scores(2 * target, 255 * target, foreground)[0] == pytest.approx(1 - 20 / 40)


def test_unusable_expressions_count_zero_in_both_forms(make_world, make_predictions) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    shutil.rmtree(root / world.videos[0] / "0")
    (root / world.videos[0] / "3" / f"{world.frames[2]}.png").unlink()
    rows = evaluate("revos", world.root, "valid", root)["per_expression"]
    zero = {"R": 0.0, "A": 0.0}
    lost = [r["expression_id"] for r in rows if r["robustness"]["corrected"] == zero]
    assert lost == ["0", "3"]
    assert all(rows[k]["robustness"]["legacy"] == zero for k in (0, 3))


def test_r_is_unknown_without_the_foreground_file(make_world, make_predictions) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    complete = evaluate("revos", world.root, "valid", root)
    (world.root / "mask_dict_foreground.json").unlink()
    (root / world.videos[0] / "0" / f"{world.frames[0]}.png").unlink()
    figures = evaluate("revos", world.root, "valid", root)["robustness"]
    for form in ("legacy", "corrected"):
        assert figures[form]["R"] is None
        assert {part["R"] for part in figures[form]["per_subset"].values()} == {None}
        assert 0 < figures[form]["A"] < complete["robustness"][form]["A"]
    assert "mask_dict_foreground.json: no such file" in figures["reason"]
    (line,) = public_lines({"robustness": figures})
    assert "legacy R unknown" in line and "mask_dict_foreground.json" in line


@pytest.mark.parametrize("kind", ["video missing", "frame missing", "size", "runs", "empty list"])
def test_videos_without_usable_foreground_count_zero_and_are_defects(
    kind: str, make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    flawless = evaluate("revos", world.root, "valid", root)
    path = world.root / "mask_dict_foreground.json"
    foreground = json.loads(path.read_text())
    name = world.videos[1]
    masks = foreground[name]["masks_rle"]
    if kind == "video missing":
        del foreground[name]
    elif kind == "frame missing":
        masks.pop()
    else:
        bad = {"size": {"size": [31, 44], "counts": [31 * 44]}, "runs": {"size": [30, 44]}}
        masks[3] = bad.get(kind, [])
    path.write_text(json.dumps(foreground))
    result = evaluate("revos", world.root, "valid", root)
    (defect,) = result["defects"]
    assert defect["file"] == str(path) and defect["key"].startswith(name)
    assert defect["effect"] == "R and legacy A of the expression count 0"
    assert defect["expressions"] == [f"{name}/{e}" for e in "01234"]
    assert (result["J"], result["F"]) == (flawless["J"], flawless["F"])
    before = {(r["video"], r["expression_id"]): r for r in flawless["per_expression"]}
    for row in result["per_expression"]:
        kept = before[row["video"], row["expression_id"]]["robustness"]
        if row["video"] != name:
            assert row["robustness"] == kept
            continue
        assert row["robustness"]["legacy"] == {"R": 0.0, "A": 0.0}
        assert row["robustness"]["corrected"] == {"R": 0.0, "A": kept["corrected"]["A"]}


def test_methods_of_one_pass_list_a_defect_of_the_foreground_once(
    make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    path = world.root / "mask_dict_foreground.json"
    foreground = json.loads(path.read_text())
    del foreground[world.videos[1]]
    path.write_text(json.dumps(foreground))
    alone = evaluate("revos", world.root, "valid", root)
    methods = {"one": root, "two": root, **BASELINES}
    results = evaluate_all("revos", world.root, "valid", methods)
    assert results["one"] == results["two"] == alone
    for result in results.values():
        (defect,) = result["defects"]
        assert defect["expressions"] == [f"{world.videos[1]}/{e}" for e in "01234"]
        assert result["n_defective"] == 5
    shown = evaluation_lines(benchmark_document(results, {}))
    scores = [line for line in shown if line.startswith("J&F") and line.endswith(tuple(methods))]
    figures = [line for line in shown if "robustness" in line]
    assert figures == [f"  {line}" for r in results.values() for line in public_lines(r)]
    # each stands between the scores of its method and of the next one
    order = [line for line in shown if line in (*scores[: len(methods)], *figures)]
    assert [line in figures for line in order] == [False, True] * len(methods)
    alone_lines = evaluation_lines(benchmark_document({"": alone}, {}))
    assert [line for line in alone_lines if "robustness" in line] == figures[:1]


def test_the_foreground_is_indexed_once_before_processes_are_forked(
    make_world, make_predictions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    log = tmp_path / "indexed"

    def logged(path: Path) -> MaskFile:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return MaskFile(path)

    monkeypatch.setattr(revos, "MaskFile", logged)
    evaluate("revos", world.root, "valid", root, workers=2)
    assert log.read_text().split() == [str(os.getpid())]


def test_a_list_of_foreground_masks_is_added_up(make_world) -> None:
    world = make_world("revos", n_videos=1)
    path = world.root / "mask_dict_foreground.json"
    foreground = json.loads(path.read_text())
    (masks,) = (entry["masks_rle"] for entry in foreground.values())
    masks[2] = [masks[2], masks[3]]
    path.write_text(json.dumps(foreground))
    corpus = open_corpus("revos", world.root, "valid")
    assert isinstance(corpus, Revos)
    (video,) = corpus.videos()
    union = world.foreground(video.id).astype(int)
    assert np.array_equal(corpus.foreground_mask(video, 2), union[2] + union[3])
    assert np.array_equal(corpus.foreground_mask(video, 1), union[1])


def test_workers_do_not_change_figures_and_only_revos_has_them(
    make_world, make_predictions
) -> None:
    world = make_world("revos")
    root, _ = make_predictions(world)
    one, two = (evaluate("revos", world.root, "valid", root, workers=n) for n in (1, 2))
    assert one["robustness"] == two["robustness"]
    other = make_world("mevis", n_videos=1)
    folder, _ = make_predictions(other)
    assert "robustness" not in evaluate("mevis", other.root, "valid_u", folder)


def test_a_file_that_is_not_an_object_is_refused(make_world, tmp_path: Path) -> None:
    world = make_world("revos", n_videos=1)
    path = world.root / "mask_dict_foreground.json"
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match=r"mask_dict_foreground\.json: must be a object"):
        evaluate("revos", world.root, "valid", tmp_path)
