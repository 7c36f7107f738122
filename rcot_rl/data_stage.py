"""The data stage: toy corpora, texts that a model is asked for, shards (the paper's 3.4, A.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.supervise.processes import Host
from rcot_rl.annotation import launch
from rcot_rl.disk import explained
from rcot_rl.errors import InputError
from rcot_rl.inference.segmenter import label_judge
from rcot_rl.monitoring.console import Console, EventReader
from rcot_rl.paths import check_path
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.training import jobs
from rcot_rl.training.provenance import reward_hashes, shard_hash


def run(recipe: Recipe, folder: RunFolder, host: Host, console: Console) -> dict[str, Any]:
    """The data stage of a run; what the manifests say of each set. Raises InputError."""
    if recipe.toy is not None:
        _toy_corpora(recipe, folder, console)
    found = [
        c.model_copy(update={"root": str(corpus_root(folder, recipe, c.dataset, c.root))})
        for c in recipe.data.corpora
    ]
    data = recipe.data.model_copy(update={"corpora": found})
    recipe = recipe.model_copy(update={"data": data})
    recipe = _asked(recipe, folder, host, console)
    shards = folder.root / "shards"
    result = _build(recipe, shards, console)
    _refuse_overlong(result["sets"])
    folder.pin("shards", {name: shard_hash(shards / name) for name in result["sets"]})
    return {"sets": {name: m.get("rows") for name, m in result["sets"].items()}}


def _asked(recipe: Recipe, folder: RunFolder, host: Host, console: Console) -> Recipe:
    """The recipe with `model` replaced by the texts that the model wrote, here and now."""
    for key, what in (("describe", "describe"), ("trace", "trace")):
        if getattr(recipe.data, key) == "model":
            log = folder.new_attempt("data") / f"{what}.log"
            path = _ask(host, console, recipe, what, folder.root / "texts", log)
            recipe = recipe.model_copy(
                update={"data": recipe.data.model_copy(update={key: str(path)})}
            )
    return recipe


def build_shards(recipe: Recipe, out: Path) -> str:
    """`rcot data build`: the recipe's shard sets below `out`; returns what was built, a line each.

    Raises InputError, also after building, for rows longer than training takes.
    """
    check_path(out, handed_on=True)
    console = Console()
    sets = _build(recipe, out, console)["sets"]
    _refuse_overlong(sets)
    return "\n".join(
        f"{out / name}: " + ", ".join(f"{n} {split}" for split, n in m["rows"].items())
        for name, m in sets.items()
    )


def _refuse_overlong(sets: dict[str, Any]) -> None:
    for name, manifest in sets.items():
        for which, rows in ((manifest["tokens"] or {}).get("over") or {}).items():
            if rows:
                most = manifest["tokens"]["limits"][which]
                raise InputError(
                    f"{len(rows)} rows have more {which} than the {most} that training takes, "
                    f"the first {rows[0]}: raise the limit, or shorten descriptions",
                    key=f"data.sets.{name}",
                )


def _build(recipe: Recipe, out: Path, console: Console) -> dict[str, Any]:
    from data_pipelines.build import build, defects_text

    rewards: dict[str, dict[str, dict[str, str]]] = {}
    for stage, reward in reward_hashes(recipe).items():
        rewards.setdefault(recipe.grpo(stage).shard_set, {})[stage] = reward
    return build(
        recipe.data,
        out,
        recipe.prompts,
        seed=recipe.seed,
        progress=console.progress,
        canvas=recipe.canvas.image,
        rewards=rewards,
        policy=_policy_here(recipe, console),
        limits=jobs.token_limits(recipe),
        propagator=label_judge(recipe),
        announce=lambda table, facts: console.text("\n".join([table, defects_text(facts)])),
    )


def ask_model(recipe: Recipe, what: str, out: Path) -> Path:
    """`rcot data describe` and `rcot data trace`: texts by a model, in the folder `out`."""
    check_path(out)
    console = Console()
    preload = launch.PRELOAD if recipe.device == "cpu" else ()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written: {explained(error, out)}", file=out) from error
    own_ray = recipe.cluster.ray_address == "local"
    with Host(platform_of(recipe), preload, out / "zygote.log", own_ray) as host:
        return _ask(host, console, recipe, what, out, out / f"{what}.log")


def _ask(host: Host, console: Console, recipe: Recipe, what: str, out: Path, log: Path) -> Path:
    console.line(f"{what}: starting, log {log}")
    events = EventReader(log, console, what)
    return launch.run_in(host, what, recipe, out, log, events.poll)


def _policy_here(recipe: Recipe, console: Console) -> Path | None:
    """The policy's folder, to count tokens by; shards can be built where it is not."""
    from rcot_rl.inference.model_folder import local_model

    path = local_model(recipe.models.policy)
    if path is None:
        console.line(f"data: {recipe.models.policy} is not on this host: tokens are not counted")
    return path


def _toy_corpora(recipe: Recipe, folder: RunFolder, console: Console) -> None:
    from data_pipelines.toy.layouts import write_corpus

    toy = recipe.toy
    assert toy is not None
    for corpus in toy.corpora:
        console.line(f"toy corpus {corpus.layout} {corpus.split}: {corpus.videos} videos")
        write_corpus(
            folder.root / "corpora" / corpus.layout,
            corpus.layout,
            corpus.split,
            corpus.videos,
            toy.seed,
            toy.preset,
            absent_share=corpus.absent_share,
            workers=recipe.data.workers,
        )


def corpus_root(folder: RunFolder, recipe: Recipe, dataset: str, root: str | None) -> Path:
    """Where a corpus lies: as the recipe says, or the run's toy corpus. Raises InputError."""
    if root is not None:
        path = Path(root)
        if not path.is_dir():
            raise InputError("no such corpus", file=path)
        return path.resolve()
    if recipe.toy is None or dataset not in {c.layout for c in recipe.toy.corpora}:
        raise InputError(f"{dataset} has no root, and the recipe no toy corpus of it", key="data")
    return folder.root / "corpora" / dataset


def asks(recipe: Recipe) -> bool:
    """Whether the data stage asks a model."""
    return "model" in (recipe.data.describe, recipe.data.trace)


def platform_of(recipe: Recipe) -> dict[str, str]:
    """What the zygote's imports read; on a CPU, threads of one pool must not spin while another
    process works on their core."""
    if recipe.device != "cpu":
        return {}
    return {"VERL_PLATFORM": "cpu", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
