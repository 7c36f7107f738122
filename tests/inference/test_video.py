"""Reading and writing clips."""

from __future__ import annotations

import os
import zlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from rcot_rl.inference.video import natural_order, read_clip, sample_uniform, write_video


def moving_square(count: int, height: int = 49, width: int = 65) -> np.ndarray:
    images = np.full((count, height, width, 3), 40, np.uint8)
    for t in range(count):
        images[t, 10:30, 2 * t : 2 * t + 20] = (220, 60, 30)
    return images


def write_folder(folder, images, names):
    folder.mkdir()
    for image, name in zip(images, names, strict=True):
        assert cv2.imwrite(str(folder / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def test_a_folder_is_read_in_natural_order_and_other_files_are_left(tmp_path):
    images = moving_square(4)
    write_folder(tmp_path / "v", images[[0, 2, 1, 3]], ["f1.png", "f10.png", "f9.png", "f11.png"])
    (tmp_path / "v" / "notes.txt").write_text("x")
    clip = read_clip(tmp_path / "v")
    assert clip.names == ("f1", "f9", "f10", "f11")
    assert np.array_equal(clip.images, images)


def test_a_video_keeps_frames_colours_and_rate(tmp_path):
    images = moving_square(12)
    write_video(tmp_path / "v.mp4", images, Fraction(5))
    clip = read_clip(tmp_path / "v.mp4")
    assert clip.rate == 5
    assert clip.names == tuple(f"{i:05d}" for i in range(12))
    assert clip.images.shape == (12, 50, 66, 3)  # H.264 needs even sides
    difference = clip.images[:, :49, :65].astype(int) - images
    assert np.abs(difference).mean() < 4


def test_a_rotated_video_is_turned_upright(tmp_path):
    """What a phone writes: stored lying, with a rotation to be applied on display."""
    write_video(tmp_path / "v.mp4", moving_square(3, 48, 64), Fraction(5))
    plain = read_clip(tmp_path / "v.mp4").images
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    header = data.find(b"tkhd")
    matrix = header + 4 + 4 + 4 * 5 + 4 * 2 + 4 * 2  # version 0: times, id, reserved, layer, volume
    unit, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    minus = (-(1 << 16) & 0xFFFFFFFF).to_bytes(4, "big")
    assert data[matrix : matrix + 4] == unit
    quarter = none + unit + none + minus + none + none + none + none + (1 << 30).to_bytes(4, "big")
    data[matrix : matrix + 36] = quarter  # (x, y) -> (-y, x): a quarter clockwise on screen
    (tmp_path / "r.mp4").write_bytes(data)
    turned = read_clip(tmp_path / "r.mp4").images
    assert np.array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))


@pytest.mark.parametrize("kind", ["missing", "empty_folder", "not_a_video", "cut", "no_stream"])
def test_bad_videos_are_named(tmp_path, kind):
    path = tmp_path / "v.mp4"
    if kind == "empty_folder":
        path.mkdir()
    elif kind == "not_a_video":
        path.write_bytes(b"this is text, not a video" * 40)
    elif kind == "cut":
        write_video(tmp_path / "whole.mp4", moving_square(30), Fraction(5))
        path.write_bytes((tmp_path / "whole.mp4").read_bytes()[:1500])
    elif kind == "no_stream":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with pytest.raises(InputError) as caught:
        read_clip(path)
    assert caught.value.file == str(path)


def test_bad_frames_are_named(tmp_path):
    write_folder(tmp_path / "v", moving_square(2), ["0.png", "1.png"])
    (tmp_path / "v" / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"not a readable image.*--skip-corrupt") as caught:
        read_clip(tmp_path / "v")
    assert caught.value.file.endswith("2.png")
    cv2.imwrite(str(tmp_path / "v" / "2.png"), np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(InputError, match="5 x 5 pixels, and the first frame 49 x 65"):
        read_clip(tmp_path / "v")


@pytest.mark.parametrize(
    "name",
    [
        "a:b.mp4",
        "http:x.mp4",
        "file:x.mp4",
        "concat:x.mp4",
        "data:,x.mp4",
        "pipe:0.mp4",
        "s3:x.mp4",
        "x::y.mp4",
        "-x.mp4",
        "a%03d.mp4",
        "a?b#c.mp4",
        "a[1]*.mp4",
        "a|b.mp4",
        " .mp4",
        "a\nb.mp4",
        "~x.mp4",
    ],
)
def test_a_video_of_any_name_is_read_from_the_working_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(Path(name), moving_square(4), Fraction(5))
    assert len(read_clip(Path(name)).names) == 4
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["f%03d.png", "f[0-9]*.png", "f?00.png", "%s.png", "a:b.png"])
def test_an_image_name_is_not_a_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    other, shown = moving_square(2, 48, 64)
    for number in range(3):
        cv2.imwrite(f"f{number:03d}.png", other)
    cv2.imwrite("shown.png", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
    Path("shown.png").rename(name)
    clip = read_clip(Path(name))
    assert np.array_equal(clip.images, shown[None])
    Path("folder").mkdir()
    Path(name).rename(Path("folder", name))
    clip = read_clip(Path("folder"))
    assert clip.names == (Path(name).stem,) and np.array_equal(clip.images, shown[None])


def test_hidden_files_of_a_folder_are_ignored(tmp_path):
    images = moving_square(3)
    write_folder(tmp_path / "v", images, ["0.png", "1.png", "2.png"])
    for name in ("._0.png", "._1.jpg", ".DS_Store", ".2.png"):
        (tmp_path / "v" / name).write_bytes(b"\0\x05\x16\x07")
    (tmp_path / "v" / ".thumbnails").mkdir()
    clip = read_clip(tmp_path / "v")
    assert clip.names == ("0", "1", "2") and np.array_equal(clip.images, images)


@pytest.mark.parametrize("stray", ["1.webp", "1.png", "1.bmp", "1.TIFF", "1.gif", "1.heic"])
def test_images_of_several_types_are_listed_and_none_is_dropped(tmp_path, stray):
    write_folder(tmp_path / "v", moving_square(3), ["0.jpg", "2.JPG", "3.jpeg"])
    assert read_clip(tmp_path / "v").names == ("0", "2", "3")
    (tmp_path / "v" / stray).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        read_clip(tmp_path / "v")
    for part in ("2 .jpg (0.jpg)", "1 .jpeg (3.jpeg)", f"1 {Path(stray).suffix.lower()} ({stray})"):
        assert part in caught.value.message


def test_a_folder_of_one_unread_type_and_a_frame_twice_are_named(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "0.webp").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has 1 \.webp \(0\.webp\), and frames must be"):
        read_clip(tmp_path / "w")
    write_folder(tmp_path / "v", moving_square(2), ["0.jpg", "0.jpeg"])
    with pytest.raises(InputError, match="the same stem as"):
        read_clip(tmp_path / "v")


def damaged_video(folder: Path, codec: str, name: str, packets: list[int]) -> tuple[Path, Path]:
    """Return a video of 30 frames, and a copy in which some packets are zeros."""
    import av

    whole, broken = folder / f"whole-{name}", folder / name
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for t in range(30):
            image = np.roll(noise, 2 * t, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(whole.read_bytes())
    for number in packets:
        start, size = spans[number]
        data[start : start + size] = bytes(size)
    broken.write_bytes(data)
    return whole, broken


@pytest.mark.parametrize(
    ("codec", "name"), [("libx264", "v.mp4"), ("mpeg4", "v.mp4"), ("mpeg4", "v.avi")]
)
@pytest.mark.parametrize("packets", [[12], [10], [4, 17, 18]])
def test_a_corrupt_packet_is_an_error_that_names_skip_corrupt(tmp_path, codec, name, packets):
    whole, broken = damaged_video(tmp_path, codec, name, packets)
    with pytest.raises(InputError, match=r"cannot be decoded.*--skip-corrupt") as caught:
        read_clip(broken)
    assert caught.value.file == str(broken) and "\n" not in str(caught.value)
    rest, complete = read_clip(broken, skip_corrupt=True), read_clip(whole, skip_corrupt=True)
    assert (complete.missing, len(complete.names)) == (0, 30)
    assert complete.names == read_clip(whole).names
    assert rest.missing >= len(packets)
    assert len(rest.names) + rest.missing == 30
    assert list(rest.names) == sorted(set(rest.names))
    # frames before the damage are those of the whole video, under their own names
    before = [int(n) for n in rest.names if int(n) < packets[0] - 3]
    assert before == list(range(len(before))) and before
    assert np.array_equal(rest.images[before], complete.images[before])
    # and so are those from the keyframe after it
    shared = [int(n) for n in rest.names if int(n) >= 20]
    places = [rest.names.index(f"{n:05d}") for n in shared]
    assert np.array_equal(rest.images[places], complete.images[shared])


def test_a_video_of_which_nothing_decodes_is_an_error(tmp_path):
    _, broken = damaged_video(tmp_path, "libx264", "v.mp4", list(range(30)))
    with pytest.raises(InputError, match="none of its frames can be decoded"):
        read_clip(broken, skip_corrupt=True)


def test_a_corrupt_frame_of_a_folder_is_skipped_with_skip_corrupt(tmp_path):
    images = moving_square(4)
    write_folder(tmp_path / "v", images, ["0.png", "1.png", "2.png", "3.png"])
    (tmp_path / "v" / "1.png").write_bytes(b"no image")
    clip = read_clip(tmp_path / "v", skip_corrupt=True)
    assert (clip.names, clip.missing) == (("0", "2", "3"), 1)
    assert np.array_equal(clip.images, images[[0, 2, 3]])
    for name in ("0.png", "2.png", "3.png"):
        (tmp_path / "v" / name).write_bytes(b"")
    with pytest.raises(InputError, match="none of the 4 frames"):
        read_clip(tmp_path / "v", skip_corrupt=True)


@given(st.integers(1, 500), st.integers(1, 64))
def test_uniform_samples_are_distinct_ordered_and_even(count, n):
    chosen = sample_uniform(count, n)
    assert len(chosen) == min(count, n)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(range(count))
    gaps = np.diff(chosen)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


@given(st.lists(st.integers(0, 10**9), unique=True, min_size=2, max_size=6))
def test_natural_order_is_by_number(numbers):
    names = [f"frame_{n}.jpg" for n in numbers]
    wanted = [f"frame_{n}.jpg" for n in sorted(numbers)]
    assert sorted(names, key=natural_order) == wanted


def test_clips_larger_than_memory_should_be_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path / "clip", moving_square(6), [f"{k}.png" for k in range(6)])
    monkeypatch.setattr("rcot_rl.inference.video.MOST_BYTES", 5 * 49 * 65 * 3)
    with pytest.raises(InputError, match="more than 5 frames of 65 x 49"):
        read_clip(tmp_path / "clip")


def test_a_clip_longer_than_the_callers_limit_is_refused(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((4, 32, 32, 3), np.uint8), Fraction(5))
    with pytest.raises(InputError, match="more than 3 frames of 32 x 32; cut the video"):
        read_clip(tmp_path / "v.mp4", most_frames=3)
    assert len(read_clip(tmp_path / "v.mp4", most_frames=4).names) == 4


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_a_playlist_cannot_read_other_files(tmp_path, skip_corrupt):
    import av

    other = tmp_path / "other.ts"
    with av.open(str(other), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height = stream.width = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    playlist = tmp_path / "v.m3u8"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{other}\n#EXT-X-ENDLIST\n"
    )
    with playlist.open("rb") as file, av.open(file) as container:  # as it would be without a guard
        assert sum(1 for _ in container.decode(video=0)) == 1
    with pytest.raises(InputError, match="cannot be decoded"):
        read_clip(playlist, skip_corrupt=skip_corrupt)


def test_a_header_that_promises_too_much_and_a_name_that_is_no_text(tmp_path):
    write_folder(tmp_path / "clip", moving_square(1), ["a.png"])
    raw = bytearray((tmp_path / "clip" / "a.png").read_bytes())
    raw[16:24] = (100_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    (tmp_path / "clip" / "a.png").write_bytes(raw)
    with pytest.raises(InputError, match="not a readable image") as caught:
        read_clip(tmp_path / "clip")
    assert caught.value.file == str(tmp_path / "clip" / "a.png")
    (tmp_path / "clip" / "a.png").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path / "clip") + b"/\xff.png")).write_bytes(b"x")
    with pytest.raises(InputError, match="encoding"):
        read_clip(tmp_path / "clip")
