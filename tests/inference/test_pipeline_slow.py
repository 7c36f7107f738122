"""Pipeline, predictions and held-out rewards on the real engine, and `segment` as a command.

The checkpoints are random, so the texts mean nothing; the tests check that they come from the model
and are the same in every batch and after every weight swap.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest
from vision_counter import vision_passes

from rcot_rl.evaluation.jf import region_similarity
from rcot_rl.inference.demo_clip import DEMO_INDEX, truth, unseen_clip
from rcot_rl.inference.heldout import heldout_requests, score_heldout
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.policy import Sampling
from rcot_rl.inference.query_trace import VideoClip, as_dict
from rcot_rl.inference.video import read_clip, write_video
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection
from reward_fns.score import load_reward

pytestmark = pytest.mark.slow

SECTION = PredictSection(rounds=2, vdg_tokens=16, kfg_tokens=16, aks_tokens=16, ktg_tokens=16)
CANVAS = CanvasSection(image=112, video=84)


def clip(seed: int, n_frames: int = 5) -> VideoClip:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n_frames, 90, 120, 3), dtype=np.uint8)
    return VideoClip(str(seed), n_frames, images.__getitem__)


def content(trace):
    """Return what a trace says, without times and without what came from a cache."""
    values = as_dict(trace)
    for step in values["steps"]:
        step.update(seconds=None, cached_tokens=None)
    return values


def reason(engine, queries, settings, seed=0):
    """Return the traces of (clip, query) pairs that run together."""
    prompts = load_prompts("compact")

    async def together():
        videos = {
            clip.key: VideoReasoner(clip, engine.engine, prompts, CANVAS, seed)
            for clip, _ in queries
        }
        return await asyncio.gather(*(videos[c.key].trace(q, settings) for c, q in queries))

    return [content(trace) for trace in engine.run(together())]


def test_queries_in_progress_together_get_the_traces_that_they_get_alone(engine):
    clips = {seed: clip(seed) for seed in (1, 2)}
    queries = [(clips[seed], f"the {word} circle") for seed in (1, 2) for word in ("red", "big")]
    # greedy, a random model stutters
    settings = SECTION.reasoning().model_copy(update={"temperature": 1.0})
    together = reason(engine, queries, settings)
    assert together == [reason(engine, [query], settings)[0] for query in queries]
    responses = [step["response"] for trace in together for step in trace["steps"]]
    assert len(set(responses)) > 8
    for trace in together:
        assert [s["task"] for s in trace["steps"]][:3] == ["vdg", "kfg", "aks"]
        assert trace["steps"][-1]["task"] == "ktg"


def test_sampling_is_repeatable_and_follows_the_seed(engine):
    settings = SECTION.reasoning().model_copy(update={"temperature": 1.0})
    query = [(clip(1), "the red circle")]
    runs = [reason(engine, query, settings, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_video_is_encoded_once_whatever_is_asked_about_it(engine, monkeypatch):
    """All judgements refuse, so that every query selects again; the prompts share a long start."""
    compact = load_prompts("compact")
    start = {"video": " ".join(["first red circle, then blue square."] * 6)}
    prompts = Prompts("long-start", {**compact.templates, **start})
    section = PredictSection(
        rounds=3, vdg_tokens=8, kfg_tokens=8, aks_tokens=8, ktg_tokens=8, max_frames=5
    )
    inner = engine.engine
    generate = inner.generate

    async def refusing(request, sampling, started=None):
        responses = await generate(request, sampling, started)
        if not sampling.options:
            return responses
        text = "<think>no</think><answer>B</answer>"
        return [replace(response, text=text) for response in responses]

    monkeypatch.setattr(inner, "generate", refusing)
    passes = engine.run(vision_passes(inner))

    async def together():
        videos = [VideoReasoner(clip(seed), inner, prompts, CANVAS) for seed in range(20, 24)]
        queries = [(video, f"circle {k}") for video in videos for k in range(3)]
        return await asyncio.gather(*(v.trace(q, section.reasoning()) for v, q in queries))

    traces = engine.run(together())
    assert all(trace.rounds == 3 for trace in traces)
    assert sum(step.task == "kfg_again" for trace in traces for step in trace.steps) == 36
    assert engine.run(vision_passes(inner))["video"] - passes["video"] == 4


def rows(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    sampled_rows = []
    for index in range(count):
        image = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        content = f"<image>Query: thing {index}.\nIs this frame valid, A or B?"
        sampled_rows.append(
            {
                "data_source": "aks",
                "prompt": [{"role": "user", "content": content}],
                "images": [{"bytes": cv2.imencode(".png", image)[1].tobytes()}],
                "reward_model": {"ground_truth": '"A"'},
                "extra_info": {"index": index},
            }
        )
    return sampled_rows


def rewards(engine, reward_file):
    reward = load_reward(f"{reward_file}:length")
    requests = heldout_requests(rows(3), seed=4)
    sampled = engine.generate(requests, Sampling(16, n=3, temperature=1.0))
    greedy = engine.generate(requests, Sampling(16))
    return score_heldout(rows(3), sampled, greedy, reward).rewards


def test_held_out_rewards_depend_on_the_weights(engine, checkpoints, tmp_path):
    """A reward that tells responses apart: a checksum of the text."""
    file = tmp_path / "reward.py"
    file.write_text(
        "import zlib\n\n\ndef length(response, ground_truth, **kwargs):\n"
        "    return zlib.crc32(response.encode()) / 2**32\n"
    )
    first = rewards(engine, file)
    assert rewards(engine, file) == first
    engine.load_checkpoint(checkpoints[1])
    second = rewards(engine, file)
    for way in ("sampled", "greedy"):
        assert first[way]["per_prompt"] != second[way]["per_prompt"]
    engine.load_checkpoint(checkpoints[0])
    assert rewards(engine, file) == first


COMMAND = """
import sys
from pathlib import Path
from rcot_rl.inference.segment import SegmentModels, segment
from rcot_rl.recipe.inference_section import EngineSection, PredictSection
video, out, model = map(Path, sys.argv[1:])
section = PredictSection(rounds=1, vdg_tokens=8, kfg_tokens=8, aks_tokens=8, ktg_tokens=8)
models = SegmentModels(str(model), "flow", prompts="compact", image_canvas=112, video_canvas=84,
                       section=section)
segment(video, ["the red square"], out, models)
"""


def test_segment_writes_masks_for_a_video_file(checkpoints, tmp_path):
    images = np.full((6, 72, 96, 3), 60, np.uint8)
    for t in range(6):
        images[t, 20:40, 10 + 3 * t : 30 + 3 * t] = (200, 30, 30)
    write_video(tmp_path / "v.mp4", images, Fraction(6))
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "v.mp4"), str(out)]
    done = subprocess.run([*command, str(checkpoints[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    trace = json.loads((out / "trace.json").read_text())
    assert trace["query"] == "the red square"
    assert "flow" in trace["segmenter"]
    assert len(list((out / "masks").iterdir())) == 6
    assert read_clip(out / "overlay.mp4").images.shape == (6, 360, 480, 3)  # 5 times the size


def test_the_demo_finds_its_target_with_the_shipped_models(tmp_path):
    command = [sys.executable, "-m", "rcot_rl.cli", "segment", "--demo", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (outcome,) = json.loads(done.stdout)["queries"]
    assert outcome["nothing_found"] is None
    assert (tmp_path / "demo" / "segmented" / "strip.png").is_file()
    scene, query = unseen_clip(DEMO_INDEX)
    assert outcome["query"] == query.text
    targets = truth(scene, query)
    masks = np.stack(
        [
            cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) > 0
            for file in sorted((tmp_path / "demo" / "segmented" / "masks").iterdir())
        ]
    )
    assert region_similarity(targets, masks).mean() > 0.9
    assert not any(targets[t].any() for t in outcome["refused"])
