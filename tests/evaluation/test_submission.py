"""Archives hold every mask in the servers' layouts, and incomplete predictions are refused."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.toy.layouts import write_corpus
from rcot_rl.errors import InputError
from rcot_rl.evaluation import submission
from rcot_rl.evaluation.submission import write_submission

Case = SimpleNamespace


def predicted(root: Path, frames: dict[str, list[str]], corpus: Path, images: str) -> Path:
    """Write random masks for {video/expression: frames}."""
    rng = np.random.default_rng(0)
    for place, stems in frames.items():
        video = place.rpartition("/")[0]
        with Image.open(corpus / images / video / f"{stems[0]}.jpg") as image:
            size = (image.height, image.width)
        (root / place).mkdir(parents=True)
        for stem in stems:
            mask = (rng.uniform(size=size) < 0.3).astype(np.uint8) * 255
            Image.fromarray(mask).save(root / place / f"{stem}.png")
    return root


def listed(path: Path) -> dict[str, list[str]]:
    """Return {video/expression: frames} of a file of expressions."""
    videos = json.loads(path.read_text())["videos"]
    return {
        f"{v}/{e}": entry["frames"] for v, entry in videos.items() for e in entry["expressions"]
    }


@pytest.fixture(
    params=[("mevis", "valid"), ("ref-youtube-vos", "valid"), ("ref-youtube-vos", "test")]
)
def case(request, tmp_path: Path) -> Case:
    dataset, split = request.param
    corpus = tmp_path / "corpus"
    if dataset == "mevis":
        write_corpus(corpus, dataset, split, 3, 1, "lattice")
        frames = listed(corpus / "valid/meta_expressions.json")
        images, prefix = "valid/JPEGImages", ""
    else:
        write_corpus(corpus, dataset, "valid", 3, 1, "lattice")
        meta = corpus / "meta_expressions"
        test = listed(meta / "test/meta_expressions.json")
        every = listed(meta / "valid/meta_expressions.json")
        frames = test if split == "test" else {k: v for k, v in every.items() if k not in test}
        images, prefix = "valid/JPEGImages", "Annotations/"
    predictions = predicted(tmp_path / "predictions", frames, corpus, images)
    return Case(
        dataset=dataset,
        split=split,
        corpus=corpus,
        frames=frames,
        prefix=prefix,
        predictions=predictions,
        out=tmp_path / "out" / "submission.zip",
    )


def write(case: Case, **options) -> submission.Submission:
    return write_submission(
        case.dataset, case.corpus, case.split, case.predictions, case.out, **options
    )


def test_archive_holds_every_mask_where_the_server_looks(case: Case) -> None:
    first = next(iter(case.frames))
    path = case.predictions / first / f"{case.frames[first][0]}.png"
    mask = np.asarray(Image.open(path))
    Image.fromarray((mask > 0).astype(np.uint8)).save(path)  # 0 and 1: must become 0 and 255
    written = write(case, workers=2)
    with zipfile.ZipFile(case.out) as archive:
        names = archive.namelist()
        assert names == [
            f"{case.prefix}{place}/{stem}.png"
            for place, stems in case.frames.items()
            for stem in stems
        ]
        for name in names:
            source = case.predictions / name.removeprefix(case.prefix)
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert image.mode == "L"
                expected = (np.asarray(Image.open(source)) > 0) * 255
                np.testing.assert_array_equal(np.asarray(image), expected)
    assert (written.masks, written.expressions) == (len(names), len(case.frames))
    assert written.filled == [] and written.size_bytes == case.out.stat().st_size
    assert [p.name for p in case.out.parent.iterdir()] == ["submission.zip"]


def test_equal_predictions_give_equal_bytes_with_any_number_of_workers(case: Case) -> None:
    write(case, workers=1)
    alone = case.out.read_bytes()
    write(case, workers=3)
    assert case.out.read_bytes() == alone


def break_some(case: Case) -> list[str]:
    """Remove an expression and a frame, and spoil a frame; return what must be listed."""
    gone, holed, spoilt = list(case.frames)[:3]
    shutil.rmtree(case.predictions / gone)
    stem = case.frames[holed][1]
    (case.predictions / holed / f"{stem}.png").unlink()
    other = case.frames[spoilt][2]
    Image.new("L", (7, 5)).save(case.predictions / spoilt / f"{other}.png")
    return [f"{gone}: missing", f"{holed}/{stem}: missing", f"{spoilt}/{other}.png: is 5 x 7"]


def test_incomplete_predictions_are_refused_with_a_list(case: Case) -> None:
    expected = break_some(case)
    with pytest.raises(InputError, match="3 predictions are missing or unusable") as caught:
        write(case, workers=1)
    assert len(caught.value.faults) == 4
    for line, start in zip(caught.value.faults[1:], expected, strict=True):
        assert line.startswith(start)
    assert list(case.out.parent.iterdir()) == []


def test_missing_masks_can_be_submitted_as_empty_ones(case: Case) -> None:
    expected = break_some(case)
    written = write(case, workers=1, allow_missing=True)
    assert len(written.filled) == len(expected)
    gone = next(iter(case.frames))
    assert written.empty_masks == len(case.frames[gone]) + 2
    with zipfile.ZipFile(case.out) as archive:
        assert len(archive.namelist()) == sum(map(len, case.frames.values()))
        for stem in case.frames[gone]:
            data = archive.read(f"{case.prefix}{gone}/{stem}.png")
            assert not np.asarray(Image.open(io.BytesIO(data))).any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pngs: pngs[:-1], "shorter|unexpected or missing"),
        (lambda pngs: [b"x", *pngs[1:]], "cannot be read"),
        (lambda pngs: [image(np.full((128, 128), 7)), *pngs[1:]], "values"),
        (lambda pngs: [image(np.zeros((5, 7))), *pngs[1:]], "size"),
        (lambda pngs: [image(np.zeros((128, 128, 3))), *pngs[1:]], "mode RGB"),
    ],
)
def test_reading_back_finds_a_wrong_mask(
    spoil: Callable, message: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = submission._packed

    def spoilt(*arguments):
        one = pack(*arguments)
        return one._replace(pngs=spoil(one.pngs))

    monkeypatch.setattr(submission, "_packed", spoilt)
    with pytest.raises((RuntimeError, ValueError), match=message):
        write(case, workers=1)
    assert list(case.out.parent.iterdir()) == []


def image(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_bad_input_is_named(case: Case, tmp_path: Path) -> None:
    for change, message in (
        ({"out": tmp_path / "archive.tar"}, r"must end in \.zip"),
        ({"predictions": tmp_path / "nowhere"}, "nowhere"),
        ({"split": "train" if case.dataset == "ref-youtube-vos" else "valid_u"}, "valid_u|train"),
    ):
        with pytest.raises(InputError, match=message):
            write(Case(**{**vars(case), **change}))
    video = next(iter(case.frames)).rpartition("/")[0]
    (frame, *_) = sorted((case.corpus / "valid/JPEGImages" / video).iterdir())
    frame.unlink()
    with pytest.raises(InputError, match="missing_frame") as caught:
        write(case)
    assert caught.value.file == str(frame)


def test_splits_that_no_server_scores_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "davis", "davis17", "valid", 1, 1, "lattice")
    with pytest.raises(InputError, match="no evaluation server scores davis17 valid"):
        write_submission("davis17", tmp_path / "davis", "valid", tmp_path, tmp_path / "a.zip")


def test_the_command_writes_the_archive_and_a_summary(tmp_path: Path, run_rcot) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, "mevis", "valid", 2, 1, "lattice")
    frames = listed(corpus / "valid/meta_expressions.json")
    root = predicted(tmp_path / "predictions", frames, corpus, "valid/JPEGImages")
    out = tmp_path / "a.zip"
    words = ["submit", root, "--dataset", "mevis", "--corpus", corpus, "--out", out]
    done = run_rcot(*words)
    assert done.returncode == 0, done.stderr
    assert f"of {len(frames)} expressions" in done.stdout and "read back" in done.stdout
    shutil.rmtree(root / next(iter(frames)))
    done = run_rcot(*words)
    assert done.returncode == 2 and "--allow-missing" in done.stderr
    assert "Traceback" not in done.stderr and next(iter(frames)) in done.stderr
    done = run_rcot(*words, "--allow-missing")
    assert done.returncode == 0 and "1 predictions are missing or unusable" in done.stdout
