"""Valid arguments of `write_corpus`: layouts, their splits, and ranges."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipelines.toy.clips import SINGLE_TARGET
from data_pipelines.toy.scenes import PRESETS
from rcot_rl.errors import InputError
from rcot_rl.suggestions import did_you_mean

LAYOUT_SPLITS: Mapping[str, tuple[str, ...]] = {
    "ref-youtube-vos": ("train", "valid"),
    "mevis": ("train", "valid_u"),
    "revos": ("train", "valid"),
    "reasonvos": ("test",),
    "davis17": ("train", "valid"),
}
"""Layout -> its splits with masks: training first if it has one, evaluation last."""

_OTHER_SPLITS: Mapping[str, tuple[str, ...]] = {"mevis": ("valid",)}

_ALIASES = {("reasonvos", "valid"): "test"}


def check_layout(layout: str) -> None:
    """Raise InputError for an unknown layout."""
    if layout not in LAYOUT_SPLITS:
        hint = did_you_mean(layout, LAYOUT_SPLITS)
        raise InputError(f"unknown layout{hint} (known: {', '.join(LAYOUT_SPLITS)})", key=layout)


def checked_split(
    layout: str,
    split: str,
    n_videos: int,
    seed: int,
    preset: str,
    queries_per_video: int,
    absent_share: float,
    multi_share: float | None,
) -> str:
    """Check the arguments and return the split's canonical name; InputError if one is invalid."""
    split = _ALIASES.get((layout, split), split)
    check_layout(layout)
    splits = LAYOUT_SPLITS[layout] + _OTHER_SPLITS.get(layout, ())
    if split not in splits:
        hint = did_you_mean(split, splits)
        raise InputError(
            f"{layout} has no toy split of this name{hint} (it has: {', '.join(splits)})", key=split
        )
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise InputError(f"unknown preset{hint} (known: {', '.join(PRESETS)})", key=preset)
    for name, value, least in (
        ("n_videos", n_videos, 1),
        ("queries_per_video", queries_per_video, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"must be at least {least}, not {value}", key=name)
    for name, share, such in (
        ("absent_share", absent_share, "without a target"),
        ("multi_share", multi_share or 0.0, "with several targets"),
    ):
        if not 0.0 <= share <= 1.0:
            raise InputError(f"must be between 0 and 1, not {share}", key=name)
        if share and layout in SINGLE_TARGET:
            raise InputError(f"{layout} has no expressions {such}", key=name)
    return split
