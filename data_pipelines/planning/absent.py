"""Absent expressions for zero-target rows, taken from other videos.

A video borrows expressions of other videos of its corpus whose content words appear in none of its
own expressions. This is a heuristic, and the only one that metadata allows: corpora do not list all
that a video shows. It is rarely wrong where videos differ in kind (an elephant, a skateboard), and
often wrong where they do not, so it is off by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.corpora import Corpus, Video
from data_pipelines.corpora.corpus import FOREIGN
from data_pipelines.planning.scan import ExpressionFacts, VideoFacts

_WORD = re.compile(r"[^\W\d_]{3,}")
_COMMON_WORDS = """
the and that this with from for are was were its his her their them they who which what where when
then than into onto over under left right front back side next near away toward towards behind above
below while until after before being been has have had not all both one two three four first second
third last other another only most more some any each moving moves move goes going walking standing
sitting holding wearing person people man woman boy girl object objects thing things shape shapes
video frame
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_ATTEMPTS = 50
"""Random draws for one video, at most."""

_Donor = tuple[frozenset[str], list[tuple[str, frozenset[str]]]]
"""Content words of a video's expressions, and (id, content words) of those that have a target."""


def content_words(text: str) -> frozenset[str]:
    """Return the words of a sentence that name something, without a plural's s."""
    words = (word.lower() for word in _WORD.findall(text))
    return frozenset(w.rstrip("s") or w for w in words if w not in _COMMON)


def with_foreign_expressions(
    facts: Sequence[VideoFacts], corpora: Sequence[Corpus], per_video: int, seed: int
) -> list[VideoFacts]:
    """Add up to `per_video` absent expressions to the facts of each usable video."""
    donors = [[_donor(v) for v in corpus.videos()] for corpus in corpora]
    places = [{v.id: i for i, v in enumerate(corpus.videos())} for corpus in corpora]
    out = []
    for number, video in enumerate(facts):
        if not video.expressions or not video.usable_t.any():
            out.append(video)
            continue
        rng = np.random.default_rng([seed, 11, number])
        corpus = corpora[video.corpus]
        index = places[video.corpus][video.video]
        ids = _borrowed(corpus, donors[video.corpus], index, per_video, rng)
        nothing = np.zeros(video.usable_t.size, dtype=np.int64)
        absent = tuple(
            ExpressionFacts(i, 0, nothing, nothing.astype(np.int16), nothing.astype(bool))
            for i in ids
        )
        expressions = (*video.expressions, *absent)
        n_expressions = video.n_expressions + len(absent)
        out.append(replace(video, expressions=expressions, n_expressions=n_expressions))
    return out


def _donor(video: Video) -> _Donor:
    with_target = [(e.id, content_words(e.text)) for e in video.expressions if e.object_ids]
    words = [content_words(e.text) for e in video.expressions]
    return frozenset().union(*words), with_target


def _borrowed(
    corpus: Corpus, donors: Sequence[_Donor], index: int, count: int, rng: np.random.Generator
) -> list[str]:
    """Return the ids of up to `count` absent expressions for the video at `index`."""
    own_words = donors[index][0]
    ids: list[str] = []
    for _ in range(_ATTEMPTS):
        if len(ids) == count:
            break
        donor = int(rng.integers(len(donors)))
        expressions = donors[donor][1]
        if donor == index or not expressions:
            continue
        name, words = expressions[int(rng.integers(len(expressions)))]
        identifier = f"{corpus.videos()[donor].id}{FOREIGN}{name}"
        if words and not words & own_words and identifier not in ids:
            ids.append(identifier)
    return ids
