"""Questions about what is not there: expressions of other videos, for zero-target rows.

A sentence of another video of the same corpus is asked of a video in which none of its content
words is said of anything. That is a heuristic, and the only one that metadata allows: corpora do
not list all that a video shows. It errs rarely where videos differ in kind (an elephant, a
skateboard), and often where they do not; so it is an option of the recipe, off by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.corpora import Corpus, Video
from data_pipelines.planning.scan import ExpressionFacts, VideoFacts

SEPARATOR = "#"
"""In the id of such an expression: the donor video, then its expression."""

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
_TRIES = 50


def content_words(text: str) -> frozenset[str]:
    """Words of a sentence that name something, without a plural's s."""
    words = (word.lower() for word in _WORD.findall(text))
    return frozenset(w.rstrip("s") or w for w in words if w not in _COMMON)


def with_foreign(
    facts: Sequence[VideoFacts], corpora: Sequence[Corpus], per_video: int, seed: int
) -> list[VideoFacts]:
    """The same facts, with up to `per_video` absent expressions for each usable video."""
    words = [[_words_of(v) for v in corpus.videos()] for corpus in corpora]
    places = [{v.id: i for i, v in enumerate(corpus.videos())} for corpus in corpora]
    out = []
    for number, video in enumerate(facts):
        if not video.expressions or not video.usable_t.any():
            out.append(video)
            continue
        rng = np.random.default_rng([seed, 11, number])
        corpus = corpora[video.corpus]
        here = places[video.corpus][video.video]
        found = _donated(corpus, words[video.corpus], here, per_video, rng)
        nothing = np.zeros(video.usable_t.size, dtype=np.int64)
        absent = tuple(
            ExpressionFacts(i, 0, nothing, nothing.astype(np.int16), nothing.astype(bool))
            for i in found
        )
        expressions = (*video.expressions, *absent)
        n_expressions = video.n_expressions + len(absent)
        out.append(replace(video, expressions=expressions, n_expressions=n_expressions))
    return out


def _words_of(video: Video) -> tuple[frozenset[str], list[tuple[str, frozenset[str]]]]:
    """All content words said of a video, and those of each expression that has a target."""
    each = [(e.id, content_words(e.text)) for e in video.expressions if e.object_ids]
    every = [content_words(e.text) for e in video.expressions]
    return frozenset().union(*every), each


def _donated(
    corpus: Corpus,
    words: Sequence[tuple[frozenset[str], list[tuple[str, frozenset[str]]]]],
    here: int,
    wanted: int,
    rng: np.random.Generator,
) -> list[str]:
    said_here = words[here][0]
    out: list[str] = []
    for _ in range(_TRIES):
        if len(out) == wanted:
            break
        donor = int(rng.integers(len(words)))
        each = words[donor][1]
        if donor == here or not each:
            continue
        name, said = each[int(rng.integers(len(each)))]
        identifier = f"{corpus.videos()[donor].id}{SEPARATOR}{name}"
        if said and not said & said_here and identifier not in out:
            out.append(identifier)
    return out
