"""What the corpora of a recipe offer: what `rcot data build` and `rcot data trace` plan from.

Both must see the same, or the traces would be of other rows than those that are built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import cv2

from data_pipelines.corpora import Corpus, CorpusFault, Video, open_corpus
from data_pipelines.parallel import Progress, ordered_map
from data_pipelines.planning.absent import with_foreign
from data_pipelines.planning.candidates import Candidate
from data_pipelines.planning.mask_alignment import Propagator
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.planning.scan import Defect, VideoFacts, scan_video, unread_videos
from data_pipelines.traces.texts import Describer, FileDescriptions, TraceKey
from rcot_rl.errors import InputError
from rcot_rl.recipe.alignment import AlignmentSection
from rcot_rl.recipe.data import DataSection


def open_corpora(data: DataSection) -> list[Corpus]:
    """The corpora of the recipe, with their metadata and masks' index read. Raises InputError."""
    corpora: list[Corpus] = []
    seen: dict[tuple[str, str], int] = {}
    for number, ref in enumerate(data.corpora):
        key = f"data.corpora[{number}]"
        if ref.root is None:
            raise InputError(f"{ref.dataset} has no root", key=f"{key}.root")
        corpus = open_corpus(ref.dataset, ref.root, ref.split, strict=False)
        if not corpus.has_masks:
            raise InputError(
                f"the split '{ref.split}' of {ref.dataset} has no masks to learn from",
                file=ref.root,
                key=f"{key}.split",
            )
        corpus.load()
        if not corpus.videos() and corpus.faults:
            raise InputError(f"no entry can be read; the first: {corpus.faults[0].fault}", key=key)
        for video in corpus.videos():
            other = seen.setdefault((corpus.dataset, video.id), number)
            if other != number:
                raise InputError(
                    f"video {video.id} is in data.corpora[{other}] too", file=ref.root, key=key
                )
        corpora.append(corpus)
    return corpora


def survey(
    corpora: Sequence[Corpus],
    data: DataSection,
    canvas: int,
    progress: Progress | None = None,
    propagator: Propagator | None = None,
    seed: int = 0,
) -> list[VideoFacts]:
    """What the plan is made of. Raises InputError for corpora that are broken beyond the recipe's
    patience."""
    if data.alignment.level == "sam2" and propagator is None:
        raise InputError("level sam2 needs a segmenter", key="data.alignment.level")
    # Images are spread over processes; OpenCV's own threads must not exist when those are forked.
    cv2.setNumThreads(1)
    say = progress or (lambda what, done, total: None)
    # SAM2 runs in this process: its threads and its device do not survive a fork
    workers = 1 if propagator is not None else data.workers
    facts = scan(corpora, workers, canvas, say, data.alignment, propagator)
    _stop_if_broken(facts, data)
    if data.zero_target_foreign:
        facts = with_foreign(facts, corpora, data.zero_target_foreign, seed)
    return facts


def scan(
    corpora: Sequence[Corpus],
    workers: int,
    canvas: int,
    progress: Progress,
    alignment: AlignmentSection | None = None,
    propagator: Propagator | None = None,
) -> list[VideoFacts]:
    """Facts of every video, in the corpora's order."""
    items = [(c, video) for c, corpus in enumerate(corpora) for video in corpus.videos()]
    out = []

    def one(item: tuple[int, Video]) -> VideoFacts:
        return scan_video(corpora[item[0]], *item, canvas, alignment, propagator)

    for facts in ordered_map(one, items, workers):
        out.append(facts)
        progress("scan", len(out), len(items))
    return [*out, *(f for c, corpus in enumerate(corpora) for f in unread_videos(corpus, c))]


def described(
    facts: Sequence[VideoFacts], describer: Describer, data: DataSection
) -> list[VideoFacts]:
    """The same facts, without expressions of videos that have no description: a defect of each.
    Raises InputError beyond the recipe's patience."""
    if not isinstance(describer, FileDescriptions):
        return list(facts)
    out = []
    for video in facts:
        if (video.dataset, video.video) in describer.texts or not video.expressions:
            out.append(video)
            continue
        place = str(describer.path)
        defect = Defect(video.dataset, video.video, "", "no_description", place, "")
        out.append(replace(video, expressions=(), defects=(*video.defects, defect)))
    _stop_if_broken(out, data)
    return out


def without_frames(
    facts: Sequence[VideoFacts],
    corpora: Sequence[Corpus],
    spoiled: Iterable[tuple[Instance, CorpusFault]],
    data: DataSection,
) -> list[VideoFacts]:
    """The same facts, knowing of frames that rows could not be made of, and why: nothing else of
    the plan changes. Raises InputError beyond the recipe's patience."""
    found: dict[tuple[int, str], dict[int, CorpusFault]] = defaultdict(dict)
    for instance, fault in spoiled:
        found[instance.corpus, instance.video].setdefault(instance.frame_index, fault)
    out = []
    for video in facts:
        faults = found.get((video.corpus, video.video))
        if faults:
            defects = [
                Defect(video.dataset, video.video, "", f.reason, f.place, f.detail)
                for _, f in sorted(faults.items())
            ]
            video = replace(
                video,
                spoiled=video.spoiled | frozenset(faults),
                defects=(*video.defects, *defects),
            )
        out.append(video)
    _stop_if_broken(out, data)
    return out


def positions(
    facts: Sequence[VideoFacts],
    corpora: Sequence[Corpus],
    refused: Collection[TraceKey],
) -> dict[str, frozenset[Candidate]]:
    """Task -> instances that no trace could be had of, as the plan's positions."""
    wanted: dict[tuple[str, str], list[TraceKey]] = defaultdict(list)
    for key in refused:
        wanted[key[1], key[2]].append(key)
    found: dict[str, set[Candidate]] = {"aks": set(), "ktg": set()}
    for v, video in enumerate(facts):
        for task, _, _, expression, frame in wanted.get((video.dataset, video.video), ()):
            frames = corpora[video.corpus].video(video.video).frames
            at = [e for e, facts_ in enumerate(video.expressions) if facts_.id == expression]
            if at and frame in frames and task in found:
                found[task].add(Candidate(v, at[0], frames.index(frame)))
    return {task: frozenset(candidates) for task, candidates in found.items()}


def _stop_if_broken(facts: Sequence[VideoFacts], data: DataSection) -> None:
    defects = [d for f in facts for d in f.defects]
    shares = {
        "expressions": (
            sum(f.n_expressions - len(f.expressions) for f in facts),
            sum(f.n_expressions for f in facts),
        ),
        "frames": (
            sum(int((~f.usable_t).sum()) + len(f.spoiled) for f in facts),
            sum(f.usable_t.size for f in facts),
        ),
    }
    for what, (bad, total) in shares.items():
        if bad > data.max_fault_share * total:
            first = defects[0]
            raise InputError(
                f"{bad} of {total} {what} are defective, more than data.max_fault_share "
                f"{data.max_fault_share}; the first: {first.reason} {first.detail}".strip(),
                file=first.place,
            )
