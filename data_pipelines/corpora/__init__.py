"""Readers of the five public corpora in their published layouts. Start at `open_corpus`."""

from data_pipelines.corpora.corpus import Corpus, CorpusFault, Expression, Video
from data_pipelines.corpora.readers import READERS, open_corpus

__all__ = ["READERS", "Corpus", "CorpusFault", "Expression", "Video", "open_corpus"]
