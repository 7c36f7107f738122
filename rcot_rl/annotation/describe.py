"""`rcot data describe`: the description of every video of the corpora (VDG; eq. 1, A.1).

    OUT/descriptions.ledger.jsonl   every response, as it came
    OUT/descriptions.jsonl          {"dataset", "video", "description", …}, in the corpora's order,
                                    control tokens neutralized

The prompt, the frames and their canvas are those of inference: the policy reads at training what it
will have written itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.corpora import Corpus, Video
from data_pipelines.planning.survey import open_corpora
from data_pipelines.traces.response_cache import write_lines
from rcot_rl.annotation.session import Session, key_of, ray_session, say
from rcot_rl.inference.batch import Ask
from rcot_rl.inference.video import sample_uniform
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.schema import Recipe

FILE = "descriptions.jsonl"


def describe(recipe: Recipe, out: Path) -> Path:
    """Describe what the ledger in `out` does not describe yet; returns the file of descriptions.

    Raises InputError for corpora, models or prompts at fault. A video without a readable frame, or
    that the model has nothing to say of, has an empty description and a `fault`.
    """
    corpora = open_corpora(recipe.data)
    prompts = load_prompts(recipe.prompts)
    asks: dict[tuple[int, str], Ask | None] = {
        (number, video.id): _ask(recipe, prompts, corpus, video)
        for number, corpus in enumerate(corpora)
        for video in corpus.videos()
    }
    identity = {"canvas": recipe.canvas.video, "fps": recipe.predict.fps}
    ledger = out / "descriptions.ledger.jsonl"
    session = Session(recipe, recipe.data.describer, "describe", ledger, identity)
    wanted = [ask for ask in asks.values() if ask is not None]
    with session.ledger:
        missing = [a for a in wanted if a.key not in session.ledger]
        say(message=f"{len(wanted)} videos, {len(wanted) - len(missing)} of them described before")
        if missing:
            with ray_session(recipe):
                session.ask(missing)
    write_lines(out / FILE, _lines(corpora, asks, session))
    return out / FILE


def _ask(recipe: Recipe, prompts: Prompts, corpus: Corpus, video: Video) -> Ask | None:
    """As the pipeline asks, of the frames that are there and whole; None when there is none."""
    there = [f for f in video.frames if corpus.has_frame(video.id, f)]
    frames = [corpus.frame_path(video.id, f) for f in there]
    if not frames:
        return None
    most = min(n for n in (recipe.predict.max_frames, len(frames)) if n)
    shown = [str(frames[i].resolve()) for i in sample_uniform(len(frames), most)]
    text = prompts.vdg(len(shown))
    key = key_of(corpus.dataset, video.id, prompt=f"{text}\0{len(frames)}")
    seed = zlib.crc32(f"{recipe.seed}\0{key}".encode())
    fps = recipe.predict.fps
    return Ask(key, text, tuple(shown), "video", recipe.canvas.video, seed, fps)


def _lines(
    corpora: list[Corpus], asks: dict[tuple[int, str], Ask | None], session: Session
) -> Iterator[dict[str, Any]]:
    for (number, video), ask in asks.items():
        line: dict[str, Any] = {"dataset": corpora[number].dataset, "video": video}
        if ask is None:
            yield {**line, "description": "", "fault": "no_frames"}
            continue
        record = session.ledger.records[ask.key]
        said = record["response"]
        text = neutralize((parse_response(said).answer or said).strip())
        fault = record.get("fault") or ("" if text else "empty")
        yield {**line, "description": text, **({"fault": fault} if fault else {})}
