"""`rcot score replay`: advantages and ranks by hand, agreement with the dump, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.replay_page import replay_page
from rcot_rl.monitoring.pages.reward_replay import (
    advantages_of,
    kendall_tau,
    replay,
    replay_text,
    write_replay,
)
from reward_fns import load_reward

TRUTH = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]
NASTY = "<think>t</think><answer><script>alert(1)</script></answer>"


def response_of(shift: int) -> str:
    box = [100 + shift, 100, 300 + shift, 300]
    answer = [{"bbox_2d": box, "point_2d": [200 + shift, 200]}]
    return f"<think>t</think><answer>{json.dumps(answer)}</answer>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    reward = load_reward("ktg")
    folder = tmp_path / "run" / "grpo-ktg" / "rollouts"
    folder.mkdir(parents=True)
    for step, groups in ((2, [(0, 5, 12, 90), (0, 0, 0, 0)]), (10, [(0, 4, 8, 300)])):
        lines = []
        for g, shifts in enumerate(groups):
            for k, shift in enumerate(shifts):
                response = NASTY if shift == 90 else response_of(shift)
                score = reward.score(response, TRUTH)
                lines.append(
                    {
                        "prompt_id": f"{step}-{g}",
                        "sample": k,
                        "data_source": "rcot/ktg",
                        "response": response,
                        "ground_truth": json.dumps(TRUTH),
                        "index": g,
                        "reward": score.reward,
                        "components": score.components,
                        "reasons": score.reasons,
                    }
                )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{step}.jsonl").write_text(text)
    return tmp_path / "run"


def test_advantages_are_equation_14_with_the_unbiased_spread():
    rewards = np.array([6.0, 6.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 5.0])
    groups = [np.arange(8), np.array([8])]
    advantages = advantages_of(rewards, groups)
    # mean 3.75; squares 2 * 2.25^2 + 6 * 0.75^2 = 13.5; 13.5 / 7 = 1.3887^2
    assert advantages[0] == pytest.approx(2.25 / 1.388730, rel=1e-5)
    assert advantages[2] == pytest.approx(-0.75 / 1.388730, rel=1e-5)
    assert advantages[8] == 0.0
    assert advantages_of(np.ones(4), [np.arange(4)]).tolist() == [0.0] * 4


def test_kendalls_tau_equals_values_by_hand():
    assert kendall_tau(np.array([1, 2, 3]), np.array([1, 2, 3])) == 1.0
    assert kendall_tau(np.array([1, 2, 3]), np.array([3, 2, 1])) == -1.0
    # two of three pairs agree in order, one is tied in b: 2 / sqrt(3 * 2)
    assert kendall_tau(np.array([1, 2, 3]), np.array([1, 1, 2])) == pytest.approx(2 / np.sqrt(6))
    assert kendall_tau(np.array([1, 1]), np.array([1, 2])) is None


def test_the_logged_reward_is_reproduced_and_others_differ(run: Path):
    rewards = {"ktg": load_reward("ktg"), "ktg-soft": load_reward("ktg-soft")}
    result = replay(run, "grpo-ktg", rewards)
    assert (result.n_responses, result.n_groups, result.steps) == (12, 3, [2, 10])
    assert result.dumped["ktg"] == 0.0 and result.dumped["ktg-soft"] > 0.1
    assert result.totals["ktg"]["zero_variance"] == pytest.approx(1 / 3)
    # ktg gives shifts of 0, 5 and 12 the same reward (mean distance 2.5 and 6); ktg-soft does not.
    assert result.totals["ktg-soft"]["mean"] < result.totals["ktg"]["mean"]
    assert result.against_first["ktg-soft"]["other_best"] == 0.0
    assert 0 < result.against_first["ktg-soft"]["kendall_tau"] < 1
    assert result.moved["ktg-soft"][0].change >= result.moved["ktg-soft"][-1].change > -1
    assert "ktg equals the rewards logged by the run" in replay_text(result)


def test_a_reward_against_itself_changes_nothing(run: Path):
    result = replay(run, "grpo-ktg", {"a": load_reward("ktg"), "b": load_reward("ktg")})
    assert result.against_first["b"] == {"kendall_tau": 1.0, "sign_flips": 0.0, "other_best": 0.0}
    assert all(m.change == 0 for m in result.moved["b"])


def test_the_page_escapes_responses(run: Path, tmp_path: Path):
    rewards = {"ktg": load_reward("ktg"), "visionreasoner": load_reward("visionreasoner")}
    page = write_replay(run, replay(run, "grpo-ktg", rewards), tmp_path / "out")
    html = page.read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "Missing: the frame of this row" in html
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["n_responses"] == 12


def test_responses_are_drawn_on_the_frames_of_the_shards(run: Path):
    (run / "recipe.yaml").write_text(
        yaml.safe_dump(
            {"recipe": {"canvas": {"image": 400}, "train": {"grpo-ktg": {"shard_set": "ktg"}}}}
        )
    )
    shards = run / "shards" / "ktg"
    (shards / "media").mkdir(parents=True)
    Image.new("RGB", (400, 400)).save(shards / "media" / "0.png")
    rows = [{"extra_info": {"index": k, "media": f"media/{k}.png"}} for k in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), shards / "train-00000.parquet")
    rewards = {"ktg": load_reward("ktg"), "ktg-soft": load_reward("ktg-soft")}
    html = replay_page(run, replay(run, "grpo-ktg", rewards))
    assert html.count("data:image/png;base64,") == 8 and html.count("the frame of this row") == 4
    truths = re.findall('<rect [^>]*class="mark truth"[^>]*stroke-dasharray', html)
    assert len(truths) == 8, "one box of the ground truth per frame"
    assert html.count("Prompt and response") == 12 and "6 more responses" in html
    for column in ("Kendall’s tau", "signs that flip", "another best response"):
        assert f"<li><b>{column}</b>: " in html, "each column is explained"


def test_faults_name_file_and_line(run: Path):
    rewards = {"a": load_reward("ktg"), "b": load_reward("aks")}
    with pytest.raises(InputError, match="no rollouts"):
        replay(run, "grpo-aks", rewards)
    path = run / "grpo-ktg" / "rollouts" / "10.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(InputError, match="not valid JSON") as caught:
        replay(run, "grpo-ktg", {"a": rewards["a"]})
    assert (caught.value.file, caught.value.line) == (str(path), 4)
    path.write_text(whole.replace('"prompt_id"', '"prompt"', 1))
    with pytest.raises(InputError, match="missing") as caught:
        replay(run, "grpo-ktg", {"a": rewards["a"]})
    assert (caught.value.line, caught.value.key) == (1, "prompt_id")


def test_only_the_last_turn_of_a_rollout_is_scored(tmp_path: Path) -> None:
    """In the dump, earlier turns of an agentic rollout have the reward of its last turn."""
    folder = tmp_path / "grpo-aks" / "rollouts"
    folder.mkdir(parents=True)
    lines = [
        {
            "prompt_id": "p",
            "sample": sample,
            "turn": turn,
            "data_source": "rcot/aks",
            "response": f"<think>t</think><answer>{option}</answer>",
            "ground_truth": '"A"',
            "reward": reward,
        }
        for sample, turns, reward in ((0, "BA", 3.0), (1, "AB", 1.0), (2, "A", 3.0))
        for turn, option in enumerate(turns)
    ]
    (folder / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("aks", "aks-format-only")
    result = replay(tmp_path, "grpo-aks", {name: load_reward(name) for name in names})
    assert (result.n_responses, result.n_groups, result.dumped["aks"]) == (3, 1, 0.0)
