"""Names and values that predictions should not have are reported with their cause."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcot_rl.evaluation.benchmarks import evaluate
from rcot_rl.evaluation.unexpected import name_cause, value_cause


def perfect(world, root: Path) -> Path:
    """Write predictions that score 100."""
    for video, expression in world.pairs():
        folder = root / video / expression
        folder.mkdir(parents=True)
        for stem, mask in zip(world.frames, world.truth(video, expression), strict=True):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{stem}.png")
    return root


def rename(root: Path, name: Callable[[str], str]) -> None:
    """Give every mask another stem, by way of a copy, since names may swap."""
    copy = root.parent / "copy"
    shutil.copytree(root, copy)
    shutil.rmtree(root)
    for path in copy.rglob("*.png"):
        target = (root / path.relative_to(copy)).with_name(name(path.stem))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.rmtree(copy)


@pytest.fixture
def scored(make_world, tmp_path: Path) -> Callable[..., dict]:
    """Score perfect predictions after `change` has altered them."""

    def score(change: Callable[[Path], object], dataset: str = "mevis", step: int = 5) -> dict:
        world = make_world(dataset)
        if step != 5:
            rename_corpus(world, step)
        root = perfect(world, tmp_path / "perfect")
        assert evaluate(dataset, world.root, world.split, root)["unexpected"] == []
        change(root)
        return evaluate(dataset, world.root, world.split, root)

    return score


def rename_corpus(world, step: int) -> None:
    old, world.frames = world.frames, [f"{step * t:05d}" for t in range(len(world.frames))]
    path = world.root / world.split / "meta_expressions.json"
    text = path.read_text()
    for before, after in zip(reversed(old), reversed(world.frames), strict=True):
        text = text.replace(f'"{before}"', f'"@{after}"')
    path.write_text(text.replace("@", ""))


def causes(result: dict) -> set[str]:
    return {entry["cause"] for entry in result["unexpected"]}


@pytest.mark.parametrize(
    ("step", "name", "cause"),
    [
        (1, lambda s: f"{int(s) + 1:05d}.png", "names are shifted by one: 00001… where 00000… is"),
        (5, lambda s: f"{int(s) + 1:05d}.png", "names are shifted by one: 00001… where 00000… is"),
        (1, lambda s: f"{int(s) + 7:05d}.png", "names are shifted by 7: 00007… where 00000…"),
        (5, lambda s: f"{int(s):04d}.png", "another zero padding: 5 digits expected, 4 found"),
        (5, lambda s: f"{int(s)}.png", "another zero padding: 5 digits expected, 1 or 2 found"),
        (
            1,
            lambda s: f"{int(s) + 1:04d}.png",
            "names are shifted by one: 0001… where 00000… is expected, and another zero padding",
        ),
        (5, lambda s: f"{int(s) // 5:05d}.png", "frames are counted (00000… where 00000… is"),
        (5, lambda s: f"{int(s) // 5 + 1:05d}.png", "frames are counted (00001… where 00000… is"),
        (5, lambda s: f"{s}.PNG", "masks must be .png files, not .PNG"),
        (5, lambda s: f"{s}.jpg", "masks must be .png files, not .jpg"),
        (5, lambda s: f"mask_{s}.png", "names have an addition: 00000 is expected, mask_00000"),
        (5, lambda s: f"{s}.jpg.png", "names have an addition: 00000 is expected, 00000.jpg found"),
    ],
)
def test_renamed_frames_are_reported_per_expression(
    step: int, name: Callable[[str], str], cause: str, scored
) -> None:
    result = scored(lambda root: rename(root, name), step=step)
    assert result["n_unexpected"] == result["n_expressions"] == len(result["unexpected"])
    assert all(c.startswith(cause) for c in causes(result)), causes(result)
    assert result["J"] < 100 and result["unexpected"][0]["place"] == "clip-0/0"


def blend(low: int, high: int) -> Callable[[Path], None]:
    """Set the background to `low` and objects to `high`."""

    def change(root: Path) -> None:
        for path in root.rglob("*.png"):
            mask = np.asarray(Image.open(path)) > 0
            Image.fromarray(np.where(mask, high, low).astype(np.uint8)).save(path)

    return change


def jpeg(root: Path) -> None:
    """Pass the masks through a lossy format."""
    for path in root.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=70)
        Image.open(path.with_suffix(".jpg")).convert("L").save(path)
        path.with_suffix(".jpg").unlink()


def grey(root: Path) -> None:
    """Replace the masks by probabilities times 255."""
    rng = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        mask = np.asarray(Image.open(path)) / 255
        soft = np.clip(0.8 * mask + rng.uniform(0, 0.2, mask.shape), 0, 1)
        Image.fromarray((255 * soft).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (blend(3, 255), "JPEG-compressed or soft mask"),
        (blend(3, 252), "JPEG-compressed or soft mask"),
        (blend(0, 128), "objects are 128 instead of 255"),
        (grey, "soft mask: grey values"),
        (jpeg, "soft mask"),
        (blend(255, 0), "inverted masks (objects 0, background 255)"),
    ],
)
def test_improper_values_are_reported_with_their_cause(
    change: Callable[[Path], object], cause: str, scored
) -> None:
    result = scored(change)
    assert any(cause in c for c in causes(result)), causes(result)
    assert 0 < result["n_unexpected"] <= result["n_expressions"]
    assert not result["faults"] and not result["missing"]


def test_every_nonzero_value_still_counts_as_object(scored) -> None:
    """As in the public scripts: the report changes no score."""
    assert scored(blend(0, 2))["J"] == 100


def test_proper_masks_of_any_kind_are_not_reported(scored) -> None:
    assert scored(blend(0, 1))["unexpected"] == []


def palette(colours: list[int]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in root.rglob("*.png"):
            image = Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8), mode="P")
            image.putpalette(colours)
            image.save(path)

    return change


def test_palette_images_are_read_by_colour(make_world, scored) -> None:
    proper = scored(palette([0, 0, 0, 255, 0, 0]))
    assert (proper["J"], proper["unexpected"]) == (100, [])


def test_palette_images_whose_colours_contradict_indices_are_reported(scored) -> None:
    result = scored(palette([0, 0, 0, 0, 0, 0]))
    assert result["J"] < 100, "OpenCV sees black"
    assert any("colours count, not indices" in c for c in causes(result))


def test_16_bit_masks_are_read_by_their_upper_byte(scored) -> None:
    def sixteen(root: Path, value: int) -> None:
        for path in root.rglob("*.png"):
            mask = np.asarray(Image.open(path)) > 0
            Image.fromarray((mask * value).astype(np.uint16)).save(path)

    result = scored(lambda root: sixteen(root, 65535))
    assert result["J"] == 100 and all("16-bit" in c for c in causes(result))


def test_fault_of_rgb_masks_says_what_to_do(scored) -> None:
    def colour(root: Path) -> None:
        for path in root.rglob("*.png"):
            Image.open(path).convert("RGB").save(path)

    result = scored(colour)
    assert result["J"] == 0 and len(result["faults"]) == 15 * 5
    assert "save 8-bit grey" in result["faults"][0]["reason"]


def test_unknown_folders_are_reported_once(scored) -> None:
    def add(root: Path) -> None:
        shutil.copytree(root / "clip-0", root / "clip-9")
        shutil.copytree(root / "clip-1" / "0", root / "clip-1" / "17")
        shutil.copy(root / "clip-0" / "0" / "00000.png", root / "clip-0")

    result = scored(add)
    assert result["J"] == 100 and result["n_unexpected"] == 0
    reasons = {entry["place"]: entry["reason"] for entry in result["unexpected"]}
    assert (
        "clip-9" in reasons["."] and "17" in reasons["clip-1"] and "00000.png" in reasons["clip-0"]
    )


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (lambda video: video.title(), "upper and lower case differ: clip-0 is expected, Clip-0"),
        (lambda video: f"{video}.mp4", "names have an addition: clip-0 is expected, clip-0.mp4"),
        (lambda video: f"Annotations/{video}", "one folder deeper, in Annotations"),
    ],
)
def test_misnamed_videos_are_reported(name: Callable[[str], str], cause: str, scored) -> None:
    def move(root: Path) -> None:
        for folder in sorted(root.iterdir()):
            target = root / name(folder.name)
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)

    result = scored(move)
    assert result["J"] == 0 and len(result["missing"]) == 15
    assert len(result["unexpected"]) == 1 and cause in result["unexpected"][0]["cause"]


def test_misnumbered_expressions_are_reported(scored) -> None:
    def move(root: Path) -> None:
        for video in root.iterdir():
            for folder in sorted(video.iterdir(), reverse=True):
                folder.rename(video / str(int(folder.name) + 1))

    assert {c.partition(":")[0] for c in causes(scored(move))} == {"names are shifted by one"}


def test_video_names_may_contain_slashes(scored) -> None:
    result = scored(lambda root: (root / "UVO" / "other").mkdir(), "revos")
    (entry,) = result["unexpected"]
    assert entry["place"] == "UVO" and "other" in entry["reason"]


def test_hidden_and_system_files_are_ignored(scored) -> None:
    def litter(root: Path) -> None:
        shutil.copytree(root / "clip-0", root / "__MACOSX" / "clip-0")
        for folder in (root, root / "clip-0", root / "clip-0" / "0"):
            (folder / ".DS_Store").write_bytes(b"x")
            (folder / "._00000.png").write_bytes(b"x")
            (folder / "Thumbs.db").write_bytes(b"x")
        (root / "settings.json").write_text("{}")

    result = scored(litter)
    assert (result["J"], result["unexpected"], result["faults"]) == (100, [], [])


def test_name_cause_is_empty_if_unknown() -> None:
    frames = ["00000", "00001"]
    assert name_cause(frames, frames) == ""
    assert name_cause(frames, ["x", "y"]) == ""
    assert name_cause(frames, [*frames, "thumbnail"]) == ""
    assert name_cause(["a"], ["1" * 40]) == ""
    assert name_cause([], ["0"]) == "" == name_cause(["0"], [])


def test_value_cause_tells_labels_from_grey_values() -> None:
    assert value_cause([]) is None and value_cause([0, 255]) is None and value_cause([255]) is None
    assert value_cause([0, 7], palette=True) is None
    assert value_cause([0, 1, 2], palette=True)[1] == "labels of several objects"
    assert value_cause([0, 1, 255], palette=True)[1] == "labels of several objects"
    assert value_cause([0, 7]) is not None
    assert "0..3" in value_cause([0, 1, 2, 3])[0]
