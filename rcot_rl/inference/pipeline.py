"""VDG → KFG → AKS → KTG: from videos and queries to keyframes, boxes and points (eqs. 1 to 5).

Where the paper is silent, or the response has no valid answer, one rule applies, and each use of a
rule is recorded as a fault in the trace:

- No keyframe in the answer to KFG: the first frame is used, as without KFG (Table 3).
- AKS: the rules of `rcot_rl.protocol.keyframe_selection`, which training shares.
- An object without a box is dropped; one without a point gets the centre of its box.

Queries are processed together, stage by stage; a video is described once. Not implemented: sharing
one encoding of a video between stages, which vLLM's prefix and multimodal caches do (media come
first in every prompt).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.geometry import to_canvas
from rcot_rl.inference.policy import Policy, PolicyRequest, Sampling
from rcot_rl.inference.query_trace import (
    Trace,
    TraceStep,
    VideoClip,
    VideoQuery,
    read_objects,
    to_source,
)
from rcot_rl.inference.video import sample_uniform
from rcot_rl.protocol.keyframe_selection import KeyframeSelection
from rcot_rl.protocol.parser import parse_keyframe, parse_response
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection

NO_DESCRIPTION = "none"
"""Placeholder in prompts for a missing description."""


@dataclass(frozen=True)
class _View:
    """The frames of a video that a prompt shows."""

    key: str
    indices: tuple[int, ...]
    """Position in the prompt -> frame index."""
    canvas_thwc: np.ndarray
    """uint8 [T, S, S, 3] RGB."""


@dataclass
class _State:
    query: VideoQuery
    trace: Trace

    @property
    def description(self) -> str:
        return self.trace.description or NO_DESCRIPTION


class Pipeline:
    """Temporal reasoning and grounding with any policy."""

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        section: PredictSection,
        canvas: CanvasSection,
        seed: int = 0,
    ) -> None:
        """Set up a pipeline.

        Args:
            seed: Seed of the samples, if the section's temperature is above 0.
        """
        self.policy = policy
        self.prompts = prompts
        self.section = section
        self.canvas = canvas
        self.seed = seed
        self._described: dict[str, tuple[str, TraceStep]] = {}
        self._views: dict[str, _View] = {}

    def run(self, queries: Sequence[VideoQuery]) -> list[Trace]:
        """Return one trace per query, in order. Raises InputError."""
        states = [_State(query, Trace(query.text)) for query in queries]
        try:
            if self.section.vdg:
                self._describe(states)
            if self.section.kfg:
                self._select(states)
            self._refine(states)
            self._ground(states)
        finally:
            self._views.clear()
        return [state.trace for state in states]

    def _describe(self, states: list[_State]) -> None:
        """Generate x_vid of eq. 1, once per video."""
        clips = {s.query.clip.key: s.query.clip for s in states}
        clips = {key: clip for key, clip in clips.items() if key not in self._described}
        views = [self._view(clip) for clip in clips.values()]
        texts = [self.prompts.vdg(len(view.indices)) for view in views]
        responses = self._ask_video(texts, views, self.section.vdg_tokens)
        for key, response in zip(clips, responses, strict=True):
            # a policy trained to think and answer may do so here too
            description = parse_response(response).answer or response
            self._described[key] = (description.strip(), TraceStep("vdg", None, response))
        for state in states:
            state.trace.description, step = self._described[state.query.clip.key]
            state.trace.steps.append(step)
            if not state.trace.description:
                state.trace.faults.append("vdg:empty")

    def _select(self, states: list[_State]) -> None:
        """Generate z_sel of eq. 1."""
        views = [self._view(s.query.clip) for s in states]
        texts = [
            self.prompts.kfg(s.query.text, len(v.indices))
            for s, v in zip(states, views, strict=True)
        ]
        responses = self._ask_video(texts, views, self.section.kfg_tokens)
        for state, view, response in zip(states, views, responses, strict=True):
            trace = state.trace
            trace.steps.append(TraceStep("kfg", None, response))
            position = parse_keyframe(parse_response(response).answer, len(view.indices))
            if position is None:
                trace.faults.append("kfg:no_keyframe")
            else:
                trace.keyframe = trace.initial_keyframe = view.indices[position]

    def _refine(self, states: list[_State]) -> None:
        """Run agentic keyframe selection (eqs. 2 and 3) for all states, turn by turn."""
        active = [(state, self._selection(state)) for state in states]
        while active := [(state, s) for state, s in active if s.next_task is not None]:
            self._judge([pair for pair in active if pair[1].next_task == "aks"])
            self._reselect([pair for pair in active if pair[1].next_task == "kfg_again"])

    def _selection(self, state: _State) -> KeyframeSelection:
        clip = state.query.clip
        shown = self._shown(clip, self.section.reevaluate_frames)
        return KeyframeSelection(clip.n_frames, state.trace.keyframe, self.section.rounds, shown)

    def _judge(self, pairs: list[tuple[_State, KeyframeSelection]]) -> None:
        """Judge every candidate (eq. 2)."""
        states = [state for state, _ in pairs]
        texts = [self.prompts.aks(s.description, s.query.text) for s in states]
        responses = self._ask_image(texts, states, self.section.aks_tokens)
        for (state, selection), response in zip(pairs, responses, strict=True):
            self._advance(state, selection, TraceStep("aks", selection.candidate, response))

    def _reselect(self, pairs: list[tuple[_State, KeyframeSelection]]) -> None:
        """Generate z'_sel of eq. 3 for every refused candidate."""
        views = [self._view(s.query.clip, self.section.reevaluate_frames) for s, _ in pairs]
        texts = [
            self.prompts.kfg_again(
                state.query.text,
                len(selection.shown),
                selection.rejected_positions(),
                state.description,
            )
            for state, selection in pairs
        ]
        responses = self._ask_video(texts, views, self.section.kfg_tokens)
        for (state, selection), response in zip(pairs, responses, strict=True):
            self._advance(state, selection, TraceStep("kfg_again", None, response))

    @staticmethod
    def _advance(state: _State, selection: KeyframeSelection, step: TraceStep) -> None:
        known_faults = len(selection.faults)
        selection.advance(step.response)
        state.trace.steps.append(step)
        state.trace.faults += selection.faults[known_faults:]
        state.trace.keyframe, state.trace.rounds = selection.candidate, selection.rounds

    def _ground(self, states: list[_State]) -> None:
        """Generate the boxes and points of eq. 5 on the keyframe, and scale them to the source."""
        side = self.canvas.image
        texts = [
            self.prompts.ktg(s.description, s.query.text, self.section.zero_target, side)
            for s in states
        ]
        responses = self._ask_image(texts, states, self.section.ktg_tokens)
        for state, response in zip(states, responses, strict=True):
            trace = state.trace
            trace.steps.append(TraceStep("ktg", trace.keyframe, response))
            read_objects(trace, response, side)
            height, width = state.query.clip.read(trace.keyframe).shape[:2]
            to_source(trace, side, height, width)

    def _view(self, clip: VideoClip, sampled: int | None = None) -> _View:
        """Return the clip, or a uniform sample of it, on the video canvas; cached for the batch."""
        key = f"{sampled}:{clip.key}"
        if key not in self._views:
            indices = self._shown(clip, sampled)
            full = self._views.get(f"None:{clip.key}")
            if full is not None and set(indices) <= set(full.indices):
                frames = full.canvas_thwc[[full.indices.index(i) for i in indices]]
            else:
                frames = np.stack([to_canvas(clip.read(i), self.canvas.video) for i in indices])
            self._views[key] = _View(key, indices, frames)
        return self._views[key]

    def _shown(self, clip: VideoClip, sampled: int | None = None) -> tuple[int, ...]:
        """Return the frame indices of `_view`."""
        most = min(n for n in (sampled, self.section.max_frames, clip.n_frames) if n)
        return sample_uniform(clip.n_frames, most)

    def _ask_video(self, texts: list[str], views: list[_View], tokens: int) -> list[str]:
        requests = []
        for text, view in zip(texts, views, strict=True):
            seed = self._seed(view.key, text)
            requests.append(
                PolicyRequest(text, video=view.canvas_thwc, fps=self.section.fps, seed=seed)
            )
        return self._ask(requests, tokens)

    def _ask_image(self, texts: list[str], states: list[_State], tokens: int) -> list[str]:
        requests = []
        for text, state in zip(texts, states, strict=True):
            clip, frame = state.query.clip, state.trace.keyframe
            image = to_canvas(clip.read(frame), self.canvas.image)
            seed = self._seed(f"{clip.key}:{frame}", text)
            requests.append(PolicyRequest(text, image=image, seed=seed))
        return self._ask(requests, tokens)

    def _seed(self, media: str, text: str) -> int:
        """Return a request's seed, which depends on its content and not on the batch."""
        return zlib.crc32(f"{self.seed}\0{media}\0{text}".encode())

    def _ask(self, requests: list[PolicyRequest], tokens: int) -> list[str]:
        sampling = Sampling(tokens, temperature=self.section.temperature)
        return [choices[0] for choices in self.policy.generate(requests, sampling)]
