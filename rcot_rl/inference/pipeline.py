"""VDG → KFG → AKS → KTG: from a video and its queries to keyframes, boxes and points (eqs. 1 to 5).

Each query is a coroutine, so an engine batches the steps of many queries and no query waits for
another. All queries about a video share one `VideoReasoner`, which sends equal requests once: a
video is described once, and variants of the settings share what they have in common.

The video is encoded once: all prompts about it start with the same tokens, which the engine's
prefix cache keeps. The first request about a video goes alone until its prompt has been processed;
otherwise all of them would encode the video at the same time.

Where the paper is silent, or the response has no valid answer, one rule applies, and each use of a
rule is recorded as a fault in the trace:

- No keyframe in the answer to KFG: the first frame is used, as without KFG (Table 3).
- AKS: the rules of `rcot_rl.protocol.keyframe_selection`, which training shares.
- A video that does not fit into the engine's context is thinned uniformly; the prompt says so. This
  is not a fault; the trace lists the frames.
- An object without a box is dropped; one without a point gets the centre of its box. Objects beyond
  `predict.max_objects` are dropped, and near-identical boxes are merged.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.geometry import to_canvas
from rcot_rl.errors import InputError
from rcot_rl.inference.frame_budget import VideoTask, text_tokens, video_tasks
from rcot_rl.inference.oracle import Oracle
from rcot_rl.inference.policy import (
    Policy,
    PolicyRequest,
    PolicyResponse,
    PolicySet,
    Sampling,
)
from rcot_rl.inference.query_trace import (
    StepTask,
    Trace,
    TraceStep,
    VideoClip,
    merge_objects,
    read_objects,
    to_source,
)
from rcot_rl.inference.video import sample_uniform
from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.protocol.keyframe_selection import KeyframeSelection
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import PolicyTask, ReasoningSection
from rcot_rl.recipe.schema import CanvasSection

NO_DESCRIPTION = "none"
"""Placeholder in prompts for a missing description."""

OnStep = Callable[[TraceStep], None]
"""Called after each step of a query."""


@dataclass(frozen=True)
class _View:
    """The frames of a video that a prompt shows."""

    key: str
    """Digest of the frames."""
    indices: tuple[int, ...]
    """Position in the prompt -> frame index."""
    total: int
    """Number of frames of the whole video."""
    canvas_thwc: np.ndarray
    """uint8 [T, S, S, 3] RGB."""

    @property
    def listed(self) -> list[int] | None:
        """The shown frames; None: all of them."""
        return None if len(self.indices) == self.total else list(self.indices)

    def names(self, settings: ReasoningSection) -> FrameNames:
        """Return how prompts name the frames."""
        if settings.frame_names == "index":
            return FrameNames()
        return FrameNames(tuple(index / settings.fps for index in self.indices))

    def rate(self, fps: float) -> float:
        """Return the frame rate to report, so that a sample's frames keep their times."""
        return fps * len(self.indices) / self.total


class VideoReasoner:
    """Answers queries about one video with any policy. Its caches live as long as it does."""

    def __init__(
        self,
        clip: VideoClip,
        policies: PolicySet | Policy,
        prompts: Prompts,
        canvas: CanvasSection,
        seed: int = 0,
    ) -> None:
        """Set up a reasoner.

        Args:
            seed: Seed of the samples, if the settings' temperature is above 0.
        """
        self.clip = clip
        self.policies = policies if isinstance(policies, PolicySet) else PolicySet(policies)
        self.prompts = prompts
        self.canvas = canvas
        self.seed = seed
        self._views: dict[tuple[int, ...], asyncio.Task[_View]] = {}
        self._responses: dict[tuple[object, ...], asyncio.Task[PolicyResponse]] = {}
        self._encoded: dict[str, asyncio.Event] = {}
        """By engine and video: set when the first prompt about the video has been processed."""

    async def trace(
        self,
        query: str,
        settings: ReasoningSection,
        on_step: OnStep = lambda step: None,
        oracle: Oracle | None = None,
    ) -> Trace:
        """Return the trace of a query. Raises InputError.

        Args:
            oracle: Ground truth that takes the place of the keyframe, or of KTG's response.
        """
        return await _Query(self, query, settings, on_step, oracle).run()

    async def view(self, indices: tuple[int, ...]) -> _View:
        """Return frames of the clip on the video canvas; read once."""
        if indices not in self._views:
            self._views[indices] = asyncio.create_task(asyncio.to_thread(self._read, indices))
        return await self._views[indices]

    def _read(self, indices: tuple[int, ...]) -> _View:
        frames = np.stack([to_canvas(self.clip.read(i), self.canvas.video) for i in indices])
        digest = hashlib.blake2b(frames.data, digest_size=16).hexdigest()
        return _View(digest, indices, self.clip.n_frames, frames)

    async def ask_video(
        self, policy: Policy, text: str, view: _View, rate: float, sampling: Sampling
    ) -> PolicyResponse:
        """Return the response to a prompt about frames of the video."""
        # the rate is part of the key, because it changes the positions
        key = f"{view.key}-{rate:.6g}"
        request = PolicyRequest(
            text,
            video=view.canvas_thwc,
            fps=rate,
            media_key=key,
            seed=self._seed(view.key, text),
        )
        shared = f"{id(policy)} {key}"
        return await self._once(
            (shared, text, sampling), lambda: self._after_first(shared, policy, request, sampling)
        )

    async def ask_image(
        self, policy: Policy, text: str, frame: int, sampling: Sampling
    ) -> PolicyResponse:
        """Return the response to a prompt about one frame."""

        async def send() -> PolicyResponse:
            image = await asyncio.to_thread(
                lambda: to_canvas(self.clip.read(frame), self.canvas.image)
            )
            request = PolicyRequest(text, image=image, seed=self._seed(f"frame {frame}", text))
            return (await policy.generate(request, sampling))[0]

        return await self._once((id(policy), frame, text, sampling), send)

    async def _once(
        self, key: tuple[object, ...], send: Callable[[], Coroutine[Any, Any, PolicyResponse]]
    ) -> PolicyResponse:
        """Return the response to an equal request that was sent before, or send it."""
        if key not in self._responses:
            self._responses[key] = asyncio.create_task(send())
        return await asyncio.shield(self._responses[key])

    async def _after_first(
        self, shared: str, policy: Policy, request: PolicyRequest, sampling: Sampling
    ) -> PolicyResponse:
        """Send a request about a video, but not before the first one has been processed."""
        if shared in self._encoded:
            await self._encoded[shared].wait()
            return (await policy.generate(request, sampling))[0]
        encoded = self._encoded[shared] = asyncio.Event()
        try:
            return (await policy.generate(request, sampling, encoded))[0]
        finally:
            encoded.set()

    def _seed(self, media: str, text: str) -> int:
        """Return a request's seed, which depends on its content and not on the order."""
        content = f"{self.seed}\0{self.clip.key}\0{media}\0{text}"
        return zlib.crc32(content.encode("utf-8", "replace"))


class _Query:
    """One query in progress."""

    def __init__(
        self,
        video: VideoReasoner,
        query: str,
        settings: ReasoningSection,
        on_step: OnStep,
        oracle: Oracle | None,
    ) -> None:
        self.video, self.settings, self.on_step, self.oracle = video, settings, on_step, oracle
        self.trace = Trace(query)

    async def run(self) -> Trace:
        settings, first = self.settings, None
        if settings.vdg or settings.kfg or settings.rounds:
            first = await self.video.view(self._first_frames())
            self.trace.shown_frames = first.listed
        # both need only the video; in the trace, the description comes first
        description, selection = await asyncio.gather(self._describe(first), self._select(first))
        if description is not None:
            self._read_description(description)
        if selection is not None and first is not None:
            self._read_selection(selection, first)
        if settings.rounds and first is not None:
            await self._refine(first)
        if self.oracle is not None and self.oracle.gives_keyframe:
            keyframe = await asyncio.to_thread(self.oracle.keyframe)
            self.trace.keyframe = self.trace.initial_keyframe = keyframe
        if self.oracle is not None and self.oracle.gives_objects:
            await self._copy_objects(self.oracle)
        else:
            await self._ground()
        frame = await asyncio.to_thread(self.video.clip.read, self.trace.keyframe)
        to_source(self.trace, self.video.canvas.image, *frame.shape[:2])
        return self.trace

    def _policy(self, task: PolicyTask) -> Policy:
        return self.video.policies.of(task, self.settings)

    def _sampling(self, tokens: int, options: tuple[str, ...] = ()) -> Sampling:
        return Sampling(tokens, temperature=self.settings.temperature, options=options)

    def _first_frames(self) -> tuple[int, ...]:
        """Return the frames that VDG and KFG show: all, `max_frames`, or as many as fit."""
        settings, total = self.settings, self.video.clip.n_frames
        least = min(self._most_frames(task) for task in video_tasks(settings))
        return sample_uniform(total, min(n for n in (settings.max_frames, total, least) if n))

    def _most_frames(self, task: VideoTask) -> int:
        """Return the number of frames that fit into the context beside the longest text."""
        policy, side = self._policy(task), self.video.canvas.video
        tokens = text_tokens(
            task, self.video.prompts, self.settings, policy.count_tokens, self.trace.query
        )
        frames = policy.most_frames(side, tokens)
        if frames < 2:
            raise InputError(
                f"holds no frame of canvas.video={side} beside {tokens} tokens of text and "
                f"response ({task}); raise it, or lower predict.{task}_tokens",
                key="engine.max_model_len",
            )
        return frames

    def _add(
        self,
        task: StepTask,
        text: str,
        response: PolicyResponse,
        *,
        frame: int | None = None,
        view: _View | None = None,
    ) -> None:
        step = TraceStep(
            task=task,
            frame=frame,
            frames=None if view is None else view.listed,
            prompt=text,
            response=response.text,
            option_probabilities=response.option_probabilities,
            prompt_tokens=response.prompt_tokens,
            cached_tokens=response.cached_tokens,
            tokens=response.tokens,
            seconds=round(response.seconds, 4),
        )
        self.trace.steps.append(step)
        self.on_step(step)

    async def _ask_video(
        self, task: PolicyTask, text: str, view: _View, tokens: int
    ) -> PolicyResponse:
        rate = view.rate(self.settings.fps)
        return await self.video.ask_video(
            self._policy(task), text, view, rate, self._sampling(tokens)
        )

    async def _describe(self, view: _View | None) -> tuple[str, PolicyResponse, _View] | None:
        """Generate x_vid of eq. 1."""
        if not self.settings.vdg or view is None:
            return None
        text = self.video.prompts.vdg(len(view.indices), view.total)
        response = await self._ask_video("vdg", text, view, self.settings.vdg_tokens)
        return text, response, view

    def _read_description(self, answered: tuple[str, PolicyResponse, _View]) -> None:
        text, response, view = answered
        self._add("vdg", text, response, view=view)
        # a policy trained to think and answer may do so here too
        description = parse_response(response.text).answer or response.text
        self.trace.description = description.strip()
        if not self.trace.description:
            self.trace.faults.append("vdg:empty")

    async def _select(self, view: _View | None) -> tuple[str, PolicyResponse, _View] | None:
        """Generate z_sel of eq. 1."""
        if not self.settings.kfg or view is None:
            return None
        names = view.names(self.settings)
        text = self.video.prompts.kfg(self.trace.query, len(view.indices), view.total, names)
        response = await self._ask_video("kfg", text, view, self.settings.kfg_tokens)
        return text, response, view

    def _read_selection(self, answered: tuple[str, PolicyResponse, _View], first: _View) -> None:
        text, response, view = answered
        self._add("kfg", text, response, view=view)
        answer = parse_response(response.text).answer
        position = view.names(self.settings).parse(answer, len(view.indices))
        if position is None:
            self.trace.faults.append("kfg:no_keyframe")
        else:
            self.trace.keyframe = self.trace.initial_keyframe = view.indices[position]

    async def _refine(self, first: _View) -> None:
        """Run agentic keyframe selection (eqs. 2 and 3)."""
        again = first
        if self.settings.reevaluate_frames is not None:
            count = min(self.settings.reevaluate_frames, len(first.indices))
            again = await self.video.view(sample_uniform(first.total, count))
        selection = KeyframeSelection(
            first.total,
            self.trace.keyframe,
            self.settings.rounds,
            again.indices,
            again.names(self.settings),
            self.settings.on_exhausted,
        )
        while selection.next_task is not None:
            if selection.next_task == "aks":
                await self._judge(selection)
            else:
                await self._select_again(selection, again)
            self.trace.keyframe, self.trace.rounds = selection.candidate, selection.rounds
        self.trace.faults += selection.faults

    @property
    def _description(self) -> str:
        return self.trace.description or NO_DESCRIPTION

    async def _judge(self, selection: KeyframeSelection) -> None:
        """Judge the candidate (eq. 2)."""
        text = self.video.prompts.aks(self._description, self.trace.query)
        sampling = self._sampling(self.settings.aks_tokens, ("A", "B"))
        response = await self.video.ask_image(
            self._policy("aks"), text, selection.candidate, sampling
        )
        self._add("aks", text, response, frame=selection.candidate)
        chances = response.option_probabilities
        selection.advance(response.text, None if chances is None else chances["A"])

    async def _select_again(self, selection: KeyframeSelection, view: _View) -> None:
        """Generate z'_sel of eq. 3."""
        text = self.video.prompts.kfg_again(
            self.trace.query,
            len(view.indices),
            selection.refused_positions(),
            self._description,
            view.total,
            view.names(self.settings),
        )
        response = await self._ask_video("kfg", text, view, self.settings.kfg_tokens)
        self._add("kfg_again", text, response, view=view)
        selection.advance(response.text)

    async def _ground(self) -> None:
        """Generate the boxes and points of eq. 5 on the keyframe."""
        trace, settings, side = self.trace, self.settings, self.video.canvas.image
        text = self.video.prompts.ktg(self._description, trace.query, settings.zero_target, side)
        sampling = self._sampling(settings.ktg_tokens)
        response = await self.video.ask_image(self._policy("ktg"), text, trace.keyframe, sampling)
        self._add("ktg", text, response, frame=trace.keyframe)
        read_objects(trace, response.text, side)
        merge_objects(trace, settings.max_objects, settings.duplicate_iou)

    async def _copy_objects(self, oracle: Oracle) -> None:
        """Take boxes and points from the ground truth."""
        trace = self.trace
        frame, objects = await asyncio.to_thread(oracle.objects, trace.keyframe)
        if frame != trace.keyframe:
            trace.keyframe = frame
            trace.faults.append("oracle:other_frame")
        trace.boxes_canvas = [list(map(float, one.bbox_2d)) for one in objects]
        trace.points_canvas = [list(map(float, one.point_2d)) for one in objects]
