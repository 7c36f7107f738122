"""The console script: exit statuses, one-line errors, help everywhere, and a light start."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import typer

import rcot_rl
from rcot_rl.cli import main as cli

HEAVY = ("torch", "ray", "vllm", "verl", "transformers", "wandb")
SMALL_RECIPE = """\
name: small
canvas: {image: 112}
data:
  corpora: [{dataset: mevis, root: CORPUS}]
  sets: {grpo-aks-4: {aks: 4}}
  keyframe: any_visible
train:
  grpo-aks: {kind: grpo, shard_set: grpo-aks-4, reward: aks, steps: 1}
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def one_line(self) -> str:
        """Return the error; assert that it is one line and the only output."""
        assert (self.status, self.out) == (2, "")
        assert self.err.startswith("rcot: ") and self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err.removeprefix("rcot: ").rstrip("\n")


Rcot = Callable[..., Result]


@pytest.fixture
def rcot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Rcot]:
    """Return a function that runs the console script in this process, in an empty folder.

    A traceback fails the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["rcot", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


def commands() -> list[tuple[str, ...]]:
    """Return every command and group, including the root."""

    def walk(command: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    return list(walk(typer.main.get_command(cli.app), ()))


@pytest.mark.parametrize("path", commands(), ids=lambda path: " ".join(path) or "rcot")
def test_every_command_has_help(rcot: Rcot, path: tuple[str, ...]) -> None:
    result = rcot(*path, "--help")
    assert (result.status, result.err) == (0, "")
    assert "Usage: " + " ".join(("rcot", *path)) in result.out


def test_every_command_of_the_contract_exists() -> None:
    present = set(commands())
    for name in ("run", "train", "predict", "score", "eval", "submit", "report"):
        assert (name,) in present
    for name in ("build", "check", "toy"):
        assert ("data", name) in present


def test_version_prints_one_line(rcot: Rcot) -> None:
    assert rcot("--version") == Result(0, f"rcot {rcot_rl.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["runn"], ["run"], ["data", "toi"], ["run", "laptop", "--x"]]
)
def test_wrong_usage_is_status_2(rcot: Rcot, arguments: list[str]) -> None:
    result = rcot(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err and "Traceback" not in result.err


def test_a_typo_in_an_override_names_the_nearest_key(rcot: Rcot, tmp_path: Path) -> None:
    for command in (["run"], ["train"], ["predict"], ["data", "build"]):
        error = rcot(*command, "laptop", "train.grpo-ktg.kl_coef=0.1").one_line()
        assert error.endswith("did you mean train.grpo-ktg.kl_loss_coef?")
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_a_faulty_recipe_names_file_line_and_key(rcot: Rcot, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: other.yaml\n")
    assert rcot("run", path).one_line() == f"{path}:1: extends: no such recipe: other.yaml"
    path.write_text("name: a\nseed: [\n")
    assert rcot("run", path).one_line().startswith(f"{path}:3: not valid YAML")
    assert "laptop" in rcot("run", "labtop").one_line().partition("shipped: ")[2]


def test_a_run_refuses_a_folder_of_other_files(rcot: Rcot, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    assert "not a run's folder" in rcot("run", "laptop", "--out", tmp_path / "home").one_line()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "laptop", "--stage", "grpo-akt"],
            "--stage: 'grpo-akt' is not one of sft, grpo-aks",
        ),
        (["segment", "a.mp4", "fox", "--device", "tpu"], "--device: 'tpu' is not cpu or cuda"),
        (["data", "check", "nowhere"], "nowhere: no such folder"),
        (["score", "aksx"], "aksx"),
        (["score", "none.py:f"], "none.py: cannot be read"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--dataset", "coco", "--corpus", "nowhere"], "coco"),
    ],
)
def test_faults_are_one_line(rcot: Rcot, arguments: list[str], message: str) -> None:
    assert message in rcot(*arguments).one_line()


# --- score ----------------------------------------------------------------------------------------

RIGHT = "<think>here</think><answer>A</answer>"


def lines(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_score_reads_standard_input(rcot: Rcot) -> None:
    rows = [
        {"response": RIGHT, "ground_truth": "A", "id": 7},
        {"response": RIGHT, "ground_truth": "B", "id": 8},
        {"response": "A", "ground_truth": "A", "id": 9},
    ]
    result = rcot("score", "aks", stdin=lines(*rows))
    assert (result.status, result.err) == (0, "")
    scored = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["id"], row["reward"]) for row in scored] == [(7, 3.0), (8, 1.0), (9, 0.0)]
    assert scored[0]["components"] == {"format": 1.0, "accuracy": 1.0}
    assert scored[0]["reasons"] == [] and scored[1]["reasons"] and scored[2]["reasons"]


def test_verbose_logs_components_to_stderr_and_leaves_stdout_as_it_is(rcot: Rcot) -> None:
    line = lines({"response": RIGHT, "ground_truth": "A"})
    quiet = rcot("score", "aks", stdin=line)
    verbose = rcot("--verbose", "score", "aks", stdin=line)
    assert quiet == Result(0, verbose.out, "")
    assert verbose.err.startswith("[rcot] INFO score: reward aks: ")
    assert verbose.err.count("\n") == 1
    assert rcot("-v", "score", "aks", stdin=line) == verbose


def test_score_writes_a_file(rcot: Rcot, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines({"response": RIGHT, "ground_truth": "A"}))
    assert rcot("score", "aks", "--in", "in.jsonl", "--out", "out.jsonl") == Result(0, "", "")
    assert json.loads((tmp_path / "out.jsonl").read_text())["reward"] == 3.0


def test_a_dash_means_standard_input_and_output(rcot: Rcot, tmp_path: Path) -> None:
    line = lines({"response": RIGHT, "ground_truth": "A"})
    result = rcot("score", "aks", "--in", "-", "--out", "-", stdin=line)
    assert (result.status, json.loads(result.out)["reward"]) == (0, 3.0)
    assert "<stdin>:1: not valid JSON" in rcot("score", "aks", "--in", "-", stdin="{").one_line()
    assert rcot("score", "explain", "aks", "--in", "-", stdin=line).status == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "where"),
    [("{", "<stdin>:2: not valid JSON"), ('{"response": ""}', "<stdin>:2: ground_truth: missing")],
)
def test_score_names_the_line_at_fault(rcot: Rcot, bad: str, where: str) -> None:
    good = lines({"response": RIGHT, "ground_truth": "A"})
    result = rcot("score", "aks", stdin=good + bad + "\n")
    assert result.status == 2
    assert len(result.out.splitlines()) == 1  # what was scored before
    assert result.err.startswith(f"rcot: {where}") and result.err.count("\n") == 1


# --- data -----------------------------------------------------------------------------------------


def test_check_passes_a_built_set_and_reports_a_replaced_image(rcot: Rcot, tmp_path: Path) -> None:
    corpus, shards = tmp_path / "mevis", tmp_path / "shards"
    toy = rcot("data", "toy", corpus, "--layout", "mevis", "--videos", 3, "--preset", "lattice")
    assert toy.status == 0 and "mevis train: 3 videos" in toy.out
    (tmp_path / "small.yaml").write_text(SMALL_RECIPE.replace("CORPUS", str(corpus)))
    assert rcot("data", "build", "small.yaml", "--out", shards).status == 0

    result = rcot("data", "check", shards, "--json")
    assert result.status == 0
    document = json.loads(result.out)  # one document, and nothing else there
    assert (document["ok"], document["faults"]) == (True, [])
    assert document["counts"]["grpo-aks-4"]["train"]["aks"] == 4
    assert rcot("data", "check", shards).out == "no faults\n"

    (image, *_) = sorted((shards / "grpo-aks-4" / "media").rglob("*.*"))
    image.write_bytes(b"other")
    result = rcot("data", "check", shards, "--json")
    assert result.status == 2
    faults = json.loads(result.out)["faults"]
    assert any(image.name in fault["file"] for fault in faults)
    lines = result.err.splitlines()
    assert lines[0].startswith(f"rcot: {faults[0]['file']}") and len(lines) == len(faults)
    plain = rcot("data", "check", shards)
    assert (plain.status, len(plain.err.splitlines())) == (2, len(faults))


# --- processes ------------------------------------------------------------------------------------


def test_a_process_ends_with_status_and_one_line(
    tmp_path: Path, run_rcot: Callable[..., CompletedProcess[str]]
) -> None:
    done = run_rcot("run", "laptop", "sead=1", cwd=tmp_path)
    expected = "rcot: command line: sead: unknown key; did you mean seed?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    "module",
    [
        "rcot_rl.cli.main",
        "rcot_rl.recipe.loader",
        "rcot_rl.protocol.prompts",
        "rcot_rl.runfolder",
        "rcot_rl.chain",
        "reward_fns.score",
        "data_pipelines.planning.sampling_plan",
        "data_pipelines.verify.check_sets",
        "cluster.preflight.at_start",
        "cluster.preflight.plan",
    ],
)
def test_light_modules_load_nothing_heavy(module: str, run_python: Callable[..., str]) -> None:
    code = f"import sys, {module}\nprint(*sorted(sys.modules.keys() & set({HEAVY})))"
    assert run_python(code).strip() == ""


def test_the_script_and_scoring_do_without_numpy(run_python: Callable[..., str]) -> None:
    code = (
        "import sys, rcot_rl.cli.main, reward_fns.score_lines\n"
        "from reward_fns.score import load_reward\n"
        f"assert load_reward('aks').score({RIGHT!r}, 'A').reward == 3.0\n"
        "print(*sorted(sys.modules.keys() & {'numpy', 'scipy', 'cv2', 'pyarrow'}))"
    )
    assert run_python(code).strip() == ""


@pytest.mark.parametrize(
    ("recipe", "words", "stages"),
    [
        ("laptop", [], ("sft", "grpo-aks", "grpo-ktg")),
        ("rcot_seg_3b_joint", [], ("sft", "grpo-joint")),
        ("grpo_ktg", [], ("grpo-ktg",)),
        ("rcot_seg_3b_joint", ["--stage", "grpo-joint"], ("grpo-joint",)),
        ("laptop", ["--stage", "grpo-ktg", "--stage", "sft"], ("sft", "grpo-ktg")),
        ("laptop", ["stages=[data]"], ("sft", "grpo-aks", "grpo-ktg")),
    ],
)
def test_train_runs_the_training_stages_of_the_recipe(
    rcot: Rcot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe, words, stages
) -> None:
    asked = []

    def run(loaded: object, out: Path, stages: tuple[str, ...], checked: bool) -> SimpleNamespace:
        asked.append(stages)
        return SimpleNamespace(root=out)

    monkeypatch.setattr("rcot_rl.chain.run", run)
    assert rcot("train", recipe, *words, "--out", tmp_path / "run").status == 0
    assert asked == [stages]


def test_batches_of_the_stages_that_run_are_checked(rcot: Rcot, tmp_path: Path) -> None:
    settings = ["stages=[data]", "train.sft.batch_size=33", "--out", tmp_path / "run"]
    done = rcot("train", "laptop", "--stage", "sft", *settings)
    assert (
        done.status == 2 and "train.sft.batch_size: batch_size = 33 is not a multiple" in done.err
    )


def test_a_folder_with_too_long_a_name_is_a_finding(rcot: Rcot) -> None:
    done = rcot("preflight", "laptop", "--out", "x" * 300, "--json")
    (finding,) = json.loads(done.out)["findings"]
    assert (done.status, finding["code"]) == (2, "folder.writable")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", "seed"),
        ("toy.seed=-1", "toy.seed"),
        ("eval.benchmarks=[{dataset: mevis}, {dataset: mevis, limit: 3}]", "mevis-valid is listed"),
    ],
)
def test_preflight_refuses_impossible_values(rcot: Rcot, setting: str, message: str) -> None:
    done = rcot("preflight", "laptop", setting)
    assert done.status == 2 and message in done.err


@pytest.mark.parametrize(
    ("ignored", "number", "status"),
    [(False, "SIGHUP", 130), (False, "SIGTERM", 130), (True, "SIGTERM", 130), (True, "SIGHUP", 0)],
)
def test_a_closed_terminal_ends_a_command_unless_it_ignores_sighup(
    ignored: bool, number: str, status: int
) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from rcot_rl.cli import main as cli\n"
        "def app(arguments, prog_name):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{number}); time.sleep(0.1)\n"
        "    except KeyboardInterrupt:\n"
        "        cli._fail('stopped', 130)\n"
        "cli.app = app\n"
        "os.close(2)  # the terminal is gone\n"
        "cli.main()\n"
    )
    if ignored:
        code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == status
