"""Submit a run to a Ray cluster that is already running, by Ray Jobs.

The code that git tracks is shipped, with uncommitted edits, together with the distribution's
metadata: a node that does not have this project then finds verl's plug-in entry point, and the
health check verifies it before the run starts. Runs, environments and data are not shipped: RUN,
corpora and models must be below `launch.workdir`, where every node finds them. A recipe that is
the user's own file is shipped resolved.

Secrets reach the job as environment variables of the request: everyone who can open that cluster's
dashboard can read them. `--dry-run` shows their names only.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast, get_args

from cluster.launch import render
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import dump_for_driver
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system import checkout
from rcot_rl.system.checkout import tracked_files
from rcot_rl.system.doctor import pins

_RECIPE = "launched-recipe.yaml"
_RECIPE_MARK = "launched_recipe_mark"
SECRET = "<from this environment>"
"""Stands for a secret's value in a request."""

_AGENT_S = 60.0
"""Seconds that a new cluster may take to accept jobs."""

_EndState = Literal["SUCCEEDED", "FAILED", "STOPPED"]


@dataclass(frozen=True)
class JobRequest:
    """A job as it is submitted, without the values of secrets."""

    address: str
    entrypoint: str
    working_dir: str
    recipe: str | None
    """The resolved recipe, if it is shipped as a file."""
    runtime_env: dict[str, Any]
    entrypoint_num_cpus: float
    entrypoint_resources: dict[str, float]
    metadata: dict[str, str]
    files: int
    """Number of shipped files."""
    bytes: int
    """Their size."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, for `--dry-run`."""
        return dict(vars(self))


def request(recipe: Recipe, recipe_name: str, overrides: Sequence[str] = ()) -> JobRequest:
    """Build the job of a run. Raises InputError."""
    settings, nodes = recipe.launch.ray, recipe.cluster.nodes
    python, workdir = settings.python, render.workdir_of(recipe)
    run = render.run_folder(recipe, workdir)
    files = tracked_files(render.CHECKOUT)
    size = sum(p.lstat().st_size for p in files)
    if size > settings.max_upload_mib * 2**20:
        raise InputError(
            f"the tracked files have {size / 2**20:.0f} MiB; {settings.max_upload_mib} MiB are "
            "allowed",
            key="launch.ray.max_upload_mib",
        )
    health = render.health_options(recipe, run.parent, nodes, nodes)
    is_file = Path(recipe_name).is_file()
    # the shell fills in where Ray unpacked the code; everything else is quoted
    command = render.run_command(python, _RECIPE_MARK if is_file else recipe_name, overrides, run)
    words = [python, "-m", "cluster.launch.head", f"--chdir={workdir}", *health, "--", *command]
    entrypoint = shlex.join(words)
    if is_file:
        entrypoint = entrypoint.replace(_RECIPE_MARK, f'"$PWD"/{_RECIPE}', 1)
    variables = {
        "RCOT_RL_PLUGIN": "required",
        "RAY_USAGE_STATS_ENABLED": "0",
        checkout.VARIABLE: checkout.commit_of(render.CHECKOUT),  # the shipped code has no .git
    }
    variables |= recipe.launch.environment | dict.fromkeys(recipe.launch.secrets, SECRET)
    runtime: dict[str, Any] = {"env_vars": variables}
    if settings.packages == "uv":
        runtime["uv"] = {"packages": locked_packages(recipe.device)}
    return JobRequest(
        address=settings.address,
        entrypoint=entrypoint,
        working_dir=str(render.CHECKOUT),
        recipe=dump_for_driver(recipe) if is_file else None,
        runtime_env=runtime,
        entrypoint_num_cpus=settings.entrypoint_cpus,
        entrypoint_resources=dict(settings.entrypoint_resources),
        metadata={"recipe": recipe.name, "run": str(run)},
        files=len(files),
        bytes=size,
    )


def submit(recipe: Recipe, job: JobRequest, show: Callable[[str], None]) -> int:
    """Submit a job and follow it to its end.

    Ctrl-C stops the job: without a follower it would keep the cluster allocated. Raises InputError.

    Returns:
        0 if the job succeeded, else 1.
    """
    render.check_environment(recipe)
    secrets = {name: os.environ[name] for name in recipe.launch.secrets}
    client = _client(job.address)
    with staged(Path(job.working_dir), job.recipe) as folder:
        runtime = job.runtime_env | {"working_dir": str(folder)}
        runtime["env_vars"] = job.runtime_env["env_vars"] | secrets
        job_id = _submit_once_ready(client, job, runtime)
    show(f"job {job_id} at {job.address}")
    try:
        status = _follow(client, job_id, show)
    except KeyboardInterrupt:
        client.stop_job(job_id)
        show(f"job {job_id} stopped; launch it again to resume")
        raise
    message = (client.get_job_info(job_id).message or "").partition("\n")[0]  # the log was shown
    show(f"job {job_id}: {status} {message}".rstrip())
    return 0 if status == "SUCCEEDED" else 1


def _submit_once_ready(client: Any, job: JobRequest, runtime: dict[str, Any]) -> str:
    """Submit a job and return its id; retry while a new cluster has no agent for jobs."""
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=job.entrypoint,
                    runtime_env=runtime,
                    metadata=job.metadata,
                    entrypoint_num_cpus=job.entrypoint_num_cpus,
                    entrypoint_resources=job.entrypoint_resources or None,
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                last = str(error).strip().splitlines()[-1]
                raise InputError(f"Ray refused the job: {last}", key="launch.ray") from error
            time.sleep(2)


@contextmanager
def staged(code: Path, recipe: str | None) -> Iterator[Path]:
    """Stage what is shipped in a temporary folder.

    Args:
        code: A checkout, whose tracked files are shipped.
        recipe: Text of a resolved recipe to ship.
    """
    with TemporaryDirectory(prefix="rcot-ship-") as name:
        folder = Path(name)
        for file in tracked_files(code):
            target = folder / file.relative_to(code)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        version = importlib.metadata.version("rcot-rl")
        metadata = folder / f"rcot_rl-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: rcot-rl\nVersion: {version}\n", encoding="utf-8"
        )
        (metadata / "entry_points.txt").write_text(
            "[verl.plugins]\nrcot_rl = rcot_rl.plugin\n", encoding="utf-8"
        )
        if recipe is not None:
            (folder / _RECIPE).write_text(recipe, encoding="utf-8")
        yield folder


def locked_packages(device: str) -> list[str]:
    """Return `name==version` of every package in the lock file of a device. Raises InputError."""
    lock = render.CHECKOUT / "requirements" / f"{'cpu' if device == 'cpu' else 'gpu'}.lock"
    try:
        return sorted(f"{name}=={version}" for name, version in pins(lock).items())
    except OSError as error:
        raise InputError("there is no lock file", file=lock) from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(
            f"no Ray answers at {address}: {last}", key="launch.ray.address"
        ) from error


def _follow(client: Any, job_id: str, show: Callable[[str], None]) -> _EndState:
    """Show new lines of a job's log until it ends. A lost connection is retried."""
    shown, failures = 0, 0
    while True:
        try:
            status = client.get_job_status(job_id).value
            log = client.get_job_logs(job_id)
            failures = 0
        except (ConnectionError, RuntimeError) as error:
            failures += 1
            if failures > 60:
                raise InputError(
                    f"lost the cluster: {error}; the job continues", key="launch.ray.address"
                ) from error
            time.sleep(5)
            continue
        ended = status in get_args(_EndState)
        complete = log if ended else log[: log.rfind("\n") + 1]
        for line in complete[shown:].splitlines():
            show(line)
        shown = max(shown, len(complete))
        if ended:
            return cast(_EndState, status)
        time.sleep(1)
