"""The preflight's check of keys that are handed to verl, which takes typos in YAML silently.

GRPO's keys, the recipe's own and those of `verl:`, are held against the reference that verl ships
of its resolved configuration: reading it takes a hundredth of the time of composing it by hydra.
SFT has no such file, so hydra is asked, and only when there is something to ask.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from cluster.preflight.at_start import setup_of
from cluster.preflight.checks.case import Case
from cluster.preflight.checks.findings import Notes
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import section_key
from rcot_rl.suggestions import close_names, did_you_mean
from rcot_rl.training import verl_config

PINNED = "0.9.1"
"""The version whose hooks and names this project was written against."""
_REFERENCE = "_generated_ppo_trainer.yaml"
_COST = "a key that verl ignores in silence"


def version(case: Case, notes: Notes) -> None:
    """verl is installed, and the one whose hooks this project attaches to."""
    if not case.training:
        return
    try:
        found = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        notes.error(
            "verl.version", "verl is not installed", cost="an import error in the first stage",
            fix=f"`{setup_of(case.recipe.device)}`",
        )  # fmt: skip
        return
    if found != PINNED:
        notes.error(
            "verl.version", f"verl {found} is installed; hooks and patches here are of {PINNED}",
            cost="a patch that refuses, in every process of the stage",
            fix=f"`{setup_of(case.recipe.device)}`",
        )  # fmt: skip


def keys(case: Case, notes: Notes) -> None:
    """Keys that verl does not know, values of another type, keys that the recipe sets itself."""
    if case.elsewhere and importlib.util.find_spec("verl") is None:
        for stage in case.training:
            notes.unknown(
                f"{stage}.verl", "verl is not installed on this host: keys for it were not checked",
                cost=_COST, fix="the run checks them where it starts",
            )  # fmt: skip
        return
    whole = f"`{setup_of(case.recipe.device)}` installs verl whole"
    for stage in case.grpo:
        section = case.recipe.grpo(stage)
        with notes.attempt(f"{stage}.verl", cost=_COST, fix=whole):
            known = reference()
            here = Path("preflight")
            own = verl_config._grpo_method(case.recipe, section)
            own |= verl_config._grpo_host(case.recipe, section)
            own |= verl_config._grpo_paths(case.recipe, stage, section, here, [here], [here], here)
            _unknown(notes, stage, own, known, "the recipe's own keys")
            _overrides(notes, stage, section.verl, known, own)
            if section.old_log_probs == "reuse":
                _reuse(notes, stage, section.verl, known, own)
    if "sft" in case.todo and case.recipe.sft.verl:
        here = Path("preflight")
        with notes.attempt("sft.verl", cost=_COST, fix=whole):
            tree = OmegaConf.to_container(verl_config.sft_reference(), resolve=False)
            own = verl_config.sft_values(case.recipe, here, [here], [], here)
            _overrides(notes, "sft", case.recipe.sft.verl, _dotted(tree), own)


def _reuse(
    notes: Notes, stage: str, given: Mapping[str, Any], known: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:  # fmt: skip
    """Keys of `<stage>.verl` by which a batch would get more than one update. As `_overrides`."""
    values = own | _spelled_out(given, known)
    where = section_key(stage)
    for key, reason in verl_config.inexact_reuse(lambda key: values.get(key, known.get(key))):
        notes.error(
            f"{stage}.old_log_probs", f"{where}.verl: {key} {reason}",
            cost="an error when the stage starts", fix=f"{where}.old_log_probs=recompute",
        )  # fmt: skip


def _spelled_out(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return verl_config.spelled_out(
        given, lambda key: isinstance(known.get(key), dict) and bool(known[key]) and not _free(key)
    )


def _overrides(
    notes: Notes, stage: str, given: Mapping[str, Any], known: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:  # fmt: skip
    """Of `<stage>.verl`. known: every key of verl's configuration; own: what the recipe says."""
    where = f"{section_key(stage)}.verl"
    values = _spelled_out(given, known)
    _unknown(notes, stage, values, known, where)
    _types(notes, stage, values, known, where)
    _shadows(notes, stage, values, own, where)


@lru_cache(maxsize=1)
def reference() -> Mapping[str, Any]:
    """Dotted key -> default, of verl's GRPO configuration; mappings too. Raises InputError."""
    package = importlib.util.find_spec("verl")  # does not import it
    places = package.submodule_search_locations if package else None
    if not places:
        raise InputError("verl is not installed")
    path = Path(places[0]) / "trainer" / "config" / _REFERENCE
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"verl's reference configuration is unreadable: {error}", file=path) from (
            error
        )
    return _dotted(tree)


def _dotted(tree: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if prefix:
            found[prefix] = node
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, f"{prefix}.{name}" if prefix else str(name))

    walk(tree, "")
    return found


def _free(key: str) -> bool:
    return any(key == f or (f.endswith(".") and key.startswith(f)) for f in verl_config.FREE_KEYS)


def _unknown(
    notes: Notes, stage: str, values: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> None:
    for key in values:
        if key not in known and not _free(key):
            near = " or ".join(close_names(key, known))
            notes.error(
                f"{stage}.verl", f"{where}: verl has no key {key}{did_you_mean(key, known)}",
                cost=_COST, fix=f"use {near}, or leave it out" if near else "leave it out",
            )  # fmt: skip


def _types(
    notes: Notes, stage: str, values: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> None:
    for key, value in values.items():
        default = known.get(key)
        if default is None or value is None or (isinstance(default, str) and "${" in default):
            continue
        wanted, given = _kind(default), _kind(value)
        if wanted != given and not (wanted == "text" and given == "number"):
            notes.error(
                f"{stage}.verl_type", f"{where}: {key}={value!r} is a {given}, verl's default "
                f"{default!r} a {wanted}", cost="an error deep in a worker, or a truth that is a "
                "text", fix=f"give a {wanted}",
            )  # fmt: skip


def _kind(value: Any) -> str:
    for kind, name in ((bool, "truth value"), (int | float, "number"), (str, "text"),
                       (dict, "mapping"), (list | tuple, "list")):  # fmt: skip
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _shadows(
    notes: Notes, stage: str, values: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> None:
    for key in values:
        if key in own and values[key] != own[key]:
            notes.warning(
                f"{stage}.verl_shadow", f"{where}: {key}={values[key]!r} takes the place of "
                f"{own[key]!r}, which the recipe's own keys say", cost="a recipe that does not say "
                "what was run", fix="set the recipe's own key instead",
            )  # fmt: skip
