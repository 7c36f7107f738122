"""A workspace by questions, as JSON and saved to the fake server."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fake_wandb_server import FakeWandb
from typer.testing import CliRunner

from rcot_rl.cli.main import app
from rcot_rl.errors import InputError
from rcot_rl.monitoring.trackers.tracked_stage import run_id_of
from rcot_rl.monitoring.trackers.wandb_workspace import save_workspace, sections
from rcot_rl.recipe.loader import load_recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = load_recipe("laptop", ["wandb.project=mine"])
    (tmp_path / "run").mkdir()
    record = {"recipe": recipe.model_dump(mode="json")}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(record))
    return tmp_path / "run"


def metrics_of(view: dict) -> set[str]:
    """Return the metrics and tables that a saved view shows."""
    section = view["spec"]["section"]
    shown = set()
    for part in section["panelBankConfig"]["sections"]:
        for panel in part["panels"]:
            config = panel["config"]
            shown |= set(config.get("metrics", []))
            if panel["viewType"] == "Weave":
                shown.add(str(config))
    return shown


def test_a_workspace_of_a_run_shows_its_group_in_sections_by_question(
    run: Path, wandb_server: FakeWandb
) -> None:
    url = save_workspace(run, None, None)
    (view,) = wandb_server.views
    assert url.startswith(f"{wandb_server.url}/someone/mine?nw=")
    assert (view["entityName"], view["projectName"]) == ("someone", "mine")
    section = view["spec"]["section"]
    names = [part["name"] for part in section["panelBankConfig"]["sections"]]
    assert len(names) == 7 and all(name.endswith("?") for name in names)
    assert f"laptop-{run_id_of(run)}" in str(section["runSets"][0]["filters"])
    shown = metrics_of(view)
    assert {"reward/mean", "group/too_hard_fraction", "actor/kl_loss"} <= shown
    assert {"summary:JF_mevis_valid_u", "summary:heldout_ktg_sampled"} <= {
        name if name.startswith("summary:") else f"summary:{name}" for name in shown
    }
    assert any("rollouts_same_prompts" in name for name in shown)


def test_a_workspace_of_a_project_groups_its_runs_by_folder(wandb_server: FakeWandb) -> None:
    save_workspace(None, "mine", "team")
    (view,) = wandb_server.views
    assert (view["entityName"], view["projectName"]) == ("team", "mine")
    (runs,) = view["spec"]["section"]["runSets"]
    assert "group" in str(runs["grouping"])


def test_each_section_begins_with_how_to_read_it() -> None:
    for section in sections([]):
        assert section.panels[0].markdown.endswith(".")  # type: ignore[union-attr]


def test_the_command_prints_the_url_or_one_line(
    run: Path, wandb_server: FakeWandb, tmp_path: Path
) -> None:
    answer = CliRunner().invoke(app, ["wandb", "workspace", str(run)])
    assert answer.exit_code == 0 and answer.stdout.startswith(wandb_server.url)
    for arguments in ([], [str(run), "--project", "mine"], [str(tmp_path / "none")]):
        answer = CliRunner().invoke(app, ["wandb", "workspace", *arguments])
        assert type(answer.exception).__name__ == "InputError"
        assert "\n" not in str(answer.exception)


@pytest.mark.slow  # 20 s: wandb's own limit
def test_a_server_that_is_down_is_one_line(run: Path, wandb_server: FakeWandb) -> None:
    wandb_server.stop()
    with pytest.raises(InputError, match=r"^wandb: .+$"):
        save_workspace(run, None, None)
