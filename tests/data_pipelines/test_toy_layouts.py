"""Toy corpora read back bit by bit as their scenes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hotcoco import mask as coco
from PIL import Image

from data_pipelines.build import build
from data_pipelines.corpora import Corpus, open_corpus
from data_pipelines.toy.clips import ClipSpec, ToyClip, draw_clip
from data_pipelines.toy.layouts import (
    LAYOUT_SPLITS,
    write_all,
    write_corpus,
    write_layout,
)
from data_pipelines.toy.presets import PRESETS
from data_pipelines.traces.toy_templates import Sidecar
from data_pipelines.verify.check_sets import check
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

PUBLISHED = [(layout, split) for layout, splits in LAYOUT_SPLITS.items() for split in splits]
N = 3


def clips_of(layout: str, split: str, preset: str, absent: float = 0.0) -> list[ToyClip]:
    spec = ClipSpec(layout, split, 5, preset, 4, absent)
    return [draw_clip(spec, i) for i in range(N)]


def digests(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def annotations(corpus: Corpus, clip: ToyClip) -> list[str]:
    """Return the annotation id of every object, also of those that no expression names."""
    annos = Sidecar.read(corpus.root / "toy.json").video(clip.name).annos
    ids = [str(i + 1) for i in range(len(clip.scene.objects))]
    if corpus.dataset == "reasonvos":
        return [f"{clip.source}_{clip.name}_{i}" for i in ids]
    return [annos.get(i, i) for i in ids]


@pytest.mark.parametrize(("layout", "split"), PUBLISHED)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_readers_return_the_drawn_scene(
    layout: str, split: str, preset: str, tmp_path: Path
) -> None:
    absent = 0.2 if layout == "revos" else 0.0
    write_corpus(tmp_path / "c", layout, split, N, 5, preset, absent_share=absent)
    corpus = open_corpus(layout, tmp_path / "c", split)
    assert corpus.has_masks
    clips = clips_of(layout, split, preset, absent)
    assert [v.id for v in corpus.videos()] == [c.name for c in clips]
    for clip in clips:
        video = corpus.video(clip.name)
        assert video.frames == clip.frames
        assert [(e.text, e.object_ids) for e in video.expressions] == [
            (q.text, tuple(str(i + 1) for i in q.targets)) for _, q in clip.expressions
        ]
        annos = annotations(corpus, clip)
        for t in range(clip.scene.n_frames):
            true = clip.scene.masks(t)
            for i, mask in enumerate(true):
                read = corpus.sized_mask(video, annos[i], t, clip.scene.size)
                assert np.array_equal(read, mask)
            for expression in video.expressions:
                for o, read in corpus.masks(video, expression, t).items():
                    assert np.array_equal(read, true[int(o) - 1])
        shown = corpus.frame(clip.name, clip.frames[1]).astype(int)
        assert np.abs(shown - clip.scene.render(1)).mean() < 2


def test_images_are_palette_pngs_and_named_every_fifth(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "ref-youtube-vos", "train", 1, 5, "lattice")
    labels = sorted((tmp_path / "c/train/Annotations").rglob("*.png"))
    assert [p.stem for p in labels] == [f"{5 * t:05d}" for t in range(8)]
    with Image.open(labels[0]) as image:
        assert image.mode == "P"
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # as DAVIS colours them
    meta = json.loads((tmp_path / "c/train/meta.json").read_text())["videos"]
    (entry,) = meta.values()
    for object_id, facts in entry["objects"].items():
        seen = [p.stem for p in labels if (np.asarray(Image.open(p)) == int(object_id)).any()]
        assert facts["frames"] == seen


def test_valid_of_ref_youtube_vos_names_no_object_and_lists_test_videos(tmp_path: Path) -> None:
    root = tmp_path / "c"
    summary = write_corpus(root, "ref-youtube-vos", "valid", 4, 5, "lattice")
    expressions = root / "meta_expressions"
    valid = json.loads((expressions / "valid/meta_expressions.json").read_text())["videos"]
    test = json.loads((expressions / "test/meta_expressions.json").read_text())["videos"]
    assert all("obj_id" not in e for v in valid.values() for e in v["expressions"].values())
    assert len(valid) == 6 and len(test) == 2 and test.keys() < valid.keys()
    assert summary["videos"] == 4 == len(open_corpus("ref-youtube-vos", root, "valid").videos())
    assert {p.name for p in (root / "valid/Annotations").iterdir()} == valid.keys() - test.keys()
    hidden = open_corpus("ref-youtube-vos", root, "test")
    assert not hidden.has_masks
    assert hidden.frame(hidden.videos()[0].id, "00005").shape == (128, 128, 3)
    Sidecar.read(root / "toy.json").description(hidden.videos()[0].id)


def test_ids_have_the_types_of_the_published_files(tmp_path: Path) -> None:
    expressions = {}
    for layout in LAYOUT_SPLITS:
        write_corpus(tmp_path / layout, layout, LAYOUT_SPLITS[layout][0], 1, 5, "lattice")
        corpus = open_corpus(layout, tmp_path / layout, LAYOUT_SPLITS[layout][0])
        (video,) = json.loads(corpus.expressions_file.read_text())["videos"].values()
        listed = video["expressions"]
        expressions[layout] = listed[0] if isinstance(listed, list) else listed["0"]
    assert isinstance(expressions["ref-youtube-vos"]["obj_id"], str)
    assert isinstance(expressions["davis17"]["obj_id"], str)
    assert isinstance(expressions["reasonvos"]["obj_id"], int)
    assert expressions["reasonvos"].keys() == {"obj_id", "exp_id", "exp_text", "is_sent"}
    for layout in ("mevis", "revos"):
        assert all(
            isinstance(i, int) for k in ("obj_id", "anno_id") for i in expressions[layout][k]
        )


def test_masks_of_mevis_are_coco_run_lengths_and_null_where_hidden(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "mevis", "train", N, 5, "lattice")
    masks = json.loads((tmp_path / "c/train/mask_dict.json").read_text())
    clips = clips_of("mevis", "train", "lattice")
    true = [
        [c.scene.masks(t)[i] for t in range(8)] for c in clips for i in range(len(c.scene.objects))
    ]
    assert list(masks) == [str(i) for i in range(len(true))]
    for anno, frames in enumerate(true):
        for stored, mask in zip(masks[str(anno)], frames, strict=True):
            assert (stored is None) == (not mask.any())
            if stored is not None:
                counts = {"size": stored["size"], "counts": stored["counts"].encode()}
                assert np.array_equal(coco.decode(counts).astype(bool), mask)


def test_valid_of_mevis_has_no_masks(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "mevis", "valid", 1, 5, "lattice")
    assert not open_corpus("mevis", tmp_path / "c", "valid").has_masks


def test_revos_has_sentence_types_and_nested_video_names(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "revos", "train", 8, 5, "rich", absent_share=0.25)
    sidecar = json.loads((tmp_path / "c/toy.json").read_text())["videos"]
    videos = json.loads((tmp_path / "c/meta_expressions_train_.json").read_text())["videos"]
    seen = set()
    for name, video in videos.items():
        assert name.count("/") >= 2 and (tmp_path / "c/JPEGImages" / name / "00000.jpg").is_file()
        for e, entry in video["expressions"].items():
            kind = sidecar[name]["expressions"][e]["kind"]
            expected = 2 if kind == "absent" else int(kind in ("time", "relation", "motion"))
            assert entry["type_id"] == expected
            assert (not entry["obj_id"]) == (not entry["anno_id"]) == (kind == "absent")
            seen.add(expected)
    assert seen == {0, 1, 2}


def test_revos_splits_share_one_mask_dictionary(tmp_path: Path) -> None:
    """Whichever split is written first; the annotation ids of the two do not overlap."""
    for name, order in (("a", ("train", "valid")), ("b", ("valid", "train"))):
        for split in order:
            write_corpus(tmp_path / name, "revos", split, N, 5, "lattice")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    sidecar = json.loads((tmp_path / "a/toy.json").read_text())
    annos = [o["anno_id"] for v in sidecar["videos"].values() for o in v["objects"].values()]
    assert len(annos) == len(set(annos))
    masks = json.loads((tmp_path / "a/mask_dict.json").read_text())
    assert set(masks) == {str(a) for a in annos}
    foreground = json.loads((tmp_path / "a/mask_dict_foreground.json").read_text())
    assert foreground.keys() == sidecar["videos"].keys()


def test_davis_has_four_sentences_an_object(tmp_path: Path) -> None:
    summary = write_corpus(tmp_path / "c", "davis17", "valid", 3, 5, "rich")
    assert summary["expressions"] == 4 * summary["objects"]
    for video in open_corpus("davis17", tmp_path / "c", "valid").videos():
        assert [e.object_ids for e in video.expressions] == [
            (str(int(e.id) // 4 + 1),) for e in video.expressions
        ]


@pytest.mark.parametrize("layout", ["ref-youtube-vos", "reasonvos", "davis17"])
def test_every_expression_has_one_object(layout: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", layout, LAYOUT_SPLITS[layout][0], 4, 5, "rich")
    corpus = open_corpus(layout, tmp_path / "c", LAYOUT_SPLITS[layout][0])
    assert all(len(e.object_ids) == 1 for v in corpus.videos() for e in v.expressions)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_expressions_of_several_targets_are_a_third_of_single_ones_or_more(preset: str) -> None:
    """Three training corpora, alike in size, can fill KTG rows at 3:1 without waste of singles.

    Several targets count where two of them are visible in the frame of the largest union.
    """
    single = several = 0
    for layout in ("ref-youtube-vos", "mevis", "revos"):
        for i in range(40):
            clip = draw_clip(ClipSpec(layout, "train", 1, preset, 4, 0.0), i)
            masks = np.array([clip.scene.masks(t) for t in range(clip.scene.n_frames)])
            area_tk = masks.sum((2, 3))
            for _, query in clip.expressions:
                area = area_tk[:, list(query.targets)]
                single += area.shape[1] == 1
                several += int((area[area.sum(1).argmax()] > 0).sum() > 1)
    assert 3 * several > single


def test_bytes_do_not_depend_on_workers_and_grow_by_clips(tmp_path: Path) -> None:
    for name, n, workers in (("one", 12, 1), ("two", 12, 2), ("more", 14, 1)):
        write_corpus(tmp_path / name, "mevis", "train", n, 5, "lattice", workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    few, many = digests(tmp_path / "one"), digests(tmp_path / "more")
    images = {p for p in few if p.endswith(".jpg")}
    assert all(many[p] == few[p] for p in images) and len(images) < sum(
        p.endswith(".jpg") for p in many
    )


def test_seed_and_split_change_the_clips(tmp_path: Path) -> None:
    def scenes(seed: int, split: str) -> list[str]:
        spec = ClipSpec("mevis", split, seed, "lattice", 4, 0.0)
        return [repr(draw_clip(spec, i).scene) for i in range(4)]

    every = scenes(1, "train") + scenes(2, "train") + scenes(1, "valid_u")
    assert len(set(every)) == len(every)


def test_the_same_split_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "c"
    first = write_corpus(root, "mevis", "train", 2, 5, "lattice")
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write_corpus(root, "mevis", "train", 2, 5, "lattice", workers=2) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    with pytest.raises(InputError, match="seed is 5, not 6") as error:
        write_corpus(root, "mevis", "train", 2, 6, "lattice")
    assert error.value.file == str(root)
    with pytest.raises(InputError, match="layout mevis, not revos"):
        write_corpus(root, "revos", "train", 2, 5, "lattice")
    assert list(tmp_path.iterdir()) == [root]


def test_unrelated_files_are_not_touched(tmp_path: Path) -> None:
    root = tmp_path / "c"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty") as error:
        write_corpus(root, "revos", "train", 1, 5, "lattice")
    assert str(root) in str(error.value)
    assert [p.name for p in root.iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as error:
            write_corpus(place, "revos", "train", 1, 5, "lattice")
        assert str(tmp_path / "file") in str(error.value)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/.gitkeep").touch()
    write_corpus(tmp_path / "d", "mevis", "train", 1, 5, "lattice")
    (tmp_path / "d/valid_u").mkdir()
    with pytest.raises(InputError, match="in the way"):
        write_corpus(tmp_path / "d", "mevis", "valid_u", 1, 5, "lattice")


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipelines.toy.layouts._publish", fail)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "c", "mevis", "train", 1, 5, "lattice")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "coco"}, "unknown layout"),
        ({"split": "valid_v"}, "no toy split"),
        ({"preset": "hard"}, "unknown preset"),
        ({"n_videos": 0}, "n_videos"),
        ({"queries_per_video": 0}, "queries_per_video"),
        ({"seed": -1}, "seed"),
        ({"absent_share": 1.5}, "absent_share"),
        ({"layout": "davis17", "absent_share": 0.1}, "without a target"),
        ({"multi_share": -0.1}, "multi_share"),
        ({"layout": "reasonvos", "split": "test", "multi_share": 0.1}, "with several targets"),
    ],
)
def test_invalid_arguments_are_refused(change: dict, says: str, tmp_path: Path) -> None:
    arguments = {"layout": "mevis", "split": "train", "n_videos": 1, "seed": 1, "preset": "lattice"}
    with pytest.raises(InputError, match=says):
        write_corpus(tmp_path / "c", **{**arguments, **change})
    assert list(tmp_path.iterdir()) == []


def test_the_share_of_several_targets_is_a_setting(tmp_path: Path) -> None:
    kinds = {}
    for share in (0.0, 0.25, 1.0):
        spec = ClipSpec("mevis", "train", 5, "rich", 2, 0.0, share)
        drawn = [q.kind for i in range(30) for _, q in draw_clip(spec, i).expressions]
        kinds[share] = drawn.count("several")
    assert kinds[0.0] == 0 < kinds[0.25] < 0.5 * kinds[1.0]
    write_corpus(tmp_path / "c", "mevis", "train", 1, 5, "lattice", multi_share=0.25)
    with pytest.raises(InputError, match=r"multi_share is 0\.25, not 0\.5"):
        write_corpus(tmp_path / "c", "mevis", "train", 1, 5, "lattice", multi_share=0.5)


def test_write_all_writes_every_layout(tmp_path: Path) -> None:
    summary = write_all(tmp_path / "toy", 1, "lattice", 5)
    assert {layout: tuple(splits) for layout, splits in summary.items()} == dict(LAYOUT_SPLITS)
    names = []
    for layout, splits in LAYOUT_SPLITS.items():
        for split in splits:
            videos = open_corpus(layout, tmp_path / "toy" / layout, split).videos()
            assert len(videos) == summary[layout][split]["videos"] == (5 if split == "train" else 1)
            names += [v.id.rsplit("/", 1)[-1] for v in videos]
    assert len(set(names)) == len(names)
    assert write_layout(tmp_path / "toy/mevis", "mevis", 1, "lattice", 5) == summary["mevis"]


def test_shards_can_be_built_and_pass_their_check(tmp_path: Path) -> None:
    layouts = ("ref-youtube-vos", "mevis", "revos")
    for layout in layouts:
        write_corpus(tmp_path / layout, layout, "train", 14, 1, "lattice", absent_share=0.0)
    data = DataSection(
        corpora=[CorpusRef(dataset=name, root=str(tmp_path / name)) for name in layouts],
        sets={
            "sft-toy": SetSize(ktg=24, aks=12, val=4),
            "grpo-aks-toy": SetSize(aks=8, val=4),
            "grpo-ktg-toy": SetSize(ktg=8, val=4),
        },
        val_fraction=0.25,
    )
    built = build(data, tmp_path / "shards", "compact", canvas=112)
    assert built["sets"]["sft-toy"]["rows"] == {"train": 36, "val": 8}
    assert built["sets"]["sft-toy"]["dropped"]["defects"] == []
    report = check(tmp_path / "shards")
    assert report.ok, report.faults
    assert report.ratios["sft-toy"]["train"] == {"ktg single:multi": 3.0, "aks A:B": 1.0}
