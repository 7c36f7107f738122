"""Every reader returns the masks, frames and expressions that were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hotcoco import mask as coco
from PIL import Image

from data_pipelines.corpora import READERS, CorpusFault, open_corpus, rle
from data_pipelines.corpora.corpus import Corpus, Video, id_order
from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.corpora.label_png import read_labels
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.errors import InputError

SPLITS = {
    "ref-youtube-vos": "train",
    "mevis": "train",
    "revos": "train",
    "reasonvos": "valid",
    "davis17": "valid",
}


@pytest.mark.parametrize("layout", list(READERS))
def test_readers_return_the_masks_frames_and_expressions_drawn(corpus_maker, layout):
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


def test_missing_paths_and_keys_are_named(corpus_maker, tmp_path):
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
    with pytest.raises(InputError, match="points outside"):
        open_corpus("mevis", drawn.root, "train").videos()


def test_corpus_faults_name_their_place(corpus_maker):
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


@pytest.mark.parametrize("layout", ["ref-youtube-vos", "mevis", "reasonvos"])
def test_hidden_files_beside_frames_and_masks_change_nothing(corpus_maker, layout):
    split = "valid" if layout == "reasonvos" else "train"
    corpus = open_corpus(layout, corpus_maker(layout, split).root, split)
    video = corpus.videos()[0]
    before = corpus.digest(video)
    for folder in {p.parent for p in corpus.root.rglob("*") if p.is_file()}:
        for name in [p.name for p in folder.iterdir()]:
            (folder / f"._{name}").write_bytes(b"\0\x05\x16\x07")
    again = open_corpus(layout, corpus.root, split)
    assert again.videos() == corpus.videos()
    assert again.digest(again.video(video.id)) == before


@pytest.mark.parametrize("suffix", [".webp", ".JPG", ".jpeg", ".png"])
def test_a_frame_in_another_format_is_named(corpus_maker, suffix):
    corpus = open_corpus("mevis", corpus_maker("mevis", "train").root, "train")
    video = corpus.videos()[0]
    path = corpus.frame_path(video.id, video.frames[1])
    path.rename(path.with_suffix(suffix))
    (path.parent / f"._{path.name}").write_bytes(b"x")
    for read in (corpus.frame, corpus.frame_size):
        with pytest.raises(CorpusFault) as caught:
            read(video.id, video.frames[1])
        fault = caught.value
        assert (fault.reason, fault.place) == ("missing_frame", str(path))
        assert fault.detail == f"there is {path.stem}{suffix}; frames must be .jpg"


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
def test_invalid_rles_are_refused(broken):
    with pytest.raises(ValueError):
        rle.decode(broken)


def _broken_entries(layout: str, document: dict) -> list[str]:
    """Break an expression and two videos; return the keys at fault."""
    first, second, third = list(document["videos"])[:3]
    expressions = document["videos"][first]["expressions"]
    one = expressions[1] if isinstance(expressions, list) else expressions["1"]
    at = f"videos.{first}.expressions" + ("[1]" if isinstance(expressions, list) else ".1")
    text = "exp_text" if layout == "reasonvos" else "exp"
    one[text] = 7
    document["videos"][second]["frames"] = {"0": "00000"}
    document["videos"][third] = "gone"
    return [f"{at}.{text}", f"videos.{second}.frames", f"videos.{third}"]


@pytest.mark.parametrize("layout", list(READERS))
def test_a_broken_entry_is_fatal_if_strict_and_listed_if_not(corpus_maker, layout):
    split = SPLITS[layout]
    drawn = corpus_maker(layout, split, n_videos=4)
    path = open_corpus(layout, drawn.root, split).expressions_file
    document = json.loads(path.read_text())
    keys = _broken_entries(layout, document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        open_corpus(layout, drawn.root, split).videos()
    assert (caught.value.file, caught.value.key) == (str(path), keys[0])
    corpus = open_corpus(layout, drawn.root, split, strict=False)
    names = list(drawn.masks)
    assert [v.id for v in corpus.videos()] == [names[0], names[3]]
    assert [b.fault.place for b in corpus.faults] == [f"{path}: {k}" for k in keys]
    assert {b.fault.reason for b in corpus.faults} == {"bad_metadata"}
    assert [(b.video, b.expression_id) for b in corpus.faults] == [
        (names[0], "1"),
        (names[1], ""),
        (names[2], ""),
    ]
    left = list(drawn.sentences[names[0]])
    left.remove("1")
    assert [e.id for e in corpus.video(names[0]).expressions] == left
    corpus.videos()
    assert len(corpus.faults) == 3


@pytest.mark.parametrize("text", ['{"videos": []}', "[]", "{}", "", "null", '{"videos": 3}'])
def test_a_broken_document_is_fatal_for_builders_too(corpus_maker, text):
    for layout in ("ref-youtube-vos", "mevis", "revos"):
        drawn = corpus_maker(layout)
        corpus = open_corpus(layout, drawn.root, "train", strict=False)
        corpus.expressions_file.write_text(text)
        with pytest.raises(InputError) as caught:
            corpus.videos()
        assert caught.value.file == str(corpus.expressions_file)


@pytest.mark.parametrize("raw", [b"\xff", b'{"a": "\xc3"}', b"[" * 200_000, b"9" * 5000, b"{,}"])
def test_documents_that_python_cannot_read_are_named(tmp_path, raw):
    path = tmp_path / "d.json"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("half", ["\ud800", "a\udfff", "\udc00b"])
def test_half_a_surrogate_pair_is_refused(tmp_path, half):
    node = Node({"a": half}, tmp_path / "d.json")
    for read in (lambda n: n.of(str), Node.identifier, Node.identifiers, Node.path_part):
        with pytest.raises(InputError) as caught:
            read(node["a"])
        assert caught.value.key == "a"
    assert Node("№ 😀", tmp_path).of(str) == "№ 😀"


def test_ids_ascend_by_value_however_long():
    ids = ["b", "10", "9", "a", "0" * 3 + "2", "9" * 5000, "8" * 5000, "²", "0", "-1"]
    ascending = ["0", "0002", "9", "10", "8" * 5000, "9" * 5000, "-1", "a", "b", "²"]
    assert sorted(ids, key=id_order) == ascending


@pytest.mark.parametrize("anno", ["0", "256", "²", "-1", "1.0", "", "9" * 5000, "4"])
def test_an_index_that_no_label_image_has_is_absent(corpus_maker, anno):
    drawn = corpus_maker("ref-youtube-vos", n_videos=1)
    corpus = open_corpus("ref-youtube-vos", drawn.root, "train")
    video = corpus.videos()[0]
    for t in range(len(video.frames)):
        for size in (None, corpus.frame_size(video.id, video.frames[t])):
            with pytest.raises(CorpusFault) as caught:
                corpus.object_area(video, anno, t, size)
            assert caught.value.reason == "absent_object"
            assert caught.value.place == f"{corpus.expressions_file} {video.id} {anno}"


@pytest.mark.parametrize("layout", ["ref-youtube-vos", "mevis", "revos", "davis17"])
def test_areas_and_boxes_equal_those_of_the_masks(corpus_maker, layout):
    split = SPLITS[layout]
    drawn = corpus_maker(layout, split, n_videos=3)
    corpus = open_corpus(layout, drawn.root, split)
    for video in corpus.videos():
        for object_id, masks in drawn.masks[video.id].items():
            if not masks.any():
                continue
            anno = corpus.anno_id(video, object_id)
            result = [
                corpus.object_area(video, anno, t, masks.shape[1:]) for t in range(len(masks))
            ]
            assert result == masks.sum((1, 2)).tolist()


def test_an_unreadable_label_image_hides_no_other_fault(corpus_maker):
    """Its objects may be elsewhere in it, so only the image is reported."""
    drawn = corpus_maker("ref-youtube-vos", n_videos=1)
    corpus = open_corpus("ref-youtube-vos", drawn.root, "train")
    video = corpus.videos()[0]
    folder = drawn.root / "train" / "Annotations" / video.id
    (folder / f"{video.frames[1]}.png").write_bytes(b"PNG")
    assert corpus.object_area(video, "77", 0, None) == 0
    with pytest.raises(CorpusFault) as caught:
        corpus.object_area(video, "77", 1, None)
    assert caught.value.reason == "unreadable_mask"


def test_invalid_label_images_are_faults(corpus_maker, tmp_path):
    drawn = corpus_maker("ref-youtube-vos", n_videos=1)
    whole = next((drawn.root / "train" / "Annotations").rglob("*.png")).read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for k in range(300):
        raw = bytearray(whole[: rng.integers(0, len(whole))] if k % 3 == 0 else whole)
        for at in rng.integers(0, max(len(raw), 1), k % 3 * 2):
            raw[at] = rng.integers(0, 256)
        path = tmp_path / f"{k}.png"
        path.write_bytes(raw)
        try:
            assert read_labels(str(path)).dtype == np.uint8
        except CorpusFault as fault:
            assert fault.place == str(path)
            reasons.add(fault.reason)
    assert reasons == {"unreadable_mask"}


def test_a_frame_that_declares_too_many_pixels_is_a_fault(corpus_maker):
    drawn = corpus_maker("mevis", n_videos=1)
    corpus = open_corpus("mevis", drawn.root, "train")
    video = corpus.videos()[0]
    path = corpus.frame_path(video.id, video.frames[0])
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = b"\xff\xdc" * 2
    path.write_bytes(raw)
    with pytest.raises(CorpusFault) as caught:
        corpus.frame(video.id, video.frames[0])
    assert (caught.value.reason, caught.value.place) == ("unreadable_frame", str(path))


def test_a_repeated_expression_id_is_a_fault_of_the_second(corpus_maker):
    drawn = corpus_maker("reasonvos", "valid", n_videos=1)
    path = drawn.root / "meta_expressions.json"
    document = json.loads(path.read_text())
    (video,) = document["videos"].values()
    for expression in video["expressions"]:
        expression["exp_id"] = 0
    path.write_text(json.dumps(document))
    corpus = open_corpus("reasonvos", drawn.root, "valid", strict=False)
    assert len(corpus.videos()[0].expressions) == 1
    assert len(corpus.faults) == len(video["expressions"]) - 1
    assert all("second expression with the id 0" in str(b.fault) for b in corpus.faults)


def test_borrowed_expressions_are_found_whatever_their_ids_hold(corpus_maker):
    drawn = corpus_maker("mevis", n_videos=2)
    path = drawn.root / "train" / "meta_expressions.json"
    document = json.loads(path.read_text())
    names = list(document["videos"])
    entry = document["videos"].pop(names[1])
    entry["expressions"] = {f"#{k}#": e for k, e in entry["expressions"].items()}
    document["videos"]["a#b"] = entry
    path.write_text(json.dumps(document))
    corpus = open_corpus("mevis", drawn.root, "train")
    here, donor = corpus.videos()
    for expression in donor.expressions:
        result = corpus.expression(here, f"a#b#{expression.id}")
        assert (result.text, result.object_ids) == (expression.text, ())
    with pytest.raises(KeyError):
        corpus.expression(here, "a#c#0")


@pytest.mark.parametrize("overridden", [True, False], ids=["files", "masks"])
@pytest.mark.parametrize("layout", list(READERS))
def test_digest_changes_with_expressions_masks_and_frames(
    corpus_maker, layout, overridden, monkeypatch
):
    """Each change alters the digest of its video only, computed from files or from masks."""
    split = SPLITS[layout]
    drawn = corpus_maker(layout, split, n_videos=2)
    if not overridden:
        monkeypatch.setattr(READERS[layout], "label_bytes", Corpus.label_bytes)

    def digests() -> list[str]:
        read_labels.cache_clear()
        corpus = open_corpus(layout, drawn.root, split)
        return [corpus.digest(video) for video in corpus.videos()]

    first = digests()
    assert digests() == first and len(set(first)) == 2
    corpus = open_corpus(layout, drawn.root, split)
    video = corpus.videos()[0]
    path = corpus.frame_path(video.id, video.frames[0])
    path.write_bytes(path.read_bytes() + b"more")
    second = digests()
    _empty_a_mask(corpus, video)
    third = digests()
    corpus.expressions_file.write_text(corpus.expressions_file.read_text().replace("red", "rad"))
    assert len({first[0], second[0], third[0], digests()[0]}) == 4
    assert first[1] == second[1] == third[1] != digests()[1]


def _empty_a_mask(corpus: Corpus, video: Video) -> None:
    """Return the first mask of the video that is not empty."""
    anno, index = next(
        (a, t)
        for e in video.expressions
        for a in e.anno_ids
        for t in range(len(video.frames))
        if (mask := corpus.object_mask(video.id, a, t)) is not None and mask.any()
    )
    if corpus.dataset in ("mevis", "revos"):
        masks = json.loads(corpus.masks_file.read_text())
        masks[anno][index] = None
        corpus.masks_file.write_text(json.dumps(masks))
        return
    name = f"{video.frames[index]}.png"
    folder = anno if corpus.dataset == "reasonvos" else video.id
    (path,) = (p for p in corpus.root.rglob(name) if f"Annotations/{folder}/" in str(p))
    with Image.open(path) as image:
        Image.fromarray(np.zeros((image.height, image.width), np.uint8), "L").save(path)


VALID_LABELS = ("meta", "obj_id", "folders")


def toy_valid(root: Path, valid_labels: str) -> Corpus:
    write_corpus(root, "ref-youtube-vos", "valid", 3, 1, "rich", valid_labels=valid_labels)
    return open_corpus("ref-youtube-vos", root, "valid")


def test_masks_of_youtube_valid_are_equal_in_every_layout(tmp_path):
    corpora = [toy_valid(tmp_path / name, name) for name in VALID_LABELS]
    for corpus in corpora:
        assert corpus.has_masks and not any(
            e.unlabelled for v in corpus.videos() for e in v.expressions
        )
    for videos in zip(*(c.videos() for c in corpora), strict=True):
        for expressions in zip(*(v.expressions for v in videos), strict=True):
            for t in range(len(videos[0].frames)):
                masks = [
                    list(c.masks(v, e, t).values())
                    for c, v, e in zip(corpora, videos, expressions, strict=True)
                ]
                assert [len(m) for m in masks] == [1, 1, 1]
                np.testing.assert_array_equal(masks[0][0], masks[1][0])
                np.testing.assert_array_equal(masks[0][0], masks[2][0])
                areas = {
                    c.object_area(v, e.anno_ids[0], t, masks[0][0].shape)
                    for c, v, e in zip(corpora, videos, expressions, strict=True)
                }
                assert areas == {int(masks[0][0].sum())}


def test_layouts_of_youtube_valid_may_differ_by_expression(tmp_path):
    """A folder of masks goes before a label image, and the others keep theirs."""
    mixed, folders = toy_valid(tmp_path / "mixed", "meta"), toy_valid(tmp_path / "f", "folders")
    video = mixed.videos()[0]
    name = video.expressions[1].id
    source = folders.root / "valid/Annotations" / video.id / name
    shutil.copytree(source, mixed.root / "valid/Annotations" / video.id / name)
    read = open_corpus("ref-youtube-vos", mixed.root, "valid").videos()[0]
    assert read.expressions[1].anno_ids == (f"{video.id}/{name}",)
    assert read.expressions[0].anno_ids == video.expressions[0].anno_ids
    shutil.rmtree(source)
    (bare,) = [
        e
        for e in open_corpus("ref-youtube-vos", folders.root, "valid").videos()[0].expressions
        if e.id == name
    ]
    assert bare.unlabelled and bare.object_ids == ()


def test_digest_of_youtube_valid_depends_on_masks_of_expressions(tmp_path):
    corpus = toy_valid(tmp_path, "folders")
    video = corpus.videos()[0]
    before = corpus.digest(video)
    mask = next((tmp_path / "valid/Annotations" / video.id).rglob("*.png"))
    mask.write_bytes(mask.read_bytes()[:-1])
    assert corpus.digest(video) != before


def test_toy_youtube_valid_of_another_layout_is_not_reused(tmp_path):
    toy_valid(tmp_path, "folders")
    toy_valid(tmp_path, "folders")
    with pytest.raises(InputError, match="valid_labels is folders, not meta"):
        toy_valid(tmp_path, "meta")
