"""Ray Jobs' request and the RayJob's manifest: what would be submitted."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.launch import kuberay, local, ray_jobs
from rcot_rl.cli.main import app
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe, recipe_hash

NASTY = "models.policy=a 'b' $(touch pwned)\n`x`"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[MGTP]|[KMGTP]i)?")


def rayjob(*overrides):
    objects = kuberay.manifest(load_recipe("rcot_seg_3b", overrides))
    parsed = list(yaml.safe_load_all(kuberay.text(objects)))
    assert parsed == objects
    return {o["kind"]: o for o in parsed}


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def words_of(command: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f'printf "%s\\0" {command}'], capture_output=True, cwd=cwd, check=True
    )
    return [word.decode() for word in done.stdout.split(b"\0")[:-1]]


def test_ray_dry_run_is_json_and_overrides_stay_literal(tmp_path):
    done = CliRunner().invoke(app, ["launch", "ray", "rcot_seg_3b", NASTY, "--dry-run"])
    assert done.exit_code == 0
    made = json.loads(done.stdout)
    words = words_of(made["entrypoint"], tmp_path)
    assert NASTY in words and words[-1] == "cluster.ray_address=auto"
    assert list(tmp_path.iterdir()) == []
    assert made["runtime_env"]["env_vars"]["RCOT_RL_PLUGIN"] == "required"


def test_the_driver_can_be_placed_where_its_stages_have_gpus():
    asked = "launch.ray.entrypoint_resources={accelerator_type:H100: 0.001}"
    made = ray_jobs.request(load_recipe("rcot_seg_3b", [asked]), "rcot_seg_3b")
    assert made.entrypoint_resources == {"accelerator_type:H100": 0.001}
    assert "--driver-gpus=4" in shlex.split(made.entrypoint), "and it is asked before the run"
    alone = ray_jobs.request(load_recipe("rcot_seg_3b", ["stages=[grpo-aks]"]), "rcot_seg_3b")
    assert "driver-gpus" not in alone.entrypoint and alone.entrypoint_resources == {}


def test_ones_own_recipe_is_shipped_resolved(tmp_path):
    path = tmp_path / "it's mine.yaml"
    path.write_text(
        "extends: " + str(Path("recipes/rcot_seg_3b.yaml").resolve()) + "\nname: mine\n"
    )
    made = ray_jobs.request(load_recipe(path), str(path))
    assert yaml.safe_load(made.recipe)["name"] == "mine"
    words = words_of(made.entrypoint, tmp_path)
    assert f"{tmp_path}/launched-recipe.yaml" in words  # where the job starts


def test_a_secrets_value_is_not_in_the_request(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-value")
    recipe = load_recipe("rcot_seg_3b", ["launch.secrets=[WANDB_API_KEY]"])
    made = ray_jobs.request(recipe, "rcot_seg_3b")
    assert "hunter2" not in json.dumps(made.as_dict())
    assert made.runtime_env["env_vars"]["WANDB_API_KEY"] == ray_jobs.SECRET


def test_what_is_shipped_is_what_git_tracks_and_carries_the_entry_point(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "secret.env").write_text("2")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.yaml").write_text("3")
    (tmp_path / "away.py").write_text("4")
    git("add", "code.py", "sub", "away.py")
    (tmp_path / "away.py").unlink()
    with ray_jobs.staged(tmp_path, "name: x\n") as folder:
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        info = next(folder.glob("*.dist-info"))
        shipped = importlib.metadata.PathDistribution(info)
        assert [e.value for e in shipped.entry_points] == ["rcot_rl.plugin"]
        assert shipped.metadata["Name"] == "rcot-rl"
    names = {n for n in found if ".dist-info" not in n}
    assert names == {"code.py", "sub/a b.yaml", "launched-recipe.yaml"}
    assert not folder.exists()


def test_code_that_weighs_too_much_is_refused():
    recipe = load_recipe("rcot_seg_3b", ["launch.ray.max_upload_mib=1"])
    with pytest.raises(InputError, match="max_upload_mib"):
        ray_jobs.request(recipe, "rcot_seg_3b")


def test_locked_packages_can_be_asked_of_ray():
    recipe = load_recipe("rcot_seg_3b", ["launch.ray.packages=uv"])
    packages = ray_jobs.request(recipe, "rcot_seg_3b").runtime_env["uv"]["packages"]
    assert "verl==0.9.1" in packages and "vllm==0.24.0" in packages
    lock = Path("requirements/gpu.lock").read_text()
    assert len(packages) == len(re.findall(r"^[A-Za-z0-9]", lock, re.MULTILINE))


class FakeClient:
    """Ray's client, with a log that grows."""

    def __init__(self, logs, end="SUCCEEDED"):
        self._logs, self._end, self.stopped = list(logs), end, False

    def get_job_status(self, job):
        status = self._end if len(self._logs) == 1 else "RUNNING"
        return type("S", (), {"value": status})

    def get_job_logs(self, job):
        got = self._logs[0] if len(self._logs) == 1 else self._logs.pop(0)
        if isinstance(got, Exception):
            raise got
        return got


def test_a_cluster_without_an_agent_yet_is_asked_again_and_a_refusal_is_told(monkeypatch):
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda s: None)
    made = ray_jobs.request(load_recipe("laptop"), "laptop")
    answers = [RuntimeError("status code 500: No available agent to submit job"), "job-1"]

    class Client:
        def submit_job(self, **asked):
            assert asked["entrypoint"] == made.entrypoint and asked["entrypoint_resources"] is None
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert ray_jobs._submitted(Client(), made, {}) == "job-1"
    answers.append(RuntimeError("status code 400: bad runtime_env"))
    with pytest.raises(InputError, match="refused the job: status code 400: bad runtime_env"):
        ray_jobs._submitted(Client(), made, {})


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_following_shows_every_line_once(monkeypatch, end):
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda s: None)
    lost = ConnectionError("gone for a moment")
    client = FakeClient(["", "a\nb", lost, "a\nbb\nc", "a\nbb\nc\nlast"], end)
    shown = []
    assert ray_jobs._follow(client, "j", shown.append) == end
    assert shown == ["a", "bb", "c", "last"]


def test_rayjob_structure():
    found = rayjob("cluster.nodes=2", "launch.kuberay.claim_size=2Ti")
    job = found["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    spec, groups = job["spec"], job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["gpu", "cpu"]
    assert [g["replicas"] for g in groups] == [2, 1]
    for key in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        assert isinstance(spec[key], int)
    assert spec["submissionMode"] == "K8sJobMode" and spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    claim = found["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for item in found.values():
        assert LABEL.fullmatch(item["metadata"]["name"])
        assert len(item["metadata"]["name"]) <= 47  # KubeRay's limit for a RayJob
    for name, pod in pods(job):
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["run"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes["recipe"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        assert all(QUANTITY.fullmatch(v) for v in resources["limits"].values())
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == set(volumes)


def test_the_driver_runs_where_its_stages_have_gpus():
    with_sft = rayjob()["RayJob"]["spec"]
    wanted = json.loads(with_sft["entrypointResources"])
    gpu = with_sft["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]
    # what the shell that KubeRay hands it to makes of it
    assert json.loads(shlex.split(gpu["resources"])[0]) == wanted
    without = rayjob("stages=[grpo-aks]")["RayJob"]["spec"]
    assert "entrypointResources" not in without


def test_secrets_are_references_and_placement_is_the_recipes():
    toleration = "{key: nvidia.com/gpu, effect: NoSchedule}"
    job = rayjob(
        "launch.secrets=[WANDB_API_KEY]", "launch.kuberay.secret=keys",
        "launch.kuberay.env_from=[more]", "launch.kuberay.gpu.node_selector={pool: h100}",
        f"launch.kuberay.gpu.tolerations=[{toleration}]",
    )["RayJob"]  # fmt: skip
    for name, pod in pods(job):
        entries = {e["name"]: e for e in pod["containers"][0]["env"]}
        reference = {"name": "keys", "key": "WANDB_API_KEY"}
        assert entries["WANDB_API_KEY"] == {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": reference},
        }
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "more"}}]
        assert (pod.get("nodeSelector") == {"pool": "h100"}) == (name == "gpu")
        assert ("tolerations" in pod) == (name == "gpu")


def test_the_recipe_travels_as_data_and_no_text_of_it_reaches_the_shell():
    found = rayjob(NASTY)
    inside = yaml.safe_load(found["ConfigMap"]["data"]["recipe.yaml"])
    assert inside["models"]["policy"] == NASTY.partition("=")[2].replace("\n", " ")
    assert "touch" not in found["RayJob"]["spec"]["entrypoint"]
    assert set(inside["launch"]) == {"health"}, "how it was launched is no business of the driver's"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("launch.run_dir=/elsewhere/run", "launch.run_dir"),
        ("launch.run_dir='$(x)'", "launch.run_dir"),
        ("launch.workdir=/home/me", "launch.workdir"),
        ("launch.kuberay.claim=Not_A_Name", "launch.kuberay.claim"),
        ("launch.kuberay.gpu.memory=lots", "launch.kuberay.gpu.memory"),
        ("launch.kuberay.namespace='-x'", "launch.kuberay.namespace"),
        ("launch.kuberay.submission=Later", "launch.kuberay.submission"),
        ("launch.kuberay.gpu.tolerations=[{key: a, operator: Equal}]",
         "launch.kuberay.gpu.tolerations.0"),
    ],
)  # fmt: skip
def test_bad_kuberay_settings_are_named(override, key):
    with pytest.raises(InputError) as caught:
        rayjob(override)
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["A.B_C", "rcot-x", "x" * 200, "a-" * 60])
def test_names_are_rfc_1123(name):
    made = kuberay.object_name(name)
    assert LABEL.fullmatch(made) and len(made) <= 47


def test_local_refuses_several_hosts():
    with pytest.raises(InputError) as caught:
        local.preflight(load_recipe("rcot_seg_3b", ["cluster.nodes=2"]))
    assert caught.value.key == "cluster.nodes"


def test_out_goes_with_dry_run(tmp_path):
    done = CliRunner().invoke(app, ["launch", "kuberay", "rcot_seg_3b", "--out", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    done = CliRunner().invoke(
        app, ["launch", "kuberay", "rcot_seg_3b", "--dry-run", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0
    assert "RayJob" in (tmp_path / "rayjob.yaml").read_text()


FOR_DRIVERS = ["supervise.max_attempts=2", "supervise.heartbeat_s=77", "launch.health.wait_s=99"]


def test_what_is_done_about_failures_travels_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: rcot_seg_3b.yaml\n")
    shipped = [
        ray_jobs.request(load_recipe(path, FOR_DRIVERS), str(path)).recipe,
        rayjob(*FOR_DRIVERS)["ConfigMap"]["data"]["recipe.yaml"],
    ]
    plain = load_recipe("rcot_seg_3b")
    for text in shipped:
        there = tmp_path / "there.yaml"
        there.write_text(text)
        found = load_recipe(there)
        assert (found.supervise.max_attempts, found.supervise.heartbeat_s) == (2, 77)
        assert found.launch.health.wait_s == 99
        assert recipe_hash(found) == recipe_hash(plain), "it is the same run"


def test_a_local_launch_has_its_environment_and_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_SETTING", raising=False)
    before = Path.cwd()
    settings = ["launch.environment.MY_SETTING=here", f"launch.workdir={tmp_path}"]
    with local.surroundings(load_recipe("laptop", settings)):
        assert os.environ["MY_SETTING"] == "here" and Path.cwd() == tmp_path
    assert "MY_SETTING" not in os.environ and Path.cwd() == before
    missing = load_recipe("laptop", ["launch.workdir=/nowhere/at/all"])
    with pytest.raises(InputError) as caught, local.surroundings(missing):
        pass
    assert caught.value.key == "launch.workdir"


@pytest.mark.parametrize(
    ("launcher", "override", "key"),
    [
        ("slurm", "launch.slurm.cpus_per_node=8", "launch.slurm.cpus_per_node"),
        ("slurm", "launch.slurm.cpus_per_node=20", "launch.slurm.cpus_per_node"),
        ("kuberay", "launch.kuberay.gpu.cpu=8", "launch.kuberay.gpu.cpu"),
        ("kuberay", "launch.kuberay.gpu.cpu=11500m", "launch.kuberay.gpu.cpu"),
    ],
)
def test_nodes_too_small_for_verl_are_refused(launcher, override, key):
    """3 CPUs a GPU on each node, and one each for the storage units and their controller."""
    done = CliRunner().invoke(app, ["launch", launcher, "rcot_seg_3b", override, "--dry-run"])
    assert isinstance(done.exception, InputError) and done.exception.key == key
    enough = ["launch.slurm.cpus_per_node=21", "launch.kuberay.gpu.cpu=12"]
    done = CliRunner().invoke(app, ["launch", launcher, "rcot_seg_3b", *enough, "--dry-run"])
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("TOKENIZERS_PARALLELISM", False), ("KEYBOARD", False), ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True), ("API_KEYS", True), ("MYAPIKEY", False),
    ],
)  # fmt: skip
def test_names_that_read_like_secrets(name, secret):
    if secret:
        with pytest.raises(InputError, match="reads like a secret"):
            load_recipe("laptop", [f"launch.environment.{name}=x"])
    else:
        load_recipe("laptop", [f"launch.environment.{name}=x"])


def test_one_setting_of_the_gpu_pods_leaves_the_others():
    job = rayjob("launch.kuberay.gpu.node_selector={pool: h100}")["RayJob"]
    (pod,) = (pod for name, pod in pods(job) if name == "gpu")
    limits = pod["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["memory"]) == ("32", "256Gi")
    assert pod["nodeSelector"] == {"pool": "h100"}
