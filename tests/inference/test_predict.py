"""Predictions on disk: layout, resuming, and what is refused. Policy and masks are scripted."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.corpora.corpus import Corpus, CorpusFault, Expression, Video
from rcot_rl.errors import InputError
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.policy import PolicyResponse
from rcot_rl.inference.predict import (
    open_set,
    settings_of,
    trace_video,
    video_clip,
    video_frames,
    write_expression,
)
from rcot_rl.inference.query_trace import as_dict, from_dict
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.segmentation.segmenter import visiting_order

CANVAS = CanvasSection(image=112, video=56)
BOX = '<think>.</think><answer>[{"bbox_2d": [0, 0, 56, 28], "point_2d": [9, 9]}]</answer>'
NOTHING = "<think>.</think><answer>[]</answer>"


class Clips(Corpus):
    """Two videos of 3 and 2 frames, of 20 x 30 pixels; ids may hold slashes, as ReVOS' do."""

    dataset, splits = "clips", ("valid",)
    has_masks = False
    expressions_file = Path("clips.json")
    frames_root = Path("JPEGImages")
    broken = False

    def __init__(self):
        super().__init__(Path("."), "valid")
        self.ids = ["UVO/one", "two"]

    def _read_videos(self):
        first = tuple(Expression(str(i), f"thing {i}", ()) for i in range(3))
        return [
            Video(self.ids[0], ("00000", "00005", "00010"), first),
            Video(self.ids[1], ("a", "b"), (Expression("0", "nothing", ()),)),
        ]

    def object_mask(self, video_id, anno_id, frame_index):
        return None

    def frame(self, video_id, frame):
        if self.broken and frame == "00005":
            raise CorpusFault("missing_frame", f"{video_id}/{frame}.jpg")
        return np.full((20, 30, 3), 100, np.uint8)


class Scripted:
    """Answer A, frame 1 and one box; no box if the query is `nothing`."""

    async def generate(self, request, sampling, started=None):
        return [PolicyResponse(self._respond(request.text))]

    def count_tokens(self, text):
        return len(text.split())

    def most_frames(self, side, text_tokens):
        return 100

    def _respond(self, text):
        if "best frame" in text:
            return "<answer>1</answer>"
        if "A or B" in text:
            return "<think>.</think><answer>A</answer>"
        if "boxes" in text:
            return NOTHING if "nothing" in text else BOX
        return "grey"


class BoxMasks:
    """Segment each object as its box, in every frame."""

    name = "box"

    def __init__(self, die_after=None, keys=(1,)):
        self.left, self.keys = die_after, keys

    def segment(self, frames, key, boxes_source, points_source):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        assert key in self.keys
        assert boxes_source.shape == (len(boxes_source), 4)
        assert points_source.shape == (len(boxes_source), 2)
        for t in visiting_order(len(frames), key):
            masks = np.zeros((len(boxes_source), *frames[t].shape[:2]), bool)
            boxes = np.rint(boxes_source).astype(int)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
                mask[y1:y2, x1:x2] = True
            yield t, masks


@dataclass
class Counts:
    predicted: int = 0
    skipped: int = 0
    faults: dict = field(default_factory=dict)


def go(out, corpus=None, masker=None, model="m", section=None, seed=0, limit=None):
    """Predict what is missing, in this process, and return the counts."""
    corpus, masker, prompts = corpus or Clips(), masker or BoxMasks(), load_prompts("compact")
    reasoning = (section or PredictSection()).reasoning()
    settings = settings_of(
        model=model,
        others={},
        prompts=prompts,
        reasoning=reasoning,
        canvas=CANVAS,
        segmenter=masker.name,
        dtype="auto",
        seed=seed,
    )
    found = open_set(corpus, out, settings, limit=limit)
    counts = Counts(skipped=found.total - sum(map(len, found.missing.values())))
    for video in corpus.videos():
        targets = found.missing.get(video.id, [])
        reasoner = VideoReasoner(video_clip(corpus, video), Scripted(), prompts, CANVAS, seed)
        for one in asyncio.run(trace_video(corpus, video, targets, reasoner, {None: reasoning})):
            if one.trace is None:
                counts.faults[one.target.expression] = one.fault
                continue
            write_expression(one.target, video, one.trace, masker, video_frames(corpus, video))
            counts.predicted += 1
    return counts


def tree(folder):
    """Return the content of each file, without the seconds that the masks took."""
    return {
        str(p.relative_to(folder)): re.sub(rb'"segment_seconds": [^,]+', b"", p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_masks_are_written_in_the_prediction_layout(tmp_path):
    summary = go(tmp_path)
    assert (summary.predicted, summary.skipped, summary.faults) == (4, 0, {})
    files = set(tree(tmp_path))
    frames = {"UVO/one": ["00000", "00005", "00010"], "two": ["a", "b"]}
    expected = {"settings.json"}
    for video, expressions in (("UVO/one", "012"), ("two", "0")):
        for e in expressions:
            expected |= {f"{video}/{e}/{f}.png" for f in frames[video]} | {
                f"{video}/{e}/trace.json"
            }
    assert files == expected
    mask = cv2.imread(str(tmp_path / "UVO/one/0/00010.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (20, 30) and mask.dtype == np.uint8
    assert (mask[:5, :15] == 255).all() and mask.sum() == 255 * 75
    assert not cv2.imread(str(tmp_path / "two/0/a.png"), cv2.IMREAD_UNCHANGED).any()


def test_the_trace_records_the_responses_and_boxes(tmp_path):
    go(tmp_path)
    trace = json.loads((tmp_path / "UVO/one/2/trace.json").read_text())
    assert trace["query"] == "thing 2"
    assert trace["keyframe"] == trace["initial_keyframe"] == 1
    assert trace["keyframe_name"] == "00005"
    assert trace["rounds"] == 1
    assert trace["boxes_canvas"] == [[0, 0, 56, 28]]
    assert trace["boxes_source"] == [[0, 0, 15, 5]]
    assert trace["source_size"] == [20, 30]
    assert trace["segmenter"] == "box"
    assert trace["description"] == "grey"
    assert [s["task"] for s in trace["steps"]] == ["vdg", "kfg", "aks", "ktg"]
    assert json.loads((tmp_path / "two/0/trace.json").read_text())["boxes_source"] == []


def test_the_trace_has_the_seconds_of_the_masks_without_those_of_the_reasoning(tmp_path):
    class Slow(BoxMasks):
        def segment(self, *arguments):
            time.sleep(0.2)
            yield from super().segment(*arguments)

    started = time.perf_counter()
    go(tmp_path, masker=Slow(), limit=1)
    trace = json.loads((tmp_path / "UVO/one/0/trace.json").read_text())
    assert 0.2 <= trace["segment_seconds"] <= time.perf_counter() - started


def test_an_interrupted_run_resumes_and_ends_with_the_same_files(tmp_path):
    go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", masker=BoxMasks(die_after=2))
    assert len(list((tmp_path / "cut").rglob("trace.json"))) == 2
    partial = tmp_path / "cut/UVO/one/.partial-2"
    partial.mkdir()  # left by a kill -9
    (partial / "00000.png").write_bytes(b"half")
    summary = go(tmp_path / "cut")
    assert (summary.predicted, summary.skipped) == (2, 2)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    before = tree(tmp_path / "cut")
    assert go(tmp_path / "cut").predicted == 0
    assert tree(tmp_path / "cut") == before


def test_a_prediction_with_a_missing_mask_is_recomputed(tmp_path):
    """After an interrupted copy, the evaluation would count the frame as 0."""
    go(tmp_path)
    whole = tree(tmp_path)
    (tmp_path / "UVO/one/1/00005.png").unlink()
    summary = go(tmp_path)
    assert (summary.predicted, summary.skipped) == (1, 3)
    assert tree(tmp_path) == whole


class Repeated(Clips):
    """Two expressions with one id, and a video without frames."""

    def _read_videos(self):
        twice = (Expression("0", "nothing", ()), Expression("0", "thing", ()))
        return [Video("one", ("a", "b"), twice), Video("none", (), twice)]


def test_the_last_of_expressions_with_the_same_id_is_predicted(tmp_path):
    summary = go(tmp_path / "whole", corpus=Repeated())
    assert (summary.predicted, summary.skipped) == (1, 0)
    assert json.loads((tmp_path / "whole/one/0/trace.json").read_text())["query"] == "thing"
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", corpus=Repeated(), masker=BoxMasks(die_after=0))
    go(tmp_path / "cut", corpus=Repeated())
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_limit_takes_the_first_expressions_and_can_be_raised(tmp_path):
    assert go(tmp_path, limit=2).predicted == 2
    assert not (tmp_path / "UVO/one/2").exists()
    again = go(tmp_path)
    assert (again.predicted, again.skipped) == (2, 2)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": "other"}, "model"),
        ({"section": PredictSection(rounds=0)}, "predict"),
        ({"seed": 3}, "seed"),
    ],
)
def test_predictions_of_other_settings_are_not_mixed(tmp_path, change, key):
    go(tmp_path, limit=1)
    with pytest.raises(InputError, match="other settings") as caught:
        go(tmp_path, **change)
    assert caught.value.key == key
    assert caught.value.file.endswith("settings.json")


def test_the_number_of_frames_can_change_for_what_is_missing(tmp_path):
    """The traces list the frames, so that both kinds can stand in one folder."""
    go(tmp_path, limit=1)
    thinned = PredictSection(max_frames=2)
    assert go(tmp_path, section=thinned, masker=BoxMasks(keys=(1, 2))).predicted == 3
    shown = [
        json.loads((tmp_path / f"UVO/one/{i}/trace.json").read_text())["shown_frames"]
        for i in (0, 1)
    ]
    assert shown == [None, [0, 2]]


def test_an_unreadable_frame_costs_only_the_queries_that_need_it(tmp_path):
    corpus = Clips()
    corpus.broken = True
    counts = go(tmp_path, corpus=corpus)
    assert counts.predicted == 1
    assert set(counts.faults) == {"0", "1", "2"}
    assert all("UVO/one/00005.jpg" in fault for fault in counts.faults.values())
    assert not (tmp_path / "UVO").exists()
    assert (tmp_path / "two/0/trace.json").is_file()


def test_a_trace_survives_its_way_between_processes(tmp_path):
    go(tmp_path)
    values = json.loads((tmp_path / "UVO/one/2/trace.json").read_text())
    again = as_dict(from_dict(values))
    assert again == {key: values[key] for key in again}
