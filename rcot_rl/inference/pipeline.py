"""VDG → KFG → AKS → KTG: from videos and queries to keyframes, boxes and points (eqs. 1 to 5).

Where the paper is silent, or the model does not answer, one rule each, and every use of one is a
fault in the trace:

- An AKS iteration is one judgement (eq. 2) and, after B, one re-selection (eq. 3). After λ
  iterations the last candidate stands, re-selected but not judged.
- No keyframe in the answer to KFG: the first frame, as without KFG (Table 3).
- No new keyframe in the answer to a re-selection: the frame farthest in time from all refused
  ones, the earliest of equals, so that each judgement sees another frame.
- Every frame refused: the last candidate stands.
- Neither A nor B: the candidate stands, since it was not refused.
- An object without a box is dropped; one without a point gets the centre of its box.

Pairs are worked on together, stage by stage; a video is described once. Left out: sharing one
encoding of a video between stages, which is vLLM's prefix and multimodal caches' work (media come
first in every prompt).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.geometry import to_canvas
from rcot_rl.inference.policy import Policy, Request, Sampling
from rcot_rl.inference.trace import Clip, Query, Step, Trace, read_objects, to_source
from rcot_rl.inference.video import sample_uniform
from rcot_rl.protocol.keyframes import farthest
from rcot_rl.protocol.parser import parse_keyframe, parse_option, parse_response
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference import PredictSection
from rcot_rl.recipe.schema import CanvasSection

NO_DESCRIPTION = "none"
"""What prompts say in the place of a description that there is not."""


@dataclass(frozen=True)
class _View:
    """The frames of a video that a prompt shows: position in the prompt -> frame index."""

    key: str
    indices: tuple[int, ...]
    canvas_thwc: np.ndarray

    def position(self, frame: int) -> int:
        """Of a frame, or of the nearest that is shown, the earlier of equals."""
        return min(range(len(self.indices)), key=lambda i: abs(self.indices[i] - frame))


@dataclass
class _State:
    query: Query
    trace: Trace
    refused: list[int] = field(default_factory=list)

    @property
    def description(self) -> str:
        return self.trace.description or NO_DESCRIPTION


class Pipeline:
    """The temporal reasoning and grounding of any policy."""

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        section: PredictSection,
        canvas: CanvasSection,
        seed: int = 0,
    ) -> None:
        """seed: of the samples, when the section's temperature is above 0."""
        self.policy = policy
        self.prompts = prompts
        self.section = section
        self.canvas = canvas
        self.seed = seed
        self._described: dict[str, tuple[str, Step]] = {}
        self._views: dict[str, _View] = {}

    def run(self, queries: Sequence[Query]) -> list[Trace]:
        """One trace per query, in order. Raises InputError for what the policy cannot take."""
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
        """x_vid of eq. 1, once per video."""
        clips = {s.query.clip.key: s.query.clip for s in states}
        clips = {key: clip for key, clip in clips.items() if key not in self._described}
        views = [self._view(clip) for clip in clips.values()]
        texts = [self.prompts.vdg(len(view.indices)) for view in views]
        responses = self._ask_video(texts, views, self.section.vdg_tokens)
        for key, response in zip(clips, responses, strict=True):
            # a policy trained to think and answer may do so here too: then the answer describes
            said = parse_response(response).answer or response
            self._described[key] = (said.strip(), Step("vdg", None, response))
        for state in states:
            state.trace.description, step = self._described[state.query.clip.key]
            state.trace.steps.append(step)
            if not state.trace.description:
                state.trace.faults.append("vdg:empty")

    def _select(self, states: list[_State]) -> None:
        """z_sel of eq. 1."""
        views = [self._view(s.query.clip) for s in states]
        texts = [
            self.prompts.kfg(s.query.text, len(v.indices))
            for s, v in zip(states, views, strict=True)
        ]
        responses = self._ask_video(texts, views, self.section.kfg_tokens)
        for state, view, response in zip(states, views, responses, strict=True):
            trace = state.trace
            trace.steps.append(Step("kfg", None, response))
            position = parse_keyframe(parse_response(response).answer, len(view.indices))
            if position is None:
                trace.faults.append("kfg:no_keyframe")
            else:
                trace.keyframe = trace.initial_keyframe = view.indices[position]

    def _refine(self, states: list[_State]) -> None:
        """Agentic keyframe selection: eqs. 2 and 3, λ times at most."""
        active = states
        for _ in range(self.section.rounds):
            active = self._judge(active)
            active = [s for s in active if self._has_unrefused(s)]
            if not active:
                return
            self._reselect(active)

    def _judge(self, states: list[_State]) -> list[_State]:
        """Eq. 2 on every candidate; returns those that were refused."""
        texts = [self.prompts.aks(s.description, s.query.text) for s in states]
        responses = self._ask_image(texts, states, self.section.aks_tokens)
        refused = []
        for state, response in zip(states, responses, strict=True):
            trace = state.trace
            trace.rounds += 1
            trace.steps.append(Step("aks", trace.keyframe, response))
            option = parse_option(parse_response(response).answer)
            if option is None:
                trace.faults.append("aks:no_option")
            elif option == "B":
                state.refused.append(trace.keyframe)
                refused.append(state)
        return refused

    def _has_unrefused(self, state: _State) -> bool:
        if len(set(state.refused)) < state.query.clip.n_frames:
            return True
        state.trace.faults.append("aks:all_frames_refused")
        return False

    def _reselect(self, states: list[_State]) -> None:
        """z'_sel of eq. 3 for every refused candidate."""
        views = [self._view(s.query.clip, self.section.reevaluate_frames) for s in states]
        texts = [
            self.prompts.kfg_again(
                s.query.text,
                len(v.indices),
                list(dict.fromkeys(v.position(frame) for frame in s.refused)),
                s.description,
            )
            for s, v in zip(states, views, strict=True)
        ]
        responses = self._ask_video(texts, views, self.section.kfg_tokens)
        for state, view, response in zip(states, views, responses, strict=True):
            trace = state.trace
            trace.steps.append(Step("kfg_again", None, response))
            position = parse_keyframe(parse_response(response).answer, len(view.indices))
            chosen = None if position is None else view.indices[position]
            if chosen is None or chosen in state.refused:
                trace.faults.append(
                    "kfg_again:no_keyframe" if chosen is None else "kfg_again:refused_frame"
                )
                chosen = farthest(state.query.clip.n_frames, state.refused)
            trace.keyframe = chosen

    def _ground(self, states: list[_State]) -> None:
        """Boxes and points of eq. 5 on the keyframe, then in source pixels."""
        side = self.canvas.image
        texts = [
            self.prompts.ktg(s.description, s.query.text, self.section.zero_target, side)
            for s in states
        ]
        responses = self._ask_image(texts, states, self.section.ktg_tokens)
        for state, response in zip(states, responses, strict=True):
            trace = state.trace
            trace.steps.append(Step("ktg", trace.keyframe, response))
            read_objects(trace, response, side)
            height, width = state.query.clip.read(trace.keyframe).shape[:2]
            to_source(trace, side, height, width)

    def _view(self, clip: Clip, sampled: int | None = None) -> _View:
        """The whole clip on the video canvas, or a uniform sample; kept for the batch."""
        key = f"{sampled}:{clip.key}"
        if key not in self._views:
            most = min(n for n in (sampled, self.section.max_frames, clip.n_frames) if n)
            indices = sample_uniform(clip.n_frames, most)
            whole = self._views.get(f"None:{clip.key}")
            if whole is not None and set(indices) <= set(whole.indices):
                frames = whole.canvas_thwc[[whole.indices.index(i) for i in indices]]
            else:
                frames = np.stack([to_canvas(clip.read(i), self.canvas.video) for i in indices])
            self._views[key] = _View(key, indices, frames)
        return self._views[key]

    def _ask_video(self, texts: list[str], views: list[_View], tokens: int) -> list[str]:
        fps = self.section.fps
        return self._ask(
            [
                Request(text, video=view.canvas_thwc, fps=fps, seed=self._seed(view.key, text))
                for text, view in zip(texts, views, strict=True)
            ],
            tokens,
        )

    def _ask_image(self, texts: list[str], states: list[_State], tokens: int) -> list[str]:
        requests = []
        for text, state in zip(texts, states, strict=True):
            clip, frame = state.query.clip, state.trace.keyframe
            image = to_canvas(clip.read(frame), self.canvas.image)
            seed = self._seed(f"{clip.key}:{frame}", text)
            requests.append(Request(text, image=image, seed=seed))
        return self._ask(requests, tokens)

    def _seed(self, media: str, text: str) -> int:
        """Of one request: a function of what is asked, so that batches do not matter."""
        return zlib.crc32(f"{self.seed}\0{media}\0{text}".encode())

    def _ask(self, requests: list[Request], tokens: int) -> list[str]:
        sampling = Sampling(tokens, temperature=self.section.temperature)
        return [choices[0] for choices in self.policy.generate(requests, sampling)]
