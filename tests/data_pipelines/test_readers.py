"""Every layout gives the masks, frames and sentences that were written into it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hotcoco import mask as coco

from data_pipelines.corpora import READERS, CorpusFault, open_corpus, rle
from rcot_rl.errors import InputError

SPLITS = {
    "ref-youtube-vos": "train",
    "mevis": "train",
    "revos": "train",
    "reasonvos": "valid",
    "davis17": "valid",
}


@pytest.mark.parametrize("layout", list(READERS))
def test_reads_back_what_was_drawn(corpus_maker, layout):
    split = SPLITS[layout]
    drawn = corpus_maker(layout, split, n_videos=2)
    corpus = open_corpus(layout, drawn.root, split)
    assert corpus.has_masks
    assert [v.id for v in corpus.videos()] == list(drawn.masks)
    for video in corpus.videos():
        assert list(video.frames) == drawn.frames[video.id]
        assert {e.id: e.text for e in video.expressions} == {
            e: text for e, (text, _) in drawn.sentences[video.id].items()
        }
        for expression in video.expressions:
            objects = drawn.sentences[video.id][expression.id][1]
            assert list(expression.object_ids) == sorted(objects, key=int)
            for t in range(len(video.frames)):
                masks = corpus.masks(video, expression, t)
                assert list(masks) == sorted(objects, key=int)
                for o, mask in masks.items():
                    assert mask.dtype == bool
                    np.testing.assert_array_equal(mask, drawn.masks[video.id][o][t])
        frame = corpus.frame(video.id, video.frames[0])
        assert frame.dtype == np.uint8
        assert frame.shape[:2] == corpus.frame_size(video.id, video.frames[0])


def test_revos_without_target_has_its_type(corpus_maker):
    drawn = corpus_maker("revos")
    video = open_corpus("revos", drawn.root, "train").videos()[0]
    assert {e.id: e.type_id for e in video.expressions}["5"] == 2
    assert "/" in video.id


def test_youtube_valid_leaves_out_test_videos_and_has_no_masks(corpus_maker):
    drawn = corpus_maker("ref-youtube-vos", "valid", n_videos=3)
    meta = drawn.root / "meta_expressions" / "valid" / "meta_expressions.json"
    document = json.loads(meta.read_text())
    names = list(document["videos"])
    for video in document["videos"].values():
        for expression in video["expressions"].values():
            del expression["obj_id"]
    meta.write_text(json.dumps(document))
    test = drawn.root / "meta_expressions" / "test" / "meta_expressions.json"
    test.parent.mkdir()
    test.write_text(json.dumps({"videos": {names[1]: document["videos"][names[1]]}}))
    corpus = open_corpus("ref-youtube-vos", drawn.root, "valid")
    assert [v.id for v in corpus.videos()] == [names[0], names[2]]
    assert not corpus.has_masks
    assert corpus.videos()[0].expressions[0].object_ids == ()


def test_what_is_missing_is_named(corpus_maker, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        open_corpus("mevis", tmp_path / "nowhere", "train")
    drawn = corpus_maker("mevis")
    with pytest.raises(InputError, match="valid_u"):
        open_corpus("mevis", drawn.root, "training")
    with pytest.raises(InputError, match=r"valid_u.meta_expressions\.json"):
        open_corpus("mevis", drawn.root, "valid_u")
    path = drawn.root / "train" / "meta_expressions.json"
    document = json.loads(path.read_text())
    del document["videos"]["mevis-001"]["expressions"]["3"]["anno_id"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        open_corpus("mevis", drawn.root, "train").videos()
    assert caught.value.key == "videos.mevis-001.expressions.3.anno_id"
    assert caught.value.file == str(path)
    path.write_text('{"videos": {\n "a": }')
    with pytest.raises(InputError) as caught:
        open_corpus("mevis", drawn.root, "train").videos()
    assert caught.value.line == 2


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/../../b"])
def test_a_name_cannot_lead_out_of_the_corpus(corpus_maker, name):
    drawn = corpus_maker("mevis", n_videos=1)
    path = drawn.root / "train" / "meta_expressions.json"
    document = json.loads(path.read_text())
    document["videos"][name] = document["videos"].pop("mevis-000")
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="leads out"):
        open_corpus("mevis", drawn.root, "train").videos()


def test_faults_name_their_place(corpus_maker):
    drawn = corpus_maker("mevis", n_videos=1)
    path = drawn.root / "train" / "mask_dict.json"
    masks = json.loads(path.read_text())
    size = list(next(iter(drawn.masks["mevis-000"].values())).shape[1:])
    masks["100"][0] = {"size": size, "counts": "~~"}
    masks["99"][0] = {"size": [3, 5], "counts": [15]}
    del masks["98"]
    path.write_text(json.dumps(masks))
    corpus = open_corpus("mevis", drawn.root, "train")
    video = corpus.videos()[0]
    reasons = {}
    for e in video.expressions[:3]:
        with pytest.raises(CorpusFault) as caught:
            corpus.masks(video, e, 0)
        reasons[e.id] = caught.value.reason
    assert reasons == {"0": "bad_rle", "1": "mask_size", "2": "absent_object"}


def test_rle_equals_the_library_on_any_mask():
    rng = np.random.default_rng(3)
    for _ in range(300):
        h, w = rng.integers(1, 50, 2)
        mask = rng.random((h, w)) < rng.choice([0.0, 0.02, 0.3, 0.9, 1.0])
        if rng.random() < 0.3:
            mask = np.repeat(np.repeat(mask, 20, 0), 20, 1)
        done = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        np.testing.assert_array_equal(rle.decode({**done, "size": list(mask.shape)}), mask)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {"size": [2, 2]},
        {"size": [2, -2], "counts": [4]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [5]},
        {"size": [2, 2], "counts": [1, -1, 4]},
        {"size": [2, 2], "counts": "\x00"},
        {"size": [2, 2], "counts": "PPPPPPPPPPPPP1"},
        {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
        {"size": [2, 2], "counts": "P"},
        {"size": [2, 2], "counts": "é"},
    ],
)
def test_what_is_no_rle_is_refused(broken):
    with pytest.raises(ValueError):
        rle.decode(broken)
