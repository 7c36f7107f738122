"""A user's tracker is one file; what is wrong with it is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.trackers.tracker_choice import choices, name_of, user_tracker
from rcot_rl.recipe.loader import load_recipe

OWN = Path(__file__).with_name("json_lines_tracker.py")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ["wandb-offline"]),
        (["wandb.mode=online", "tracking.tensorboard=true"], ["wandb", "tensorboard"]),
        (["wandb.mode=disabled", "tracking.others=['x/a.py:Own']"], ["x/a.py:Own"]),
        (["wandb.mode=disabled"], []),
    ],
)
def test_a_recipe_chooses_its_trackers(settings, expected):
    assert choices(load_recipe("laptop", settings)) == expected


def test_one_file_suffices():
    assert user_tracker(f"{OWN}:JsonLines").label == "JSON lines"
    assert name_of(f"{OWN}:JsonLines") == "JsonLines"
    assert len(OWN.read_text().splitlines()) <= 40


HEAD = "from rcot_rl.monitoring.trackers.tracker import Tracker\n"
BODY = """class Own(Tracker):
    label = 'own'
    def open(self, stage): return 0
    def log(self, step, values): pass
    def summarize(self, values): pass
    def alert(self, alert): pass
    def close(self, state): pass
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "class Own(Tracker): pass", "Own lacks alert, close, log, open, summarize, label"),
        (HEAD + BODY.replace("    label = 'own'\n", ""), "Own lacks label"),
        (HEAD + BODY + "    def __init__(self, url): pass", r"Own\(\) fails: TypeError"),
        ("Own = 3", "Own is not a subclass"),
        ("import no_such_package", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1\nclass Own(:", ":2: cannot be loaded: SyntaxError"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit"),
    ],
)
def test_an_unusable_tracker_is_one_line(tmp_path, text, says):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        user_tracker(f"{tmp_path / 'own.py'}:Own")
    assert len(str(caught.value).splitlines()) == 1
