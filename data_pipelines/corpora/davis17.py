"""Ref-DAVIS17 in the layout of Ref-YouTube-VOS that the field converts it to.

    ROOT/meta_expressions/{train,valid}/meta_expressions.json
    ROOT/{train,valid}/{JPEGImages,Annotations}/<video>/<frame>.{jpg,png}

Four expressions an object (two annotators, first frame and full video). Unlike Ref-YouTube-VOS its
evaluation split has masks and object ids. The conversion of the DAVIS archives is left out.
"""

from __future__ import annotations

from typing import ClassVar

from data_pipelines.corpora.refytvos import RefYoutubeVos


class Davis17(RefYoutubeVos):
    dataset: ClassVar[str] = "davis17"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid")
