"""Pre-training questions match what the clips show, and none is an AKS or KTG prompt."""

import json
import re

import numpy as np
import pytest

from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.tiny.policy_data import (
    FRAMES,
    boxes_text,
    image_sample,
    keyframe,
    make_clips,
    scene_text,
    times_text,
    video_sample,
)
from rcot_rl.tiny.policy_model import IMAGE_CANVAS
from rcot_rl.tiny.tokenizer import build_tokenizer

PROMPTS = load_prompts("compact")


@pytest.fixture(scope="module")
def clips():
    return make_clips([99], 24)


def test_clips_depend_only_on_their_seed(clips):
    again, other = make_clips([99], 2), make_clips([98], 2)
    assert np.array_equal(again[1].frames, clips[1].frames)
    assert again[1].queries == clips[1].queries
    assert not np.array_equal(other[0].frames, clips[0].frames)


def test_frames_are_on_the_canvas(clips):
    for clip in clips:
        assert clip.frames.shape == (FRAMES, IMAGE_CANVAS, IMAGE_CANVAS, 3)
        assert clip.frames.dtype == np.uint8


def test_boxes_contain_their_points(clips):
    for clip in clips:
        for seen in clip.seen:
            for item in seen.values():
                x1, y1, x2, y2 = item.box
                assert 0 <= x1 < x2 <= IMAGE_CANVAS and 0 <= y1 < y2 <= IMAGE_CANVAS
                assert x1 <= item.point[0] <= x2 and y1 <= item.point[1] <= y2
                assert 0 < item.area <= 128 * 128


def test_scene_names_every_object_once_in_description_order(clips):
    for clip in clips:
        text = scene_text(clip, 3)
        places = [text.index(clip.names[i]) for i in clip.order]
        assert places == sorted(places)
        assert text.count("hidden") == len(clip.names) - len(clip.seen[3])
        described = [clip.description.index(clip.names[i]) for i in clip.order]
        assert described == sorted(described)


def test_a_restricted_list_names_what_its_words_say():
    """The names follow from the description and the question's words alone."""
    rng, kinds = np.random.default_rng(4), set()
    for clip in make_clips([97], 60, "fleeting"):
        for sample in (image_sample(rng, clip) for _ in range(12)):
            if sample.task != "select":
                continue
            context, question = sample.prompt.splitlines()
            names = re.findall(r"(?:first|then) (\w+ \w+)", context)
            wanted = question.removesuffix(" Think first.").removeprefix("List ").strip(".")
            words = wanted.removeprefix("the ").removeprefix("shapes that are not ").split()
            if words[-1] == "shape":
                kinds.add("place")
                places = ["first", "second", "third", "fourth", "fifth"]
                at = -1 if words[0] == "last" else places.index(words[0])
                expected = [names[at]]
            else:
                kinds.add("not" if "not" in wanted else "is")
                word = words[0].removesuffix("es" if words[0] == "crosses" else "s")
                expected = [n for n in names if (word in n.split()) == ("not" not in wanted)]
            answer = sample.response.partition("<answer>")[2] or sample.response
            assert re.findall(r"(\w+ \w+) (?:at|hidden)", answer) == expected, sample.prompt
    assert kinds == {"place", "not", "is"}


def test_boxes_are_json_of_the_visible_targets(clips):
    for clip in clips:
        rows = json.loads(boxes_text(clip, range(len(clip.names)), 2))
        assert [r["bbox_2d"] for r in rows] == [clip.seen[2][i].box for i in sorted(clip.seen[2])]


def test_keyframe_is_the_first_of_the_largest_that_are_not_refused(clips):
    for clip in clips:
        for query in clip.queries:
            areas = [clip.union(query, t) for t in range(FRAMES)]
            assert keyframe(clip, query) == areas.index(max(areas))
            best = keyframe(clip, query)
            rest = [a for t, a in enumerate(areas) if t != best]
            again = keyframe(clip, query, [best])
            assert again != best and areas[again] == max(rest)


def test_times_are_the_first_and_last_frame_of_a_shape(clips):
    for clip in clips:
        text = times_text(clip)
        for i in clip.order:
            frames = [t for t in range(FRAMES) if i in clip.seen[t]]
            expected = f"at [{frames[0]}, {frames[-1]}]" if frames else "hidden"
            assert f"{clip.names[i]} {expected}" in text
        assert text.count("at [") + text.count("hidden") == len(clip.names)


def test_no_question_is_an_aks_or_ktg_prompt(clips):
    rng = np.random.default_rng(0)
    endings = [PROMPTS.aks("D", "Q"), PROMPTS.ktg("D", "Q", canvas=IMAGE_CANVAS)]
    endings = [text.splitlines()[-1] for text in endings]
    for clip in clips:
        for _ in range(20):
            sample = image_sample(rng, clip)
            assert not any(e in sample.prompt for e in endings)
            assert sample.frames.shape[0] == 1


def test_samples_need_no_byte_tokens(clips):
    """The word list covers the preset: no word is split into bytes."""
    tokenizer, rng = build_tokenizer(), np.random.default_rng(1)
    for clip in clips:
        for sample in (image_sample(rng, clip), video_sample(rng, clip, PROMPTS)):
            for text in (sample.prompt, sample.response):
                pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
                broken = [p for p in pieces if len(p) == 1 and p.isalpha() and p not in "AB"]
                assert not broken, text
