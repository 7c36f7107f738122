"""`rcot segment`: arguments, and what goes to standard output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcot_rl.inference.query_trace import Trace
from rcot_rl.inference.segment_outcome import SegmentOutcome


@pytest.fixture
def calls(monkeypatch):
    """Replace the work by a result in which the query `nothing` finds nothing; record the calls."""
    recorded = []

    def segment(video, queries, out, models, **settings):
        recorded.append((video, queries, out, models, settings))
        settings["say"]("judged frame 0: refused")
        settings["progress"]("masks", 1, 2)
        outcomes = []
        for query in queries:
            box = [] if query == "nothing" else [[0.0, 0.0, 8.0, 8.0]]
            trace = Trace(query, boxes_source=box, rounds=1)
            outcomes.append(SegmentOutcome(trace, out, ("0", "1"), (0.25 * len(box), 0.0)))
        return outcomes

    monkeypatch.setattr("rcot_rl.inference.segment.segment", segment)
    return recorded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a video and at least one query"),
        (["clip.mp4"], "at least one query"),
        (["--demo", "out", "the cat"], "--demo: takes an output folder only"),
        (["clip.mp4", "x", "--model", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_bad_arguments_are_one_line(run_rcot, tmp_path, arguments, words):
    done = run_rcot("segment", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_options_reach_the_pipeline(invoke, calls):
    invoke("segment", "v.mp4", "a", "b", "--rounds", 2, "--light", "--max-frames", 64, "--every", 3)
    video, queries, out, models, settings = calls[0]
    assert (video, queries, out) == (Path("v.mp4"), ["a", "b"], Path("segmented"))
    section = models.section
    assert (section.rounds, section.reevaluate_frames, section.max_frames) == (2, 16, 64)
    assert settings["every"] == 3
    invoke("segment", "v.mp4", "a")
    assert calls[1][3].section.reevaluate_frames is None
    assert calls[1][3].folder.name == "tiny-rcot-seg", "the default can do its job"


def test_nothing_found_is_a_sentence_and_no_error(invoke, calls):
    result = invoke("segment", "v.mp4", "nothing")
    assert result.exit_code == 0
    assert "nothing: nothing found: the model's answer lists no object" in result.stdout
    assert "judged frame 0: refused" in result.stderr and "masks 1/2" in result.stderr


def test_json_is_the_only_standard_output(invoke, calls):
    result = invoke("segment", "v.mp4", "the cat", "nothing", "--json", "--out", "o")
    found, missing = json.loads(result.stdout)["queries"]
    assert (found["objects"], found["frames_with_mask"], found["nothing_found"]) == (1, 1, None)
    assert (missing["query"], missing["nothing_found"]) == ("nothing", "no_object")
    assert found["summary"].startswith("the cat: 1 object")


def test_the_demo_writes_its_clip_and_repeats_as_a_command(invoke, calls, tmp_path):
    result = invoke("segment", "--demo", tmp_path / "demo")
    video, queries, out, _, _ = calls[0]
    assert video == tmp_path / "demo" / "clip.mp4" and video.stat().st_size > 1000
    assert out == tmp_path / "demo" / "segmented"
    assert f'rcot segment {video} "{queries[0]}" --out {out}' in result.stderr.replace("\n", "")
    assert str(out / "overlay.mp4") in result.stdout.replace("\n", "")
    again = invoke("segment", "--demo", tmp_path / "demo")
    assert again.exit_code != 0 and "not empty" in str(again.exception)
