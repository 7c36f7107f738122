"""Ref-DAVIS17, converted to the layout of Ref-YouTube-VOS as is common in the field.

    ROOT/meta_expressions/{train,valid}/meta_expressions.json
    ROOT/{train,valid}/{JPEGImages,Annotations}/<video>/<frame>.{jpg,png}

Each object has four expressions (two annotators, first frame and full video), which follow one
another in the file. Unlike Ref-YouTube-VOS, the evaluation split has masks and object ids. The
label 255 marks void pixels, which DAVIS' own evaluation ignores. Converting the DAVIS archives is
out of scope.
"""

from __future__ import annotations

from typing import ClassVar

from data_pipelines.corpora.refytvos import RefYoutubeVos


class Davis17(RefYoutubeVos):
    """Reader of Ref-DAVIS17."""

    dataset: ClassVar[str] = "davis17"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid")
