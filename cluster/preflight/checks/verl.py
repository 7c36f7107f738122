"""The preflight's check of keys for verl, which ignores misspelled YAML keys silently.

GRPO keys, the recipe's own and those of `verl:`, are compared with the reference configuration that
verl ships. Reading it takes a hundredth of the time in which hydra composes it. For SFT verl ships
none: hydra composes it, and only if there are keys to check.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from cluster.preflight.at_start import setup_of
from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from rcot_rl.errors import InputError
from rcot_rl.suggestions import close_names, did_you_mean
from rcot_rl.system.doctor import installed_version
from rcot_rl.training import verl_config
from rcot_rl.training.verl_patches import VERL_VERSION

_REFERENCE = "_generated_ppo_trainer.yaml"
_COST = "a key that verl ignores in silence"


def version(case: RunCase, notes: Notes) -> None:
    """Check that verl is installed, in the version whose hooks this project uses."""
    if not case.training:
        return
    installed = installed_version("verl")
    if installed is None:
        notes.error(
            "verl.version",
            "verl is not installed",
            cost="an import error in the first stage",
            fix=f"`{setup_of(case.recipe.device)}`",
        )
    elif installed != VERL_VERSION:
        notes.error(
            "verl.version",
            f"verl {installed} is installed; hooks and patches here are for {VERL_VERSION}",
            cost="a patch that fails in every process of the stage",
            fix=f"`{setup_of(case.recipe.device)}`",
        )


def keys(case: RunCase, notes: Notes) -> None:
    """Check for unknown keys, values of another type, and keys that the recipe sets itself."""
    if case.elsewhere and importlib.util.find_spec("verl") is None:
        for stage in case.training:
            notes.unknown(
                f"{stage}.verl",
                "verl is not installed on this host: keys for it were not checked",
                cost=_COST,
                fix="the run checks them where it starts",
            )
        return
    install, here = f"`{setup_of(case.recipe.device)}` installs verl completely", Path("preflight")
    for stage in case.grpo:
        section = case.recipe.grpo(stage)
        with notes.attempt(f"{stage}.verl", cost=_COST, fix=install):
            known = reference()
            preset = verl_config._grpo_method(case.recipe, stage)
            preset |= verl_config._grpo_host(case.recipe, section)
            preset |= verl_config._grpo_paths(
                case.recipe, stage, section, here, [here], [here], here
            )
            _unknown(notes, stage, preset, known, "the recipe's own keys")
            _overrides(notes, stage, section.verl, known, preset)
            if section.old_log_probs == "reuse":
                _reuse(notes, stage, section.verl, known, preset)
    for stage in case.sft:
        given = case.recipe.sft(stage).verl
        if given:
            with notes.attempt(f"{stage}.verl", cost=_COST, fix=install):
                tree = OmegaConf.to_container(verl_config.sft_reference(), resolve=False)
                preset = verl_config.sft_values(case.recipe, stage, here, [here], [], here)
                _overrides(notes, stage, given, _dotted(tree), preset)


def _reuse(
    notes: Notes,
    stage: str,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    preset: Mapping[str, Any],
) -> None:
    """Note keys of `verl:` that give a batch more than one update. Arguments as `_overrides`."""
    values, where = dict(preset) | _spelled_out(given, known), f"train.{stage}"
    for key, reason in verl_config.inexact_reuse(lambda key: values.get(key, known.get(key))):
        notes.error(
            f"{stage}.old_log_probs",
            f"{where}.verl: {key} {reason}",
            cost="an error when the stage starts",
            fix=f"{where}.old_log_probs=recompute",
        )


def _spelled_out(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested keys of `verl:` as dotted ones, as far as verl's configuration is nested."""
    return verl_config.spelled_out(
        given, lambda key: isinstance(known.get(key), dict) and bool(known[key]) and not _free(key)
    )


def _overrides(
    notes: Notes,
    stage: str,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    preset: Mapping[str, Any],
) -> None:
    """Check the keys of a stage's `verl:`.

    Args:
        given: The keys under `verl:`.
        known: Every key of verl's configuration, dotted, with its default.
        preset: Keys of verl that the recipe's own keys set.
    """
    where, values = f"train.{stage}.verl", _spelled_out(given, known)
    _unknown(notes, stage, values, known, where)
    _types(notes, stage, values, known, where)
    _shadows(notes, stage, values, preset, where)


@lru_cache(maxsize=1)
def reference() -> Mapping[str, Any]:
    """Return dotted key -> default of verl's GRPO configuration, with mappings. InputError."""
    package = importlib.util.find_spec("verl")  # does not import it
    places = package.submodule_search_locations if package else None
    if not places:
        raise InputError("verl is not installed")
    path = Path(places[0]) / "trainer" / "config" / _REFERENCE
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # safe_load, in C where available
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"verl's reference configuration is unreadable: {error}", file=path) from (
            error
        )
    return _dotted(tree)


def _dotted(tree: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if prefix:
            values[prefix] = node
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, f"{prefix}.{name}" if prefix else str(name))

    walk(tree, "")
    return values


def _free(key: str) -> bool:
    """Return True if verl reads the key, but its reference configuration does not list it."""
    return any(key == f or (f.endswith(".") and key.startswith(f)) for f in verl_config.FREE_KEYS)


def _unknown(
    notes: Notes, stage: str, values: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> None:
    for key in values:
        if key not in known and not _free(key):
            near = " or ".join(close_names(key, known))
            notes.error(
                f"{stage}.verl",
                f"{where}: verl has no key {key}{did_you_mean(key, known)}",
                cost=_COST,
                fix=f"use {near}, or remove it" if near else "remove it",
            )


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
                f"{stage}.verl_type",
                f"{where}: {key}={value!r} is a {given}, verl's default {default!r} a {wanted}",
                cost="an error deep in a worker, or a text that counts as true",
                fix=f"give a {wanted}",
            )


def _kind(value: Any) -> str:
    for kind, name in (
        (bool, "truth value"),
        (int | float, "number"),
        (str, "text"),
        (dict, "mapping"),
        (list | tuple, "list"),
    ):
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _shadows(
    notes: Notes,
    stage: str,
    values: Mapping[str, Any],
    preset: Mapping[str, Any],
    where: str,
) -> None:
    for key in values:
        if key in preset and values[key] != preset[key]:
            notes.warning(
                f"{stage}.verl_shadow",
                f"{where}: {key}={values[key]!r} overrides {preset[key]!r}, which the recipe's own "
                "keys set",
                cost="a recipe that does not say what was run",
                fix="set the recipe's own key instead",
            )
