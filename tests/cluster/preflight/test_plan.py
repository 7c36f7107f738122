"""`rcot preflight` finds every planted mistake and names its key; clean recipes have no finding.

The corpus is the files below mistakes/: a `recipe`, `with` overrides and `facts` of the host. There
must be a finding of that `code` and severity whose message contains `says`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from typer.testing import Result

from cluster.preflight.checks.findings import Report
from cluster.preflight.plan import examine, examine_file
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.loader import RECIPES, load_recipe

MISTAKES: dict[str, list[dict[str, Any]]] = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((Path(__file__).parent / "mistakes").glob("*.yaml"))
}
HEAVY = ("torch", "ray", "vllm", "verl", "transformers", "wandb")


def named(mistake: dict[str, Any]) -> str:
    planted = [*mistake["with"], *mistake.get("facts", {})]
    return f"{mistake['code']}-{','.join(planted) or mistake['recipe']}"


def cases(*files: str) -> list[Any]:
    return [pytest.param(m, id=named(m)) for name in files for m in MISTAKES[name]]


def check(report: Report, mistake: dict[str, Any]) -> None:
    severity = mistake.get("severity", "error")
    of_code = [f for f in report.findings if f.code == mistake["code"] and f.severity == severity]
    assert any(mistake["says"] in f.message for f in of_code), report.text()
    assert all(f.cost and f.fix for f in report.findings)
    if severity == "error":
        assert not report.ok


def test_the_corpus_is_large_and_its_mistakes_are_distinct() -> None:
    every = [
        (m["recipe"], *m["with"], str(m.get("facts")), m["code"])
        for ms in MISTAKES.values()
        for m in ms
    ]
    assert len(every) == len(set(every)) >= 100
    assert len({m["code"] for ms in MISTAKES.values() for m in ms}) >= 80


@pytest.mark.parametrize("mistake", cases("recipe"))
def test_a_recipe_that_does_not_load_is_one_finding(mistake: dict[str, Any]) -> None:
    report = examine_file(mistake["recipe"], mistake["with"])
    assert len(report.findings) == 1
    check(report, mistake)


@pytest.mark.parametrize("mistake", cases("training", "engine", "inputs"))
def test_a_planted_mistake_is_found(look: Callable[..., Report], mistake: dict[str, Any]) -> None:
    check(look(mistake["recipe"], *mistake["with"], **mistake.get("facts", {})), mistake)


@pytest.mark.parametrize("recipe", ["laptop", "3b"])
def test_clean_recipes_have_no_finding_except_versions_of_this_host(
    look: Callable[..., Report], tmp_path: Path, recipe: str
) -> None:
    report = look(recipe)
    assert {f.code for f in report.findings} <= {"versions"}, report.text()
    assert report.ok
    assert not (tmp_path / "run").exists()


SHIPPED = [name for name in RECIPES.names if name.startswith("rcot_seg_")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_variants_fit_the_hosts_that_they_name(
    look: Callable[..., Report], name: str
) -> None:
    large = {"gpu_gib": 80.0} if "gpu" in name else {}
    recipe = load_recipe(name)
    address = "cluster.ray_address=auto" if recipe.cluster.nodes > 1 else "seed=1"
    report = look(name, address, gpus=recipe.cluster.gpus_per_node, **large)
    errors = {f.code for f in report.findings if f.severity == "error"}
    not_here = {"inputs.corpus", "inputs.benchmark", "inputs.texts"}
    assert errors <= not_here, report.text()


ABLATIONS = sorted((RECIPES.folder / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablations_have_no_error_on_the_laptop_and_with_the_papers_inputs(
    look: Callable[..., Report], whole_3b: list[str], path: Path
) -> None:
    laptop = look(str(path), "extends=laptop")
    assert laptop.ok and {f.code for f in laptop.findings} <= {"versions"}, laptop.text()
    paper = look(str(path), *whole_3b)
    assert paper.ok, paper.text()


def test_models_that_are_not_here_are_unknown_and_no_error(
    look: Callable[..., Report],
) -> None:
    hub = (
        "models.policy=Qwen/Qwen2.5-VL-3B-Instruct",
        "models.segmenter=facebook/sam2.1-hiera-large",
    )
    report = look("3b", *hub)
    unknown = {f.code for f in report.findings if f.severity == "unknown"}
    assert report.ok and unknown == {"inputs.policy", "inputs.segmenter", "canvas"}
    assert "3754.6 M" in report.plan["parameters"], "the published shapes are known"


def test_the_laptop_recipe_has_no_error_on_this_host(calm: None, tmp_path: Path) -> None:
    report = examine(load_recipe("laptop"), tmp_path / "run")
    assert report.ok, report.text()


def test_a_reward_whose_weights_are_all_0_is_an_error(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    reward = tmp_path / "nothing.yaml"
    reward.write_text("extends: aks\ncomponents: {format: {weight: 0}, accuracy: {weight: 0}}\n")
    codes = {f.code: f.message for f in look("laptop", f"train.grpo-aks.reward={reward}").findings}
    assert str(reward) in codes["grpo-aks.reward_weight"]


def test_a_reward_without_a_route_for_the_stages_rows_is_an_error(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    reward = tmp_path / "routed.yaml"
    reward.write_text("routes: {rcot/ktg: ktg}\n")
    assert "grpo-ktg.reward_task" not in {
        f.code for f in look("laptop", f"train.grpo-ktg.reward={reward}").findings
    }
    codes = {f.code: f.message for f in look("laptop", f"train.grpo-aks.reward={reward}").findings}
    assert "no route for rcot/aks" in codes["grpo-aks.reward_task"]


def test_several_faults_are_reported_together(look: Callable[..., Report]) -> None:
    report = look(
        "3b", "models.segmenter=/nowhere", "train.grpo-aks.top_k=0", "wandb.mode=online", cpus=2
    )
    assert {"inputs.segmenter", "grpo-aks.top_k", "wandb", "placement"} <= {
        f.code for f in report.findings
    }
    last = report.text().splitlines()[-1]
    assert last.startswith(f"{sum(f.severity == 'error' for f in report.findings)} errors")


def test_findings_are_grouped_by_cause_and_each_fix_is_printed_once(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    report = look("rcot_seg_3b", root=tmp_path / "run")
    missing = [f for f in report.findings if f.code in ("inputs.corpus", "inputs.benchmark")]
    assert len(missing) >= 8 and len({f.fix for f in missing}) == 1
    text = report.text()
    assert text.count(missing[0].fix) == 1
    (group,) = [part for part in text.split("\n\n") if missing[0].fix in part]
    assert "error   inputs.corpus, inputs.benchmark\n" in group
    for place in {f.message for f in missing}:
        assert group.count(place) == 1, "each place once"
    for fix in {" ".join(f.fix.split()) for f in report.findings}:
        assert " ".join(text.split()).count(f"fix {fix}") == 1, fix


@pytest.mark.parametrize("explain", [False, True])
def test_derivations_are_printed_on_request_within_80_columns(
    look: Callable[..., Report], tmp_path: Path, explain: bool
) -> None:
    report = look("rcot_seg_3b", root=tmp_path / "run", ram_bytes=2**30, disk_free_bytes=2**30)
    text = report.text(explain=explain)
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    whole = " ".join(text.split())
    for derivation in ("8 Adam) bytes x 3754.6 M", "processes 27.9", "4 Hugging Face"):
        assert (derivation in whole) == explain, derivation
    assert "cluster: a node needs " in whole and "13.99 GiB" in whole
    findings = {f["code"]: f["message"] for f in report.as_dict()["findings"]}
    assert "processes 27.9" in findings["ram"], "JSON always has the derivation"
    assert not any("processes 27.9" in error for error in report.errors)


def test_json_is_one_document_and_errors_set_the_exit_status(
    calm: None, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    good = invoke("preflight", "laptop", "--json", "--out", str(tmp_path / "r"))
    report = json.loads(good.stdout)
    assert good.exit_code == 0 and report["ok"] is True and report["recipe"] == "laptop"
    bad = invoke("preflight", "laptop", "toy=null", "--json")
    first = json.loads(bad.stdout)["findings"][0]
    assert bad.exit_code == 2 and first.keys() == {"code", "severity", "message", "cost", "fix"}


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_each_error_is_also_one_line_on_standard_error(
    calm: None, tmp_path: Path, options: list[str], invoke: Callable[..., Result]
) -> None:
    out = ["--out", str(tmp_path / "r"), *options]
    one = invoke("preflight", "laptop", "train.grpo-aks.reward=ktg", *out)
    assert one.exit_code == 2 and one.stderr.startswith(
        "rcot: train.grpo-aks.reward: ktg is a reward of"
    )
    assert one.stderr.count("\n") == 1 and one.stdout
    both = ["train.grpo-aks.reward=ktg", "models.policy=/nowhere"]
    two = invoke("preflight", "laptop", *both, *out)
    lines = two.stderr.splitlines()
    assert two.exit_code == 2 and lines[0] == "rcot: /nowhere: no such model folder"
    assert len(lines) == 2 and lines[1].startswith(
        "rcot: train.grpo-aks.reward: ktg is a reward of"
    )
    assert invoke("preflight", "laptop", *out).stderr == ""


def test_a_recipe_that_does_not_load_is_reported_as_json_and_as_one_line(
    run_rcot: Callable[..., CompletedProcess[str]],
) -> None:
    command = ("preflight", "laptop", "sead=1")
    plain, as_json = run_rcot(*command), run_rcot(*command, "--json")
    expected = "rcot: command line: sead: unknown key; did you mean seed?\n"
    assert (plain.returncode, plain.stdout, plain.stderr) == (2, "", expected)
    report = json.loads(as_json.stdout)
    assert (as_json.returncode, as_json.stderr) == (2, expected)
    assert [f["code"] for f in report["findings"]] == ["recipe.unknown_key"]
    assert report["ok"] is False


def test_gpu_memory_comes_from_the_option_the_host_or_the_paper(
    look: Callable[..., Report],
) -> None:
    small = look("3b", asked_gpu_gib=20)
    assert "20 GiB (--gpu-gib)" in small.plan["GPU"] and not small.ok
    assert "48 GiB (nvidia-smi" in look("3b").plan["GPU"]
    assumed = look("3b", gpu_gib=None, gpus=None)
    assert "48 GiB (the paper's; none seen here" in assumed.plan["GPU"]
    unseen = [f for f in assumed.findings if f.code == "devices"]
    assert [f.severity for f in unseen] == ["unknown"] and assumed.ok


@pytest.mark.parametrize("recipe", ["laptop", "rcot_seg_3b"])
def test_no_heavy_package_is_imported(
    tmp_path: Path, recipe: str, run_python: Callable[..., str]
) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.preflight.plan import examine_file; "
        f"examine_file({recipe!r}, [], Path({str(tmp_path / 'x')!r})); "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_every_code_is_documented_and_planted() -> None:
    here = Path(__file__).parent
    stage = re.compile(r"^(sft|grpo-[a-z]+|predict|<stage>)\.")
    page = (here.parents[2] / "docs" / "preflight.md").read_text()
    documented = {stage.sub("", c) for c in re.findall(r"`([a-z<][a-z_.<>-]*)`", page)}
    planted = {stage.sub("", m["code"]) for ms in MISTAKES.values() for m in ms}
    assert planted <= documented, planted - documented
    sources = "".join(
        p.read_text() for p in (here.parents[2] / "cluster" / "preflight" / "checks").glob("*.py")
    )
    raised = set(re.findall(r'f"\{(?:s\.)?stage\}\.([a-z_]+)",', sources))
    raised |= set(re.findall(r'notes\.\w+\(\s*"([a-z_.]+)",', sources))
    raised = {stage.sub("", code) for code in raised}
    assert len(raised) > 60
    assert raised <= documented, raised - documented
    modules = ("test_plan.py", "test_host.py", "test_built_shards.py", "test_stages.py")
    tests = "".join((here / name).read_text() for name in modules)
    unplanted = {c for c in raised - planted if f".{c}" not in tests and f'"{c}"' not in tests}
    assert not unplanted


_SETTING = re.compile(
    r"\b[a-z][a-z0-9_]*(?:\.[a-zA-Z0-9_-]+)+=[^\s,;]+|\b[a-z_]+\.[a-z_]+=\[[^]]*\]"
)


def advised(mistake: dict[str, Any], report: Report) -> list[str]:
    """Return the settings that the fix of the planted mistake's finding names."""
    severity = mistake.get("severity", "error")
    fixes = [
        f.fix
        for f in report.findings
        if f.code == mistake["code"] and f.severity == severity and mistake["says"] in f.message
    ]
    return [setting for fix in fixes[:1] for setting in _SETTING.findall(fix.partition(", or ")[0])]


@pytest.mark.parametrize("mistake", cases("training", "engine", "inputs"))
def test_a_fix_that_is_a_setting_removes_its_finding(
    look: Callable[..., Report], mistake: dict[str, Any]
) -> None:
    planted = [*mistake["with"]]
    settings = advised(mistake, look(mistake["recipe"], *planted, **mistake.get("facts", {})))
    if not settings:
        return
    fixed = look(mistake["recipe"], *planted, *settings, **mistake.get("facts", {}))
    left = [f for f in fixed.findings if f.code == mistake["code"]]
    assert not [f for f in left if mistake["says"] in f.message], settings


@pytest.mark.parametrize(("gpus", "cpus"), [(8, 40), (8, 26), (4, 14), (4, 6), (1, 2), (1, 4)])
def test_the_fix_for_too_few_cpus_suffices(
    look: Callable[..., Report], gpus: int, cpus: int
) -> None:
    def placement(*settings: str, cpus: int) -> list[str]:
        batches = (
            "train.sft.batch_size=840",
            "grpo.prompts_per_step=840",
            "grpo.micro_batch_size=1",
            "train.sft.micro_batch_size=1",
        )
        count = f"cluster.gpus_per_node={gpus}"
        findings = look("3b", *batches, count, *settings, cpus=cpus, gpus=gpus).findings
        return [f.fix for f in findings if (f.code, f.severity) == ("placement", "error")]

    for fix in placement(cpus=cpus):
        settings, _, host = fix.partition(", or ")
        if settings.startswith("cluster."):
            assert not placement(*settings.split(" and "), cpus=cpus), fix
        else:
            host = fix
        if host:
            more = int(re.findall(r"host of (\d+) CPUs", host)[0])
            one = "cluster.queue_storage_units=1"
            assert placement(one, cpus=more - 1) and not placement(one, cpus=more), fix


def test_clips_too_long_for_the_context_are_planned_and_are_no_error(look, tmp_path) -> None:
    """A clip of 1,000 frames, at the 3B recipe's settings."""
    write_corpus(tmp_path / "mevis", "mevis", "valid_u", 2, 1, "lattice")
    file = tmp_path / "mevis" / "valid_u" / "meta_expressions.json"
    meta = json.loads(file.read_text())
    first = next(iter(meta["videos"].values()))
    first["frames"] = [f"{i:05d}" for i in range(1000)]
    file.write_text(json.dumps(meta))
    benchmark = {"dataset": "mevis", "root": str(tmp_path / "mevis"), "split": "valid_u"}
    report = look("3b", f"eval.benchmarks={json.dumps([benchmark])}")
    assert not [f for f in report.findings if f.code.startswith("predict")]
    line = report.plan["predict: mevis-valid_u"]
    assert line.startswith("2 clips, the longest has 1000 frames; 1 are thinned uniformly to ")
    shown = int(line.split("uniformly to ")[1].split(";")[0])
    assert 200 < shown < 256  # 32,768 tokens hold 256 frames, if nothing is said about them
