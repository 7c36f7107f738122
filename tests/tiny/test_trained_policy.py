"""The shipped trained policy, and the clips that measure it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rcot_rl.inference.demo_clip import SEED, truth, unseen_clip
from rcot_rl.inference.model_folder import (
    SHIPPED,
    TINY,
    TINY_TRAINED,
    check_model,
    check_same_model,
    fingerprint,
    read_card,
)
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.segmentation.segmenter import TINY as TINY_SAM2
from rcot_rl.tiny import trained_eval


def test_it_is_the_base_network_with_other_weights():
    check_model(TINY_TRAINED)
    check_same_model(TINY, TINY_TRAINED)
    assert fingerprint(TINY_TRAINED) != fingerprint(TINY)
    assert read_card(TINY_TRAINED) == read_card(TINY)


def test_the_shipped_models_are_small():
    files = [f for folder in (*SHIPPED.values(), TINY_SAM2) for f in folder.iterdir()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert sum(f.stat().st_size for f in TINY_TRAINED.iterdir()) < 11e6
    assert {"README.md", "rcot.json"} <= {f.name for f in TINY_TRAINED.iterdir()}


def test_its_clips_are_not_those_of_its_training():
    recipe = load_recipe("laptop", [])
    assert recipe.toy is not None and recipe.toy.seed != SEED


def test_a_query_has_targets_that_its_clip_shows():
    for index in range(12):
        scene, query = unseen_clip(index)
        targets = truth(scene, query)
        assert query.targets and targets.any()
        visible = [[m.any() for m in scene.masks(t)] for t in range(scene.n_frames)]
        expected = [any(seen[i] for i in query.targets) for seen in visible]
        assert targets.any(axis=(1, 2)).tolist() == expected


class _PerfectModels:
    """Finds the targets of clips 0 and 1 exactly, and nothing in any other clip."""

    def traces(self, frames, queries, *, key):
        from rcot_rl.inference.query_trace import Trace

        self.index = int(key.rpartition("/")[2].removesuffix(".mp4"))
        return [Trace(queries[0])]

    def masks(self, frames, trace):
        scene, query = unseen_clip(self.index)
        for t, mask in enumerate(truth(scene, query)):
            yield t, mask[None] if self.index < 2 else np.zeros((0, *mask.shape), bool)


def test_the_figures_count_what_was_found():
    rows = trained_eval.query_rows(_PerfectModels(), [0, 1, 2])
    assert [row["J"] for row in rows[:2]] == [1.0, 1.0]
    empty = ~truth(*unseen_clip(2)).any(axis=(1, 2))
    assert rows[2]["J"] == pytest.approx(empty.mean())
    assert json.loads(json.dumps(rows)) == rows
