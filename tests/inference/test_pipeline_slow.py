"""Pipeline, predictions and held-out rewards on the real engine, and `segment` as a command.

The checkpoints are random, so the texts mean nothing; the tests check that they come from the model
and are the same in every batch and after every weight swap.
"""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import cv2
import numpy as np
import pytest

from rcot_rl.inference.heldout import heldout_rewards
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.query_trace import VideoClip, VideoQuery
from rcot_rl.inference.video import read_clip, write_video
from rcot_rl.protocol.prompts import load_prompts
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


def test_a_batch_gives_each_query_the_trace_that_it_gets_alone(engine):
    queries = [
        VideoQuery(clip(seed), f"the {word} circle") for seed in (1, 2) for word in ("red", "big")
    ]
    section = SECTION.model_copy(update={"temperature": 1.0})  # greedy, a random model stutters
    prompts = load_prompts("compact")
    together = Pipeline(engine, prompts, section, CANVAS).run(queries)
    alone = [Pipeline(engine, prompts, section, CANVAS).run([query])[0] for query in queries]
    assert together == alone
    responses = [step.response for trace in together for step in trace.steps]
    assert len(set(responses)) > 8
    for trace in together:
        assert [s.task for s in trace.steps][:3] == ["vdg", "kfg", "aks"]
        assert trace.steps[-1].task == "ktg"


def test_sampling_is_repeatable_and_follows_the_seed(engine):
    section = SECTION.model_copy(update={"temperature": 1.0})
    query = [VideoQuery(clip(1), "the red circle")]
    prompts = load_prompts("compact")
    runs = [Pipeline(engine, prompts, section, CANVAS, seed).run(query) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


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
    return heldout_rewards(engine, rows(3), reward, k=3, max_tokens=16, seed=4)


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
from rcot_rl.inference.segment import segment
from rcot_rl.recipe.inference_section import EngineSection, PredictSection
video, out, model = map(Path, sys.argv[1:])
section = PredictSection(rounds=1, vdg_tokens=8, kfg_tokens=8, aks_tokens=8, ktg_tokens=8)
segment(video, "the red square", out, model=str(model), sam2="flow", prompts="compact",
        image_canvas=112, video_canvas=84, section=section, device="cpu")
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
    assert read_clip(out / "overlay.mp4").images.shape == (6, 72, 96, 3)
