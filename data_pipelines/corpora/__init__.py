"""Readers of the five public corpora, in their layouts as published. Start at `open_corpus`."""

from data_pipelines.corpora.base import Corpus, CorpusFault, Expression, Video
from data_pipelines.corpora.registry import READERS, open_corpus

__all__ = ["READERS", "Corpus", "CorpusFault", "Expression", "Video", "open_corpus"]
