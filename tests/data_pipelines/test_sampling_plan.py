"""Guarantees of the sampling plan, on synthetic facts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from data_pipelines.planning.row_drawing import divide
from data_pipelines.planning.sampling_plan import SamplingPlan, make_plan
from data_pipelines.planning.scan import ExpressionFacts, VideoFacts
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

DATASETS = ("ref-youtube-vos", "mevis", "revos")


def facts(
    n_videos: int, seed: int = 0, n_expressions: int = 6, frames: int = 12
) -> list[VideoFacts]:
    """Return videos of three corpora; a third of the expressions has several targets."""
    rng = np.random.default_rng(seed)
    out = []
    for corpus, dataset in enumerate(DATASETS):
        for v in range(n_videos):
            expressions = []
            for e in range(n_expressions):
                n = 1 if dataset == "ref-youtube-vos" or e % 3 else int(rng.integers(2, 4))
                visible = rng.integers(0, n + 1, frames).astype(np.int16)
                visible[rng.integers(frames)] = 0
                visible[rng.integers(frames)] = n
                area = visible.astype(np.int64) * rng.integers(1, 6, frames)
                area[np.argmax(visible == n)] = 100
                thin = np.zeros(frames, dtype=bool)
                expressions.append(ExpressionFacts(str(e), n, area, visible, thin))
            usable = np.ones(frames, dtype=bool)
            out.append(
                VideoFacts(
                    corpus, dataset, f"{dataset}-{v}", usable, tuple(expressions), n_expressions, ()
                )
            )
    return out


def section(**changes: object) -> DataSection:
    given = {
        "corpora": [CorpusRef(dataset=d, root="x") for d in DATASETS],
        "sets": {
            "sft-x": SetSize(ktg=80, aks=31, val=9),
            "grpo-aks-x": SetSize(aks=40, val=8),
            "grpo-ktg-x": SetSize(ktg=60, val=8),
        },
        "val_fraction": 0.2,
    }
    return DataSection(**{**given, **changes})


def kinds(plan: SamplingPlan, name: str, split: str) -> Counter[str]:
    out: Counter[str] = Counter()
    for i in plan.rows[name, split]:
        out[i.task] += 1
        out[f"{i.task} {i.option or i.target}"] += 1
    return out


@pytest.mark.parametrize("mode", ["largest", "any_visible"])
def test_sets_have_exact_sizes_and_ratios_and_are_disjoint(mode):
    videos = facts(80)
    plan = make_plan(videos, section(keyframe=mode), seed=4)
    assert kinds(plan, "sft-x", "train") == {
        "ktg": 80,
        "ktg single": 60,
        "ktg multi": 20,
        "aks": 31,
        "aks A": 16,
        "aks B": 15,
    }
    assert kinds(plan, "sft-x", "val")["ktg"] == kinds(plan, "sft-x", "val")["aks"] == 9
    assert kinds(plan, "grpo-aks-x", "train") == {"aks": 40, "aks A": 20, "aks B": 20}
    assert kinds(plan, "grpo-ktg-x", "train") == {"ktg": 60, "ktg single": 45, "ktg multi": 15}
    keys: dict[str, set] = {}
    for (name, _), rows in plan.rows.items():
        assert [r.index for r in rows] == list(range(len(rows)))
        assert len({(r.task, r.key) for r in rows}) == len(rows)
        keys.setdefault(name, set()).update(r.key for r in rows)
    for a, b in combinations(keys, 2):
        assert not keys[a] & keys[b]
    seen = {
        s: {(r.dataset, r.video) for k, rs in plan.rows.items() for r in rs if k[1] == s}
        for s in ("train", "val")
    }
    assert not seen["train"] & seen["val"]


@pytest.mark.parametrize("mode", ["largest", "any_visible"])
def test_keyframes_and_options_follow_the_paper(mode):
    videos = facts(60)
    by_id = {(v.dataset, v.video): v for v in videos}
    plan = make_plan(videos, section(keyframe=mode), seed=1)
    for rows in plan.rows.values():
        for r in rows:
            e = by_id[r.dataset, r.video].expressions[int(r.expression_id)]
            area = e.union_area_t[r.frame_index]
            if r.option == "B":
                assert area == 0
            elif mode == "largest":
                assert r.frame_index == list(e.union_area_t).index(max(e.union_area_t))
            else:
                assert e.visible_t[r.frame_index] == e.n_objects
            assert r.target == ("single" if e.n_objects == 1 else "multi")


def test_equal_inputs_give_equal_plans():
    videos = facts(60)
    a, b, c = (make_plan(videos, section(), seed=s).rows for s in (3, 3, 4))
    assert a == b
    assert a != c


def test_too_few_candidates_are_reported_with_numbers():
    with pytest.raises(InputError) as caught:
        make_plan(facts(3), section(), seed=1)
    message = str(caught.value)
    assert "grpo-ktg-x train ktg single: asked 45, available" in message
    assert caught.value.key == "data.sets"


def test_smaller_sets_keep_their_ratios_and_none_is_empty():
    plan = make_plan(facts(6), section(allow_smaller=True), seed=1)
    for name in ("sft-x", "grpo-aks-x", "grpo-ktg-x"):
        counts = kinds(plan, name, "train")
        assert counts["ktg"] + counts["aks"] > 0
        if counts["ktg"]:
            assert (counts["ktg single"], counts["ktg multi"]) == divide(counts["ktg"], 3.0)
        if counts["aks"]:
            assert (counts["aks A"], counts["aks B"]) == divide(counts["aks"], 1.0)
    assert any(p.given < p.asked for p in plan.lines)


def test_corpus_weights_video_caps_and_zero_target_share_hold():
    videos = facts(80)
    weighted = [
        CorpusRef(dataset=d, root="x", weight=w) for d, w in zip(DATASETS, (1, 1, 2), strict=True)
    ]
    sets = {"grpo-aks-x": SetSize(aks=40)}
    plan = make_plan(videos, section(corpora=weighted, sets=sets, max_per_video=1), seed=1)
    rows = plan.rows["grpo-aks-x", "train"]
    assert Counter(r.dataset for r in rows) == {
        "ref-youtube-vos": 10,
        "mevis": 10,
        "revos": 20,
    }
    assert max(Counter((r.dataset, r.video) for r in rows).values()) == 1

    nothing = np.zeros(12, np.int64)
    absent = ExpressionFacts("9", 0, nothing, nothing.astype(np.int16), nothing.astype(bool))
    with_absent = [
        VideoFacts(v.corpus, v.dataset, v.video, v.usable_t, (*v.expressions, absent), 7, ())
        for v in videos
    ]
    sets = {"grpo-ktg-x": SetSize(ktg=50)}
    plan = make_plan(with_absent, section(sets=sets, zero_target_share=0.2), seed=1)
    assert kinds(plan, "grpo-ktg-x", "train") == {
        "ktg": 50,
        "ktg none": 10,
        "ktg single": 30,
        "ktg multi": 10,
    }
    assert make_plan(with_absent, section(sets=sets), seed=1).left_out["no_target"] == 240


def test_unusable_frames_are_never_shown():
    videos = facts(120)
    blind = [
        VideoFacts(v.corpus, v.dataset, v.video, np.arange(12) >= 6, v.expressions, 6, ())
        for v in videos
    ]
    plan = make_plan(blind, section(allow_smaller=True), seed=1)
    assert min(r.frame_index for rows in plan.rows.values() for r in rows) >= 6


def test_clips_of_one_name_are_in_one_split():
    videos = facts(40)
    same = [
        VideoFacts(
            v.corpus,
            v.dataset,
            f"{v.dataset}/x/{v.video.split('-')[-1]}",
            v.usable_t,
            v.expressions,
            6,
            (),
        )
        for v in videos
    ]
    plan = make_plan(same, section(allow_smaller=True), seed=1)
    names = {
        s: {r.video.split("/")[-1] for k, rs in plan.rows.items() for r in rs if k[1] == s}
        for s in ("train", "val")
    }
    assert not names["train"] & names["val"]


def test_paper_sizes_from_many_videos_in_seconds():
    videos = facts(3334, n_expressions=8, frames=20)
    assert len(videos) > 10_000
    data = DataSection(corpora=[CorpusRef(dataset=d, root="x") for d in DATASETS])
    start = time.process_time()
    plan = make_plan(videos, data, seed=1)
    assert time.process_time() - start < 10
    assert {k[0]: len(v) for k, v in plan.rows.items() if k[1] == "train"} == {
        "sft-28k": 28000,
        "grpo-aks-4k": 4000,
        "grpo-ktg-6k": 6000,
    }
    assert kinds(plan, "sft-28k", "train")["ktg single"] == 15000


def test_data_section_refuses_invalid_values():
    with pytest.raises(ValueError, match="must start with sft or grpo"):
        section(sets={"../x": SetSize(aks=1)})
    with pytest.raises(ValueError, match="no rows"):
        section(sets={"sft-x": SetSize()})
    with pytest.raises(ValueError, match="weight"):
        section(corpora=[CorpusRef(dataset="mevis", weight=1), CorpusRef(dataset="revos")])


@pytest.mark.parametrize("seed", range(4))
def test_undecodable_frames_outside_the_rows_do_not_change_the_plan(seed):
    """Building and tracing must end with the same plan, though they know different defects.

    A build finds undecodable frames in the rows that it writes, tracing in those that it plans.
    """
    data, videos = section(keyframe="any_visible"), facts(24, seed=seed, frames=14)
    rng = np.random.default_rng(seed)
    bad = [frozenset(np.flatnonzero(rng.random(14) < 0.15).tolist()) for _ in videos]
    place = {v.video: k for k, v in enumerate(videos)}

    def settle(known: list[frozenset[int]]) -> SamplingPlan:
        while True:
            without_frames = [replace(v, undecodable=k) for v, k in zip(videos, known, strict=True)]
            plan = make_plan(without_frames, data, 3)
            next_known = list(known)
            for row in (r for rows in plan.rows.values() for r in rows):
                next_known[place[row.video]] |= bad[place[row.video]] & {row.frame_index}
            if next_known == known:
                return plan
            known = next_known

    nothing = [frozenset()] * len(videos)
    some = [b if k % 2 else frozenset() for k, b in enumerate(bad)]
    plans = [settle(known) for known in (nothing, some, bad)]
    assert plans[0].rows == plans[1].rows == plans[2].rows
    shown = {(r.video, r.frame_index) for rows in plans[0].rows.values() for r in rows}
    assert all(f not in bad[place[v]] for v, f in shown)


def test_errors_name_the_video_cap_if_it_is_the_limit():
    with pytest.raises(InputError, match="at 1 a video"):
        make_plan(facts(14, seed=9), section(max_per_video=1), 3)
    plan = make_plan(facts(14, seed=9), section(max_per_video=1, allow_smaller=True), 3)
    assert "data.max_per_video" in plan.table()
