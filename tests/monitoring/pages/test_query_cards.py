"""Queries: which are shown, what a card shows of each checkpoint, and what it cannot draw."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image

from data_pipelines.corpora.label_png import read_labels
from rcot_rl.monitoring.pages.query_cards import (
    MOST_COLUMNS,
    MOST_QUERIES,
    Column,
    choose,
    columns,
    queries_section,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader

MakeRun = Callable[..., Path]
BENCHMARK = "reasonvos-valid"
FRAMES = 6
"""Frames of each video of `make_run`."""


def cards(html: str) -> dict[str, str]:
    """Return video -> card."""
    html_cards = re.findall(
        r'<details class="query".*?(?=<details class="query"|<svg class="sheet")', html
    )
    return {re.search(r"clip-\d\d", card)[0]: card for card in html_cards}


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def column(scores: list[float]) -> Column:
    return Column("x", Path(), {(f"v{k:03d}", "0"): score for k, score in enumerate(scores)})


def test_chosen_queries_range_from_best_to_worst_with_the_largest_changes() -> None:
    before, after = [50.0] * 100, [float(k) for k in range(100)]
    before[42], before[77] = 99.0, 1.0
    chosen = choose(column(before), column(after), 5)
    assert [query.score for query in chosen] == sorted((q.score for q in chosen), reverse=True)
    assert (chosen[0].rank, chosen[-1].rank) == (1, 100) and len(chosen) == 7
    labels = {query.label: (query.score, query.change) for query in chosen if query.label}
    assert labels == {"largest gain": (77.0, 76.0), "largest loss": (42.0, -57.0)}


def test_a_change_is_the_difference_of_the_shown_scores() -> None:
    (query,) = choose(column([10.04]), column([10.16]), 5)
    assert query.change == pytest.approx(0.2), "10.0 and 10.2 are shown"


def test_only_gains_and_losses_are_called_so() -> None:
    falling = choose(column([50.0, 60.0]), column([40.0, 55.0]), 5)
    assert sorted(query.label for query in falling) == ["", "largest loss"]
    only = column([50.0, 60.0])
    assert {(query.label, query.change) for query in choose(only, only, 5)} == {("", None)}


def test_columns_are_first_last_and_variants_of_the_last(tmp_path: Path) -> None:
    rows = {"per_expression": [{"video": "v", "expression_id": "0", "J&F": 5}, {"video": 3}, 4]}
    names = ["base", "sft", "grpo-ktg", "sft@no-aks", "grpo-ktg@no-aks", "..", "a/b", ""]
    shown = columns(tmp_path, BENCHMARK, {"checkpoints": dict.fromkeys(names, rows)})
    assert [one.name for one in shown] == ["base", "sft", "grpo-ktg", "grpo-ktg@no-aks"]
    folders = [one.folder.relative_to(tmp_path).parts[:-1] for one in shown]
    assert folders[0] == ("predict", "base") and folders[3] == ("predict", "grpo-ktg@no-aks")
    assert folders[2] == ("predictions",)
    assert shown[0].scores == {("v", "0"): 5.0}
    many = [f"c{k}" for k in range(20)]
    shown = columns(tmp_path, BENCHMARK, {"checkpoints": dict.fromkeys(many, rows)})
    assert len(shown) == MOST_COLUMNS and (shown[0].name, shown[-1].name) == ("c0", "c19")


def test_a_card_shows_each_checkpoint_and_a_clip_of_all_frames(make_run: MakeRun) -> None:
    run = make_run(n_videos=3)
    html = queries_section(RunReader(run))
    shown = cards(html)
    assert sorted(shown) == ["clip-00", "clip-01", "clip-02"]
    scores = json.loads((run / "eval" / f"{BENCHMARK}.json").read_text())["checkpoints"]
    for video, card in shown.items():
        for name, result in scores.items():
            score = next(r["J&F"] for r in result["per_expression"] if r["video"] == video)
            assert f"<b>{name}</b> J&amp;F {score:.1f}" in card
        assert card.count('role="img" aria-label="Keyframe of') == 3
        assert card.count("“A &lt;b&gt;disc&lt;/b&gt; drifts over a gradient.”") == 3
        (clip,) = re.findall(r'src="data:video/mp4;base64,([^"]*)"', card)
        with av.open(io.BytesIO(base64.b64decode(clip))) as container:
            frames = [frame.to_ndarray() for frame in container.decode(video=0)]
            size = container.streams.video[0].width, container.streams.video[0].height
        assert len(frames) == FRAMES and size == (256, 192)
        assert f'width="{size[0]}" height="{size[1]}"' in card
    used, defined = (set(re.findall(p, html)) for p in (r'href="#(\w+)"', r'<symbol id="(\w+)"'))
    assert used == defined and "Missing" not in html


def test_verdicts_are_right_if_they_agree_with_the_ground_truth(make_run: MakeRun) -> None:
    run = make_run(n_videos=1)
    answer = "<think>t</think><answer>{}</answer>"
    steps = [
        {"task": "aks", "frame": 1, "response": answer.format("B")},
        {"task": "kfg_again", "frame": None, "response": answer.format(3)},
        {
            "task": "aks",
            "frame": 3,
            "response": answer.format("A"),
            "option_probabilities": {"A": 0.875, "B": 0.1},
        },
        {"task": "aks", "frame": 99, "response": "neither"},
    ]
    trace = run / "predictions" / BENCHMARK / "clip-00" / "0" / "trace.json"
    edit(trace, lambda t: t.update(steps=steps, keyframe=3))
    html = queries_section(RunReader(run))
    (rounds,) = re.findall('<ol class="rounds".*?</ol>', html)
    first, second, third, fourth = re.findall("<li.*?</li>", rounds)
    assert "frame 2<" in first and "B, refused" in first and ">wrong<" in first
    assert "A, accepted" in second and ">right<" in second and "p(A) 0.88" in second
    assert "frame 99 of the judgement" in third and "then frame 4, not judged" in fourth


def test_no_targets_and_first_choices_are_told_apart(make_run: MakeRun) -> None:
    run = make_run(n_videos=1)
    (label,) = (run.parent / "corpus" / "Annotations").rglob("00002.png")
    with Image.open(label) as image:
        empty = Image.new("L", image.size)
    empty.save(label)
    read_labels.cache_clear()
    trace = run / "predictions" / BENCHMARK / "clip-00" / "0" / "trace.json"
    edit(trace, lambda t: t.update(keyframe=2, initial_keyframe=5))
    html = queries_section(RunReader(run))
    assert "keyframe 3 of 6, first choice 6, no target in this frame" in html


def test_texts_of_a_run_are_escaped(make_run: MakeRun) -> None:
    html = queries_section(RunReader(make_run(n_videos=1)))
    assert "&lt;script&gt;alert(&quot;query&quot;)&lt;/script&gt;" in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html and "A &lt;b&gt;disc&lt;/b&gt;" in html
    assert not re.search(r"<(?:script|img)", html)


@pytest.mark.parametrize(
    ("lost", "note"),
    [
        (
            "predictions/reasonvos-valid/clip-00/0/trace.json",
            "clip-00 / 0: cannot be drawn ([Errno 2]",
        ),
        (
            "predictions/reasonvos-valid/clip-00/0/00004.png",
            "clip-00 / 0: cannot be drawn ([Errno 2]",
        ),
        ("predict/sft", "clip-00 / 0: cannot be drawn ([Errno 2]"),
        ("../corpus", "the corpus of reasonvos-valid, for its frames"),
        ("../corpus/JPEGImages/clip-00/00003.jpg", "00003.jpg"),
    ],
)
def test_what_cannot_be_drawn_shows_its_reason(lost: str, note: str, make_run: MakeRun) -> None:
    run = make_run(n_videos=1)
    place = run / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    html = queries_section(RunReader(run))
    assert note in " ".join(re.findall('class="missing">Missing: (.*?)</p>', html))
    assert ("<video" in html) == (lost == "predict/sft" or lost.endswith("trace.json"))


@pytest.mark.parametrize("video", ["../../corpus", "/etc", "nowhere", "\0"])
def test_ids_cannot_point_outside_the_run(video: str, make_run: MakeRun) -> None:
    run = make_run(n_videos=1)

    def point_outside(result: dict) -> None:
        for one in (result, *result["checkpoints"].values()):
            one["per_expression"][0]["video"] = video

    edit(run / "eval" / f"{BENCHMARK}.json", point_outside)
    html = queries_section(RunReader(run))
    assert "not in the corpus" in html and "<image" not in html and "<video" not in html


def test_a_run_without_scores_has_no_section(make_run: MakeRun) -> None:
    run = make_run(n_videos=1)
    shutil.rmtree(run / "eval")
    assert queries_section(RunReader(run)) == ""


def test_the_number_of_queries_and_the_size_are_bounded(make_run: MakeRun) -> None:
    html = queries_section(RunReader(make_run(n_videos=20)))
    assert MOST_QUERIES <= len(cards(html)) <= MOST_QUERIES + 2
    assert html.count('<details class="query" open') == 1
    assert len(html) < 4_000_000
