"""`rcot launch ray`: Ray Jobs, to a cluster that runs already.

What is shipped is the code that git tracks, as it lies here, edits included, and with it the
distribution's metadata: a node that never saw this project then has verl's plug-in entry point, and
the health check proves it before the run starts. Runs, environments and data are not shipped;
RUN, corpora and models must lie where every node finds them, below `launch.workdir`. A recipe that
is a file of one's own is shipped resolved.

Secrets reach the job as environment variables of the request: whoever may read that cluster's
dashboard may read them. `--dry-run` shows names alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.launch import render
from rcot_rl import checkout
from rcot_rl.checkout import tracked_files
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import dump_for_driver
from rcot_rl.recipe.schema import Recipe

_LOCKED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,100}==[A-Za-z0-9.+!_-]{1,60})", re.MULTILINE)
_RECIPE = "launched-recipe.yaml"
_RECIPE_MARK = "launched_recipe_mark"
SECRET = "<from this environment>"
_AGENT_S = 60.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Request:
    """What is submitted. Secrets' values are not in it."""

    address: str
    entrypoint: str
    working_dir: str
    recipe: str | None
    """The resolved recipe, where it is shipped as a file."""

    runtime_env: dict[str, Any]
    entrypoint_num_cpus: float
    entrypoint_resources: dict[str, float]
    metadata: dict[str, str]
    files: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values, for `--dry-run`."""
        return dict(vars(self))


def request(recipe: Recipe, recipe_name: str, overrides: Sequence[str] = ()) -> Request:
    """The job of a run. recipe_name, overrides: as given. Raises InputError naming the key."""
    settings, nodes = recipe.launch.ray, recipe.cluster.nodes
    python, workdir = settings.python, render.workdir_of(recipe)
    run = render.run_folder(recipe, workdir)
    files = tracked_files(render.CHECKOUT)  # what to ship is what git tracks
    weight = sum(p.lstat().st_size for p in files)
    if weight > settings.max_upload_mib * 2**20:
        raise InputError(
            f"the tracked files weigh {weight / 2**20:.0f} MiB, and {settings.max_upload_mib} are "
            "allowed",
            key="launch.ray.max_upload_mib",
        )
    health = render.health_options(recipe, run.parent, nodes, nodes)
    own = Path(recipe_name).is_file()
    # the shell fills in where Ray unpacked the code; everything else is quoted
    named = _RECIPE_MARK if own else recipe_name
    command = render.run_command(python, named, overrides, run)
    words = [python, "-m", "cluster.launch.head", f"--chdir={workdir}", *health, "--", *command]
    entrypoint = shlex.join(words)
    if own:
        entrypoint = entrypoint.replace(_RECIPE_MARK, f'"$PWD"/{_RECIPE}', 1)
    variables = {
        "RCOT_RL_PLUGIN": "required",
        "RAY_USAGE_STATS_ENABLED": "0",
        checkout.VARIABLE: checkout.commit_of(render.CHECKOUT),  # the repository stays here
    }
    variables |= recipe.launch.environment | dict.fromkeys(recipe.launch.secrets, SECRET)
    runtime: dict[str, Any] = {"env_vars": variables}
    if settings.packages == "uv":
        runtime["uv"] = {"packages": locked_packages(recipe.device)}
    return Request(
        settings.address,
        entrypoint,
        str(render.CHECKOUT),
        dump_for_driver(recipe) if own else None,
        runtime,
        settings.entrypoint_cpus,
        dict(settings.entrypoint_resources),
        {"recipe": recipe.name, "run": str(run)},
        len(files),
        weight,
    )


def submit(recipe: Recipe, made: Request, show: Callable[[str], None]) -> int:
    """Submit, follow the log into `show`, and return 0 when the job succeeded, else 1.

    Ctrl-C stops the job too: a run that nobody follows would hold the cluster. Raises InputError
    when no cluster answers, or it refuses the job.
    """
    render.check_environment(recipe)
    secrets = {name: os.environ[name] for name in recipe.launch.secrets}
    client = _client(made.address)
    with staged(Path(made.working_dir), made.recipe) as folder:
        runtime = made.runtime_env | {"working_dir": str(folder)}
        runtime["env_vars"] = made.runtime_env["env_vars"] | secrets
        job = _submitted(client, made, runtime)
    show(f"job {job} at {made.address}")
    try:
        status = _follow(client, job, show)
    except KeyboardInterrupt:
        client.stop_job(job)
        show(f"job {job} stopped; launched again it goes on from here")
        raise
    told = (client.get_job_info(job).message or "").partition("\n")[0]  # the log was shown
    show(f"job {job}: {status} {told}".rstrip())
    return 0 if status == "SUCCEEDED" else 1


def _submitted(client: Any, made: Request, runtime: dict[str, Any]) -> str:
    """The job's id. A cluster that has just started has no agent yet that would take a job."""
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=made.entrypoint,
                    runtime_env=runtime,
                    metadata=made.metadata,
                    entrypoint_num_cpus=made.entrypoint_num_cpus,
                    entrypoint_resources=made.entrypoint_resources or None,
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                last = str(error).strip().splitlines()[-1]
                raise InputError(f"Ray refused the job: {last}", key="launch.ray") from error
            time.sleep(2)


@contextmanager
def staged(folder_of_code: Path, recipe: str | None) -> Iterator[Path]:
    """A folder with the tracked files and the distribution's metadata, for as long as it lasts."""
    with TemporaryDirectory(prefix="rcot-ship-") as name:
        folder = Path(name)
        for file in tracked_files(folder_of_code):
            target = folder / file.relative_to(folder_of_code)
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
    """`name==version` of every package in the lock of that device. Raises InputError."""
    lock = render.CHECKOUT / "requirements" / f"{'cpu' if device == 'cpu' else 'gpu'}.lock"
    try:
        found = _LOCKED.findall(lock.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("there is no lock file", file=lock) from error
    return sorted(found)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(
            f"no Ray answers at {address}: {last}", key="launch.ray.address"
        ) from error


def _follow(client: Any, job: str, show: Callable[[str], None]) -> str:
    """New lines of the job's log until it ends; a lost connection is tried again."""
    seen, failures = 0, 0
    while True:
        try:
            status = client.get_job_status(job).value
            log = client.get_job_logs(job)
            failures = 0
        except (ConnectionError, RuntimeError) as error:
            failures += 1
            if failures > 60:
                raise InputError(
                    f"lost the cluster: {error}; the job goes on", key="launch.ray.address"
                ) from error
            time.sleep(5)
            continue
        whole = log if status in _ENDED else log[: log.rfind("\n") + 1]
        for line in whole[seen:].splitlines():
            show(line)
        seen = max(seen, len(whole))
        if status in _ENDED:
            return str(status)
        time.sleep(1)
