"""The requests to Ray Jobs and the manifests for KubeRay."""

import importlib.metadata
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.launch import kuberay, ray_jobs
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe, recipe_hash

NASTY = "models.policy=a 'b' $(touch pwned)\n`x`"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[MGTP]|[KMGTP]i)?")


def objects_of(*overrides):
    """Return the rendered objects by their kind."""
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


def test_ray_dry_run_is_json_and_overrides_stay_literal(tmp_path, invoke):
    done = invoke("launch", "ray", "rcot_seg_3b", NASTY, "--dry-run")
    assert done.exit_code == 0
    request = json.loads(done.stdout)
    words = words_of(request["entrypoint"], tmp_path)
    assert NASTY in words and words[-1] == "cluster.ray_address=auto"
    assert list(tmp_path.iterdir()) == []
    assert request["runtime_env"]["env_vars"]["RCOT_RL_PLUGIN"] == "required"


def test_entrypoint_resources_place_the_driver_and_its_gpus_are_checked():
    placement = "launch.ray.entrypoint_resources={accelerator_type:H100: 0.001}"
    request = ray_jobs.request(load_recipe("rcot_seg_3b", [placement]), "rcot_seg_3b")
    assert request.entrypoint_resources == {"accelerator_type:H100": 0.001}
    assert "--driver-gpus=4" in shlex.split(request.entrypoint)
    alone = ray_jobs.request(load_recipe("rcot_seg_3b", ["stages=[grpo-aks]"]), "rcot_seg_3b")
    assert "driver-gpus" not in alone.entrypoint and alone.entrypoint_resources == {}


def test_a_users_recipe_file_is_shipped_resolved(tmp_path):
    path = tmp_path / "it's mine.yaml"
    path.write_text(
        "extends: " + str(Path("recipes/rcot_seg_3b.yaml").resolve()) + "\nname: mine\n"
    )
    request = ray_jobs.request(load_recipe(path), str(path))
    assert yaml.safe_load(request.recipe)["name"] == "mine"
    words = words_of(request.entrypoint, tmp_path)
    assert f"{tmp_path}/launched-recipe.yaml" in words  # where the job starts


def test_a_secrets_value_is_not_in_the_request(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-value")
    recipe = load_recipe("rcot_seg_3b", ["launch.secrets=[WANDB_API_KEY]"])
    request = ray_jobs.request(recipe, "rcot_seg_3b")
    assert "hunter2" not in json.dumps(request.as_dict())
    assert request.runtime_env["env_vars"]["WANDB_API_KEY"] == ray_jobs.SECRET


def test_tracked_files_are_shipped_with_the_entry_point(tmp_path):
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
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        info = next(folder.glob("*.dist-info"))
        shipped = importlib.metadata.PathDistribution(info)
        assert [e.value for e in shipped.entry_points] == ["rcot_rl.plugin"]
        assert shipped.metadata["Name"] == "rcot-rl"
    names = {n for n in files if ".dist-info" not in n}
    assert names == {"code.py", "sub/a b.yaml", "launched-recipe.yaml"}
    assert not folder.exists()


def test_code_larger_than_max_upload_mib_is_refused():
    recipe = load_recipe("rcot_seg_3b", ["launch.ray.max_upload_mib=1"])
    with pytest.raises(InputError, match="max_upload_mib"):
        ray_jobs.request(recipe, "rcot_seg_3b")


def test_packages_uv_lists_every_locked_package():
    recipe = load_recipe("rcot_seg_3b", ["launch.ray.packages=uv"])
    packages = ray_jobs.request(recipe, "rcot_seg_3b").runtime_env["uv"]["packages"]
    assert "verl==0.9.1" in packages and "vllm==0.24.0" in packages
    lock = Path("requirements/gpu.lock").read_text()
    assert len(packages) == len(re.findall(r"^[A-Za-z0-9]", lock, re.MULTILINE))


class FakeClient:
    """Ray's client, for a job whose log grows."""

    def __init__(self, logs, end="SUCCEEDED"):
        self._logs, self._end, self.stopped = list(logs), end, False

    def get_job_status(self, job):
        status = self._end if len(self._logs) == 1 else "RUNNING"
        return type("S", (), {"value": status})

    def get_job_logs(self, job):
        log = self._logs[0] if len(self._logs) == 1 else self._logs.pop(0)
        if isinstance(log, Exception):
            raise log
        return log


def test_a_cluster_without_an_agent_is_asked_again_and_a_refusal_is_raised(monkeypatch):
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda s: None)
    request = ray_jobs.request(load_recipe("laptop"), "laptop")
    answers = [RuntimeError("status code 500: No available agent to submit job"), "job-1"]

    class Client:
        def submit_job(self, **job):
            assert job["entrypoint"] == request.entrypoint
            assert job["entrypoint_resources"] is None
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert ray_jobs._submit_once_ready(Client(), request, {}) == "job-1"
    answers.append(RuntimeError("status code 400: bad runtime_env"))
    with pytest.raises(InputError, match="refused the job: status code 400: bad runtime_env"):
        ray_jobs._submit_once_ready(Client(), request, {})


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_following_shows_every_line_once(monkeypatch, end):
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda s: None)
    lost = ConnectionError("gone for a moment")
    client = FakeClient(["", "a\nb", lost, "a\nbb\nc", "a\nbb\nc\nlast"], end)
    shown = []
    assert ray_jobs._follow(client, "j", shown.append) == end
    assert shown == ["a", "bb", "c", "last"]


def test_pods_claim_and_resources_of_a_rayjob():
    objects = objects_of("cluster.nodes=2", "launch.kuberay.claim_size=2Ti")
    job = objects["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    spec, groups = job["spec"], job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["gpu", "cpu"]
    assert [g["replicas"] for g in groups] == [2, 1]
    for key in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        assert isinstance(spec[key], int)
    assert spec["submissionMode"] == "K8sJobMode" and spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    claim = objects["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for item in objects.values():
        assert LABEL.fullmatch(item["metadata"]["name"])
        assert len(item["metadata"]["name"]) <= 47  # KubeRay's limit for a RayJob
    for name, pod in pods(job):
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["run"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes["recipe"]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        assert all(QUANTITY.fullmatch(v) for v in resources["limits"].values())
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == set(volumes)


def test_the_driver_runs_in_a_gpu_pod_if_its_stages_need_gpus():
    with_sft = objects_of()["RayJob"]["spec"]
    placement = json.loads(with_sft["entrypointResources"])
    gpu = with_sft["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]
    # KubeRay passes the value to a shell
    assert json.loads(shlex.split(gpu["resources"])[0]) == placement
    without = objects_of("stages=[grpo-aks]")["RayJob"]["spec"]
    assert "entrypointResources" not in without


def test_secrets_are_references_and_gpu_pods_are_placed_by_the_recipe():
    toleration = "{key: nvidia.com/gpu, effect: NoSchedule}"
    job = objects_of(
        "launch.secrets=[WANDB_API_KEY]",
        "launch.kuberay.secret=keys",
        "launch.kuberay.env_from=[more]",
        "launch.kuberay.gpu.node_selector={pool: h100}",
        f"launch.kuberay.gpu.tolerations=[{toleration}]",
    )["RayJob"]
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


def test_the_recipe_is_data_and_none_of_its_text_reaches_a_shell():
    objects = objects_of(NASTY)
    inside = yaml.safe_load(objects["ConfigMap"]["data"]["recipe.yaml"])
    assert inside["models"]["policy"] == NASTY.partition("=")[2].replace("\n", " ")
    assert "touch" not in objects["RayJob"]["spec"]["entrypoint"]
    assert set(inside["launch"]) == {"health"}, "the driver does not need the rest"


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
        (
            "launch.kuberay.gpu.tolerations=[{key: a, operator: Equal}]",
            "launch.kuberay.gpu.tolerations.0",
        ),
    ],
)
def test_bad_kuberay_settings_are_named(override, key):
    with pytest.raises(InputError) as caught:
        objects_of(override)
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["A.B_C", "rcot-x", "x" * 200, "a-" * 60])
def test_object_names_follow_rfc_1123(name):
    label = kuberay.object_name(name)
    assert LABEL.fullmatch(label) and len(label) <= 47


def test_out_requires_dry_run(tmp_path, invoke):
    done = invoke("launch", "kuberay", "rcot_seg_3b", "--out", str(tmp_path))
    assert isinstance(done.exception, InputError)
    done = invoke("launch", "kuberay", "rcot_seg_3b", "--dry-run", "--out", str(tmp_path))
    assert done.exit_code == 0
    assert "RayJob" in (tmp_path / "rayjob.yaml").read_text()


FOR_DRIVERS = ["supervise.max_attempts=2", "supervise.heartbeat_s=77", "launch.health.wait_s=99"]


def test_supervise_and_health_settings_reach_the_driver(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: rcot_seg_3b.yaml\n")
    shipped = [
        ray_jobs.request(load_recipe(path, FOR_DRIVERS), str(path)).recipe,
        objects_of(*FOR_DRIVERS)["ConfigMap"]["data"]["recipe.yaml"],
    ]
    plain = load_recipe("rcot_seg_3b")
    for text in shipped:
        copy = tmp_path / "copy.yaml"
        copy.write_text(text)
        loaded = load_recipe(copy)
        assert (loaded.supervise.max_attempts, loaded.supervise.heartbeat_s) == (2, 77)
        assert loaded.launch.health.wait_s == 99
        assert recipe_hash(loaded) == recipe_hash(plain), "it is the same run"


@pytest.mark.parametrize(
    ("launcher", "override", "key"),
    [
        ("slurm", "launch.slurm.cpus_per_node=8", "launch.slurm.cpus_per_node"),
        ("slurm", "launch.slurm.cpus_per_node=20", "launch.slurm.cpus_per_node"),
        ("kuberay", "launch.kuberay.gpu.cpu=8", "launch.kuberay.gpu.cpu"),
        ("kuberay", "launch.kuberay.gpu.cpu=11500m", "launch.kuberay.gpu.cpu"),
    ],
)
def test_nodes_too_small_for_verl_are_refused(launcher, override, key, invoke):
    """verl needs 3 CPUs per GPU, and one for each storage unit and their controller."""
    done = invoke("launch", launcher, "rcot_seg_3b", override, "--dry-run")
    assert isinstance(done.exception, InputError) and done.exception.key == key
    enough = ["launch.slurm.cpus_per_node=21", "launch.kuberay.gpu.cpu=12"]
    done = invoke("launch", launcher, "rcot_seg_3b", *enough, "--dry-run")
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("API_KEYS", True),
        ("MYAPIKEY", False),
    ],
)
def test_names_of_secrets_are_recognized(name, secret):
    if secret:
        with pytest.raises(InputError, match="looks like a secret"):
            load_recipe("laptop", [f"launch.environment.{name}=x"])
    else:
        load_recipe("laptop", [f"launch.environment.{name}=x"])


def test_one_setting_of_the_gpu_pods_keeps_the_other_defaults():
    job = objects_of("launch.kuberay.gpu.node_selector={pool: h100}")["RayJob"]
    (pod,) = (pod for name, pod in pods(job) if name == "gpu")
    limits = pod["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["memory"]) == ("32", "256Gi")
    assert pod["nodeSelector"] == {"pool": "h100"}
