"""Open and scan the corpora of a recipe, for `rcot data build` and `rcot data trace`.

Both must plan from the same facts, or traces would belong to other rows than those that are built.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2

from data_pipelines.corpora import Corpus, CorpusFault, Video, open_corpus
from data_pipelines.parallel import Progress, ordered_map
from data_pipelines.planning.absent import with_foreign_expressions
from data_pipelines.planning.candidates import Candidate
from data_pipelines.planning.row_drawing import Instance, Task
from data_pipelines.planning.scan import CorpusDefect, VideoFacts, scan_video, unreadable_videos
from data_pipelines.traces.texts import Describer, FileDescriptions, TraceKey
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import AlignmentSection, DataSection

if TYPE_CHECKING:
    from rcot_rl.segmentation.segmenter import VideoSegmenter

logger = logging.getLogger(__name__)


def open_corpora(data: DataSection) -> list[Corpus]:
    """Open the corpora of the recipe and read their metadata and mask index. Raises InputError."""
    corpora: list[Corpus] = []
    seen: dict[tuple[str, str], int] = {}
    for number, ref in enumerate(data.corpora):
        key = f"data.corpora[{number}]"
        if ref.root is None:
            raise InputError(f"{ref.dataset} has no root", key=f"{key}.root")
        corpus = open_corpus(ref.dataset, ref.root, ref.split, strict=False)
        if not corpus.has_masks:
            raise InputError(
                f"split '{ref.split}' of {ref.dataset} has no masks to train on",
                file=ref.root,
                key=f"{key}.split",
            )
        corpus.load()
        if not corpus.videos() and corpus.faults:
            raise InputError(
                f"no metadata entry can be read; the first: {corpus.faults[0].fault}", key=key
            )
        for video in corpus.videos():
            other = seen.setdefault((corpus.dataset, video.id), number)
            if other != number:
                raise InputError(
                    f"video {video.id} is in data.corpora[{other}] too", file=ref.root, key=key
                )
        logger.info(
            "corpus %s %s: %d videos in %s", ref.dataset, ref.split, len(corpus.videos()), ref.root
        )
        corpora.append(corpus)
    return corpora


def survey(
    corpora: Sequence[Corpus],
    data: DataSection,
    canvas: int,
    progress: Progress | None = None,
    propagator: VideoSegmenter | None = None,
    seed: int = 0,
) -> list[VideoFacts]:
    """Return the facts that the plan is made from. Raises InputError.

    Args:
        progress: Called with ("scan", done, total).
        propagator: SAM2, required by `data.alignment.level: sam2`.
        seed: Chooses the absent expressions of `data.zero_target_foreign`.
    """
    if data.alignment.level == "sam2" and propagator is None:
        raise InputError("level sam2 needs a SAM2 model", key="data.alignment.level")
    # frames are spread over forked processes, which do not survive OpenCV's threads
    cv2.setNumThreads(1)
    # SAM2 runs in this process: its threads and its device do not survive a fork
    workers = 1 if propagator is not None else data.workers
    progress = progress or (lambda label, done, total: None)
    facts = scan(corpora, workers, canvas, progress, data.alignment, propagator)
    _stop_if_broken(facts, data)
    if data.zero_target_foreign:
        facts = with_foreign_expressions(facts, corpora, data.zero_target_foreign, seed)
    return facts


def scan(
    corpora: Sequence[Corpus],
    workers: int,
    canvas: int,
    progress: Progress,
    alignment: AlignmentSection | None = None,
    propagator: VideoSegmenter | None = None,
) -> list[VideoFacts]:
    """Return the facts of every video, in the corpora's order; unreadable videos come last."""
    items = [(c, video) for c, corpus in enumerate(corpora) for video in corpus.videos()]
    out = []

    def scan_item(item: tuple[int, Video]) -> VideoFacts:

        return scan_video(corpora[item[0]], *item, canvas, alignment, propagator)

    for facts in ordered_map(scan_item, items, workers):
        out.append(facts)
        progress("videos surveyed", len(out), len(items))
    return [*out, *(f for c, corpus in enumerate(corpora) for f in unreadable_videos(corpus, c))]


def without_undescribed(
    facts: Sequence[VideoFacts], describer: Describer, data: DataSection
) -> list[VideoFacts]:
    """Remove the expressions of videos without a description, each a defect. Raises InputError."""
    if not isinstance(describer, FileDescriptions):
        return list(facts)
    out = []
    for video in facts:
        if (video.dataset, video.video) in describer.texts or not video.expressions:
            out.append(video)
            continue
        place = str(describer.path)
        defect = CorpusDefect(video.dataset, video.video, "", "no_description", place, "")
        out.append(replace(video, expressions=(), defects=(*video.defects, defect)))
    _stop_if_broken(out, data)
    return out


def without_frames(
    facts: Sequence[VideoFacts],
    failed: Iterable[tuple[Instance, CorpusFault]],
    data: DataSection,
) -> list[VideoFacts]:
    """Mark the frames of rows that could not be made; changes nothing else. Raises InputError."""
    faults_of: dict[tuple[int, str], dict[int, CorpusFault]] = defaultdict(dict)
    for instance, fault in failed:
        faults_of[instance.corpus, instance.video].setdefault(instance.frame_index, fault)
    out = []
    for video in facts:
        faults = faults_of.get((video.corpus, video.video))
        if faults:
            defects = [
                CorpusDefect(video.dataset, video.video, "", f.reason, f.place, f.detail)
                for _, f in sorted(faults.items())
            ]
            video = replace(
                video,
                undecodable=video.undecodable | frozenset(faults),
                defects=(*video.defects, *defects),
            )
        out.append(video)
    _stop_if_broken(out, data)
    return out


def positions(
    facts: Sequence[VideoFacts],
    corpora: Sequence[Corpus],
    refused: Collection[TraceKey],
) -> dict[Task, frozenset[Candidate]]:
    """Return the instances without an acceptable trace: task -> their positions in the plan."""
    keys_of: dict[tuple[str, str], list[TraceKey]] = defaultdict(list)
    for key in refused:
        keys_of[key[1], key[2]].append(key)
    aks: set[Candidate] = set()
    ktg: set[Candidate] = set()
    by_task = {"aks": aks, "ktg": ktg}
    for v, video in enumerate(facts):
        for task, _, _, expression, frame in keys_of.get((video.dataset, video.video), ()):
            frames = corpora[video.corpus].video(video.video).frames
            at = [e for e, facts_ in enumerate(video.expressions) if facts_.id == expression]
            if at and frame in frames and task in by_task:
                by_task[task].add(Candidate(v, at[0], frames.index(frame)))
    return {"aks": frozenset(aks), "ktg": frozenset(ktg)}


def _stop_if_broken(facts: Sequence[VideoFacts], data: DataSection) -> None:
    """Raise InputError if the defects exceed `data.max_fault_share`."""
    defects = [d for f in facts for d in f.defects]
    shares = {
        "expressions": (
            sum(f.n_expressions - len(f.expressions) for f in facts),
            sum(f.n_expressions for f in facts),
        ),
        "frames": (
            sum(int((~f.usable_t).sum()) + len(f.undecodable) for f in facts),
            sum(f.usable_t.size for f in facts),
        ),
    }
    for kind, (bad, total) in shares.items():
        if bad > data.max_fault_share * total:
            first = defects[0]
            raise InputError(
                f"{bad} of {total} {kind} are defective, more than data.max_fault_share "
                f"{data.max_fault_share}; the first: {first.reason} {first.detail}".strip(),
                file=first.place,
            )
