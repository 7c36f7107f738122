"""The clip of a shard's row: what is written is read, and what is broken is refused by its key."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.protocol.row_clips import clip_text, read_row_clip


def test_a_written_clip_is_read_with_areas_and_masks() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    text = clip_text(["a.png", "b.png"], 1, [mask, np.zeros((4, 6), bool)])
    for needs in ("areas", "masks"):
        clip = read_row_clip({"clip": text}, needs=needs, hint="")
        assert (clip.frames, clip.keyframe, clip.areas) == (["a.png", "b.png"], 1, [6, 0])
        assert clip.masks[0] is not None and clip.masks[0].size == (4, 6)
        assert clip.masks[1] is None


@pytest.mark.parametrize("needs", ["areas", "masks"])
@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("", "missing; build shards"),
        (None, "missing; build shards"),
        ("[]", "not a valid clip"),
        ({"frames": ["a"], "keyframe": 0}, "one entry per frame"),
        ({"frames": ["a"], "keyframe": 1, "areas": [1], "masks": [None]}, "keyframe: 1"),
        ({"frames": ["a"], "keyframe": 0, "areas": [1, 2], "masks": [None] * 2}, ": 2"),
        ({"frames": [], "keyframe": 0, "areas": [], "masks": []}, "at least one frame"),
    ],
)
def test_a_broken_clip_is_refused_by_its_key(needs, clip, message) -> None:
    text = json.dumps(clip) if isinstance(clip, dict) else clip
    with pytest.raises(InputError, match=message) as caught:
        read_row_clip({"clip": text}, needs=needs, hint="build shards")
    assert caught.value.key == "extra_info.clip"
