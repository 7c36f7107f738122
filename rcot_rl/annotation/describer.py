"""Describe every video of the corpora with a model (`rcot data describe`; VDG, eq. 1, A.1).

    OUT/descriptions.ledger.jsonl   the response cache
    OUT/descriptions.jsonl          {"dataset", "video", "description", …}, in the corpora's order,
                                    control tokens neutralized

VDG is video description generation. The prompt, the frames and their canvas are those of inference:
in training the policy reads what it will have written itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.corpora import Corpus, Video
from data_pipelines.planning.survey import open_corpora
from data_pipelines.traces.response_cache import write_lines
from rcot_rl.annotation.annotation_process import FILES
from rcot_rl.annotation.annotator import Annotator, key_of
from rcot_rl.events import emit
from rcot_rl.inference.batch import Ask
from rcot_rl.inference.ray_session import ray_session
from rcot_rl.inference.video import sample_uniform
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.schema import Recipe

FILE = FILES["describe"]


def describe(recipe: Recipe, out: Path) -> Path:
    """Describe the videos that the response cache in `out` does not have yet.

    A video without a readable frame, or without any text in the response, has an empty description
    and a `fault`. Raises InputError.
    """
    corpora = open_corpora(recipe.data)
    prompts = load_prompts(recipe.prompts)
    asks: dict[tuple[int, str], Ask | None] = {
        (number, video.id): _ask(recipe, prompts, corpus, video)
        for number, corpus in enumerate(corpora)
        for video in corpus.videos()
    }
    identity = {"canvas": recipe.canvas.video, "fps": recipe.predict.fps}
    cache = out / "descriptions.ledger.jsonl"
    annotator = Annotator(recipe, recipe.data.describer, "describe", cache, identity)
    wanted = [ask for ask in asks.values() if ask is not None]
    with annotator.cache:
        missing = [a for a in wanted if a.key not in annotator.cache]
        known = len(wanted) - len(missing)
        emit("note", message=f"{len(wanted)} videos, {known} of them described before")
        if missing:
            with ray_session(recipe):
                annotator.annotate(missing)
    write_lines(out / FILE, _lines(corpora, asks, annotator))
    return out / FILE


def _ask(recipe: Recipe, prompts: Prompts, corpus: Corpus, video: Video) -> Ask | None:
    """Return the request that inference makes, of the intact frames; None if there are none."""
    intact = [f for f in video.frames if corpus.has_frame(video.id, f)]
    frames = [corpus.frame_path(video.id, f) for f in intact]
    if not frames:
        return None
    most = min(n for n in (recipe.predict.max_frames, len(frames)) if n)
    sampled = [str(frames[i].resolve()) for i in sample_uniform(len(frames), most)]
    text = prompts.vdg(len(sampled))
    key = key_of(corpus.dataset, video.id, prompt=f"{text}\0{len(frames)}")
    seed = zlib.crc32(f"{recipe.data_seed}\0{key}".encode())
    fps = recipe.predict.fps
    return Ask(key, text, tuple(sampled), "video", recipe.canvas.video, seed, fps)


def _lines(
    corpora: list[Corpus], asks: dict[tuple[int, str], Ask | None], annotator: Annotator
) -> Iterator[dict[str, Any]]:
    for (number, video), ask in asks.items():
        line: dict[str, Any] = {"dataset": corpora[number].dataset, "video": video}
        if ask is None:
            yield {**line, "description": "", "fault": "no_frames"}
            continue
        record = annotator.cache.records[ask.key]
        response = record["response"]
        text = neutralize((parse_response(response).answer or response).strip())
        fault = record.get("fault") or ("" if text else "empty")
        yield {**line, "description": text, **({"fault": fault} if fault else {})}
