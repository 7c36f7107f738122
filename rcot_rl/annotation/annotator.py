"""Run many prompts through a model on Ray Data, each only once."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.traces.response_cache import ResponseCache
from rcot_rl.annotation.annotation_process import TEXTS, Annotation
from rcot_rl.events import emit
from rcot_rl.inference.batch import Ask, BatchEngine
from rcot_rl.inference.model_folder import check_model, find_model, fingerprint
from rcot_rl.inference.policy import Sampling
from rcot_rl.recipe.data_section import DescriberSection
from rcot_rl.recipe.schema import Recipe

logger = logging.getLogger(__name__)


class Annotator:
    """A model and its response cache; responses are in `cache.records`."""

    def __init__(
        self,
        recipe: Recipe,
        section: DescriberSection,
        what: Annotation,
        cache: Path,
        identity: Mapping[str, Any],
    ) -> None:
        """Check the model and open the response cache. Raises InputError.

        Args:
            section: The recipe's `data.describer` or `data.tracer`.
            identity: What determines the responses, besides model, sampling and seed.
        """
        self.model = find_model(section.model or recipe.models.policy)
        check_model(self.model)
        self.recipe, self.section, self.texts = recipe, section, TEXTS[what]
        tokens = section.max_tokens or recipe.predict.vdg_tokens
        self.sampling = Sampling(
            tokens, temperature=section.temperature, top_p=section.top_p, top_k=section.top_k
        )
        self.cache = ResponseCache(
            cache,
            {
                "what": what,
                "model": fingerprint(self.model),
                "seed": recipe.data_seed,
                "max_tokens": tokens,
                "temperature": section.temperature,
                "top_p": section.top_p,
                "top_k": section.top_k,
                **identity,
            },
        )
        self._engine: BatchEngine | None = None
        logger.info(
            "%s with %s: %s, %d engines, %d responses in %s",
            what,
            self.model,
            self.sampling,
            section.engines,
            len(self.cache.records),
            cache,
        )

    def annotate(self, asks: Sequence[Ask]) -> None:
        """Generate the responses that the cache does not have yet."""
        asks = [ask for ask in asks if ask.key not in self.cache]
        if not asks:
            return
        if self._engine is None:
            emit("note", message=f"vLLM starts on {self.model}, engines: {self.section.engines}")
            self._engine = BatchEngine(
                self.model,
                self.recipe.engine,
                self.recipe.device,
                engines=self.section.engines,
                batch=self.section.batch,
                seed=self.recipe.data_seed,
            )
        meter = _Meter(self.texts, len(asks))
        for answer in self._engine.answers(asks, self.sampling):
            record: dict[str, Any] = {"response": answer.text, "tokens": answer.tokens}
            if answer.fault:
                record["fault"] = answer.fault
            self.cache.add(answer.key, record)
            meter.count(answer.tokens)
        meter.show()


class _Meter:
    """Progress and throughput, reported every few seconds."""

    def __init__(self, texts: str, total: int) -> None:
        self.texts, self.total = texts, total
        self.done = self.tokens = 0
        self.started: float | None = None
        self.shown = time.monotonic()

    def count(self, tokens: int) -> None:
        # the engine's start-up does not count as generation
        self.started = self.started or time.monotonic()
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        if time.monotonic() - self.shown > 5:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        seconds = max(self.shown - (self.started or self.shown), 1e-3)
        rate = f"{self.tokens / seconds:.0f} tokens/s" if seconds > 1 else ""
        if self.done:
            emit("progress", what=self.texts, done=self.done, total=self.total, rate=rate)


def key_of(*parts: object, prompt: str) -> str:
    """Return a cache key; it changes with the prompt, so that stale responses are not reused."""
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:12]
    return json.dumps([*map(str, parts), digest], ensure_ascii=False)


def prompts_digest(templates: Mapping[str, str], names: Iterable[str]) -> str:
    """Return a digest of the templates of these names."""
    text = json.dumps({name: templates.get(name) for name in names}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
