"""Borrowed expressions come from other videos, share no content word, and have the answer []."""

from __future__ import annotations

import json
from functools import partial

import pyarrow.parquet as pq
import pytest

from data_pipelines.build import build as build_shards
from data_pipelines.corpora.corpus import FOREIGN
from data_pipelines.planning.absent import content_words
from data_pipelines.planning.survey import open_corpora
from data_pipelines.toy.layouts import write_corpus
from data_pipelines.verify.check_sets import check
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

build = partial(build_shards, canvas=56)


def test_content_words_are_lowercase_nouns_without_plural():
    assert content_words("The two elephants walking behind the man's red car") == {
        "elephant",
        "red",
        "car",
    }
    assert content_words("the one on the left, moving") == frozenset()


@pytest.fixture
def data(tmp_path) -> DataSection:
    write_corpus(tmp_path / "mevis", "mevis", "train", 16, 2, "rich")
    return DataSection(
        corpora=[CorpusRef(dataset="mevis", root=str(tmp_path / "mevis"))],
        sets={"grpo-ktg-x": SetSize(ktg=40), "sft-x": SetSize(ktg=24)},
        single_multi=None,
        keyframe="any_visible",
        zero_target_share=0.25,
        zero_target_foreign=3,
    )


def test_borrowed_expressions_share_no_content_word_with_the_video(data, tmp_path):
    build(data, tmp_path / "out", "qwen", seed=3)
    assert check(tmp_path / "out").ok
    corpus = open_corpora(data)[0]
    absent = []
    for shard in (tmp_path / "out").rglob("*.parquet"):
        for row in pq.read_table(shard).to_pylist():
            info = row["extra_info"]
            truth = json.loads(row["reward_model"]["ground_truth"])
            assert (info["target"] == "none") == (truth == [])
            if info["target"] == "none":
                absent.append(info)
                assert info["expression"] in row["prompt"][0]["content"]
    assert len(absent) == 10 + 6
    for info in absent:
        donor, _, name = info["expression_id"].rpartition(FOREIGN)
        assert donor and donor != info["video"]
        donor_expression = next(e for e in corpus.video(donor).expressions if e.id == name)
        assert donor_expression.text == info["expression"] and donor_expression.object_ids
        here = [content_words(e.text) for e in corpus.video(info["video"]).expressions]
        assert not content_words(info["expression"]) & frozenset().union(*here)


def test_borrowing_is_off_by_default_and_deterministic(data, tmp_path):
    first = build(data, tmp_path / "a", "qwen", seed=3)["sets"]["grpo-ktg-x"]["files"]
    assert build(data, tmp_path / "b", "qwen", seed=3)["sets"]["grpo-ktg-x"]["files"] == first
    plain = data.model_copy(update={"zero_target_foreign": 0, "allow_smaller": True})
    assert (
        build(plain, tmp_path / "c", "qwen", seed=3)["sets"]["sft-x"]["counts"]["train"].get(
            "ktg/none", 0
        )
        < 6
    )
