"""The report page: values of the files, escaping, and notes on what is missing."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.figures import scores_section
from rcot_rl.monitoring.pages.report import write_report
from rcot_rl.stats.intervals import paired_difference

VOID = {"meta", "br", "img", "link", "input"}


class Checker(HTMLParser):
    """Checks that tags are balanced, and collects what could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.suspect: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self._see(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def _see(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            fetches = name in ("src", "href", "xlink:href", "action", "data", "srcset")
            if name.startswith("on") or (
                fetches
                and not value.startswith(("data:image/jpeg;base64,", "data:video/mp4;base64,", "#"))
            ):
                self.suspect.append((name, value))


def read(path: Path) -> tuple[str, Checker]:
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return page, checker


def test_the_page_of_a_whole_run_shows_its_numbers(make_run) -> None:
    run = make_run()
    path = write_report(run)
    assert path == run / "report.html"
    page, checker = read(path)
    shown = " ".join(checker.text)
    assert "Missing: Learning rate; Gradient norm (not in metrics.jsonl)" in shown
    assert "Truncated responses, %; Entropy; Gradient norm (not in metrics.jsonl)" in shown
    assert shown.count("Missing:") == 4  # charts of three stages, components of held-out rewards
    assert "made-up" in shown and "lattice" in shown and "tiny-sam2" in shown
    result = json.loads((run / "eval" / "reasonvos-valid.json").read_text())
    rows = (*result["checkpoints"].values(), *result["baselines"].values())
    for row in rows:
        assert f"<b>{row['J&F']:.1f}</b>" in page
    assert "baseline: whole-frame" in shown
    rewards = json.loads((run / "predict" / "rewards.json").read_text())["ktg"]
    change = paired_difference(
        rewards["sft"]["sampled"]["per_prompt"], rewards["grpo-ktg"]["sampled"]["per_prompt"]
    )
    assert change.low > 0
    interval = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    assert f'<small class="up">{interval}</small>' in page
    levels = [f"{row['J&F']:.1f}" for row in (result["checkpoints"]["sft"], result)]
    assert f"{float(levels[1]) - float(levels[0]):+.1f} [" in shown
    assert "their advantages are 0" in shown
    sections = re.findall('<section id="([^"]+)"', page)
    assert re.findall('<li><a href="#([^"]+)"', page) == sections and sections[0] == "verdict"
    assert len(set(sections)) == len(sections)
    assert checker.tags.count("video") == 5
    assert len(re.findall('class="chart"', page)) == 1 + 2 * 7
    assert not list(run.glob(".*tmp"))


def test_the_revos_change_counts_the_subsets_of_its_score() -> None:
    def result(gains: list[float]) -> dict:
        subsets = ("referring", "referring", "reasoning", "reasoning", "no_target", "no_target")
        rows = [
            {"video": f"v{k}", "expression_id": str(k), "J&F": g, "subset": s}
            for k, (g, s) in enumerate(zip(gains, subsets, strict=True))
        ]
        return {"benchmark": "revos", "per_expression": rows}

    before, after = result([10.0] * 4 + [0.0] * 2), result([20.0, 40.0, 0.0, 40.0] + [100.0] * 2)
    checkpoints = {"sft": before, "grpo-ktg": after}
    page = scores_section({"revos": after | {"checkpoints": checkpoints}})
    # Changes of 10, 30 and of -10, 30: the mean of 20 and 10. A quarter of each deviation from
    # its subset's mean (-10, 10, -20, 20), two clips a subset, and t(0.975, 1) = 12.706.
    reach = 12.7062047 * math.sqrt(2 * (10**2 + 10**2 + 20**2 + 20**2) / 4**2)
    assert f"+15.0 [{15 - reach:+.1f}, {15 + reach:+.1f}]" in page
    one = {"sft": result([10.0] * 6), "grpo-ktg": result([20.0] * 6)}
    for row in (*one["sft"]["per_expression"], *one["grpo-ktg"]["per_expression"]):
        row["subset"] = "reasoning" if row["expression_id"] == "1" else "referring"
    page = scores_section({"revos": one["grpo-ktg"] | {"checkpoints": one}})
    assert '<td class="n">+10.0</td>' in page, "a subset of one clip has no interval"


def test_a_run_whose_benchmarks_are_named_by_dataset_alone_is_shown(make_run) -> None:
    """Versions before 0.2 wrote eval/<dataset>.json."""
    run = make_run()
    (run / "eval" / "reasonvos-valid.json").rename(run / "eval" / "reasonvos.json")
    (run / "predictions" / "reasonvos-valid").rename(run / "predictions" / "reasonvos")
    _, checker = read(write_report(run))
    assert checker.tags.count("video") == 5


def test_nothing_foreign_runs_or_is_fetched(make_run) -> None:
    page, checker = read(write_report(make_run()))
    assert checker.suspect == []
    assert "script" not in checker.tags and checker.tags.count("video") == 5 and "b" in checker.tags
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:url\(|@import|https?://)", page)
    shown = " ".join(checker.text)
    assert '<script>alert("query")</script>' in shown  # as text
    assert "<img src=x onerror=alert(1)>" in shown
    assert "A <b>disc</b> drifts" in shown


def test_foreign_names_are_escaped_everywhere(make_run) -> None:
    run = make_run(n_videos=1)
    evil = "<script>1</script>"
    path = run / "eval" / "reasonvos-valid.json"
    result = json.loads(path.read_text())
    last = result["checkpoints"]["grpo-ktg"]
    for part in (result, last):
        part["segmenter"] = part["protocol"] = part["split"] = evil
        part["per_subset"] = {evil: {"J": evil}}
    result["checkpoints"][evil] = last
    result["baselines"] = {evil: {"J&F": evil, "missing": evil}}
    path.write_text(json.dumps(result))
    (run / "sft" / "metrics.jsonl").write_text("{" + evil + "\n")
    lines = [{"step": 1, f"reward/{evil}/mean": 1.0, "reward/mean": 2.0}]
    (run / "grpo-aks" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    record = (run / "recipe.yaml").read_text().replace("made-up", evil).replace("0.9.1", evil)
    (run / "recipe.yaml").write_text(record.replace("feedc0ffee", evil))
    _, checker = read(write_report(run))
    assert "script" not in checker.tags and not checker.suspect


@pytest.mark.parametrize(
    ("removed", "note"),
    [
        ("recipe.yaml", "recipe.yaml"),
        ("predict/rewards.json", "predict/rewards.json"),
        ("eval", "eval/*.json"),
        ("grpo-aks", "grpo-aks/metrics.jsonl"),
        ("sft/metrics.jsonl", "sft/metrics.jsonl"),
        ("predictions/reasonvos-valid/clip-00/0/trace.json", "clip-00 / 0: cannot be drawn"),
        ("predictions", "clip-00 / 0: cannot be drawn"),
        ("../corpus", "the corpus of reasonvos"),
    ],
)
def test_missing_files_are_named(removed: str, note: str, make_run) -> None:
    run = make_run(n_videos=1)
    place = run / removed
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    _, checker = read(write_report(run))
    missing = [t for t in checker.text if t.startswith("Missing:")]
    assert any(note in line for line in missing), missing


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "eval/reasonvos-valid.json", "predict/rewards.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"\xff\xfe", b"null", b'{"aks": [], "recipe": 3}']
)
def test_damaged_files_do_not_break_the_page(name: str, content: bytes, make_run) -> None:
    run = make_run(n_videos=1)
    (run / name).write_bytes(content)
    read(write_report(run))


@pytest.mark.parametrize(
    "change",
    [
        {"keyframe": 99},
        {"keyframe": "x"},
        {"boxes_source": [[1, 2, 3]]},
        {"boxes_source": [[float("nan"), 0, 1, 1]]},
        {"boxes_source": [[-1e308, -5, 1e308, 5], [9, 9, 3, 3]], "points_source": [[1e308, -7]]},
        {"steps": [{"task": "x" * 10_000, "response": "y" * 100_000}] * 60},
    ],
)
def test_malformed_traces_do_not_break_the_page(change: dict, make_run) -> None:
    run = make_run(n_videos=1)
    path = run / "predictions" / "reasonvos-valid" / "clip-00" / "0" / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    page, _ = read(write_report(run))
    assert len(page) < 1_000_000
    assert not re.search(r"(nan|inf)\b", "".join(re.findall("<svg.*?</svg>", page)))


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no run folder: it has none of"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_clips_are_the_sample_of_the_interval() -> None:
    """Two clips are two values, however many expressions they have."""

    def result(gain: dict[str, float]) -> dict:
        rows = [
            {"video": v, "expression_id": str(k), "J&F": 50.0 + g, "subset": None}
            for v, g in gain.items()
            for k in range(10)
        ]
        return {"benchmark": "mevis", "per_expression": rows}

    stages = {"sft": result({"a": 0, "b": 0}), "grpo-ktg": result({"a": 10.0, "b": 2.0})}
    page = scores_section({"mevis": stages["grpo-ktg"] | {"checkpoints": stages}})
    assert "+6.0 [-44.8, +56.8]" in page


def test_done_json_is_no_benchmark(make_run) -> None:
    run = make_run()
    (run / "eval" / "done.json").write_text(json.dumps({"minutes": 1.0, "J&F": {}}))
    page, _ = read(write_report(run))
    assert "<h3>done" not in page and "corpus of done" not in page


def test_steps_and_verdicts_are_in_a_table_and_bounds_are_named() -> None:
    stages = {name: {"relative": share} for name, share in (("vdg", 0.21), ("aks", 1.47))}
    costs = {"stages": stages, "aks_extra": 81.2, "keyframe_seconds": 12.34}
    verdicts = {"n": 40, "precision_A": 87.6, "brier": 0.123}
    result = {"J&F": 50.0, "pipeline_costs": costs, "aks_verdicts": verdicts}
    whole = result | {
        "checkpoints": {"sft": result, "sft@no-aks": {"J&F": 40.0}},
        "baselines": {"oracle-both": result, "first-frame": {"J&F": 1.0}},
    }
    page = scores_section({"mevis-valid_u": whole})
    assert "upper bound: oracle-both" in page and "baseline: first-frame" in page
    times, judged = cells_of(page, "Times"), cells_of(page, "Verdicts of AKS")
    assert list(times) == list(judged) == ["sft", "upper bound: oracle-both"]
    shown = times["sft"]
    assert (shown["VDG"], shown["AKS"], shown["KTG"]) == ("0.21", "1.47", "–")
    seconds = (shown["keyframe, s"], shown["segmentation, s"])
    assert shown["AKS adds %"] == "81.2" and seconds == ("12.34", "–")
    shown = judged["sft"]
    assert (shown["judged"], shown["A precision"], shown["Brier"]) == ("40", "87.6", "0.123")
    assert "<summary>Times" not in scores_section({"mevis-valid_u": {"J&F": 1.0}})


def cells_of(page: str, title: str) -> dict[str, dict[str, str]]:
    """Return row -> column -> text of the table below a summary."""
    part = re.search(f"<summary>{re.escape(title)}</summary>.*?</details>", page, re.S)
    assert part is not None
    head, *rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part[0], re.S)
    names, *lines = (
        [re.sub("<[^>]+>", "", cell) for cell in re.findall("<t[dh][^>]*>(.*?)</t", row, re.S)]
        for row in (head, *rows)
    )
    return {line[0]: dict(zip(names, line, strict=True)) for line in lines}


def test_variants_follow_their_checkpoint_and_are_compared_with_it() -> None:
    def result(score: float) -> dict:
        rows = [
            {"video": f"v{k}", "expression_id": "0", "J&F": score + k, "subset": None}
            for k in range(3)
        ]
        return {"benchmark": "mevis", "J&F": score + 1, "per_expression": rows}

    stages = {"sft": result(40), "grpo-ktg": result(50), "sft@no-aks": result(37)}
    stages["grpo-ktg@no-aks"] = result(44)
    page = scores_section({"mevis": stages["grpo-ktg"] | {"checkpoints": stages}})
    names = re.findall('<th scope="row"[^>]*>([^<]*)</th>', page)[:4]
    assert names == ["sft", "@no-aks", "grpo-ktg", "@no-aks"]
    changes = re.findall(r'<span class="\w+">([-+][\d.]+) \[', page)
    assert changes == ["-3.0", "+10.0", "-6.0"]
    assert "<small>from grpo-ktg</small>" in page


def test_figures_of_public_scripts_are_shown() -> None:
    script = {"R": 33.46, "A": 93.62}
    robustness = {"legacy": script, "corrected": {"R": 85.2, "A": None}, "reason": None}
    skipped = {"J&F": 41.27, "J": 40.0, "F": 42.5, "n_skipped": 3}
    stages = {"sft": {"J&F": 40.0, "robustness": robustness, "public_script": skipped}}
    page = scores_section({"revos-valid": stages["sft"] | {"checkpoints": stages}})
    part = page[page.index("Public scripts") :]
    shown = re.findall(r"<span>([\d.–]+)</span>", part)
    assert shown[:4] == ["33.5", "93.6", "85.2", "–"]
    assert shown[4:8] == ["41.3", "40.0", "42.5", "3"]
