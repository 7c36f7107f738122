"""Reason codes that each shipped reward module can give, for charts in which an absent code is 0.

A user's function can give any code; its failures have the codes `reward_function_*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reward_fns.reward_recipe import RewardRecipe, RoutedRecipe

_BLOCKS = (
    "answer_inside_think",
    "answer_missing",
    "answer_repeated",
    "answer_unclosed",
    "stray_tag",
    "text_outside_tags",
)
_STRUCTURE = (
    *_BLOCKS,
    "answer_before_think",
    "think_inside_answer",
    "think_missing",
    "think_repeated",
    "think_unclosed",
)
_LIST = ("answer_not_a_list", "item_not_an_object", "json_invalid")
_ITEMS = (
    "box_missing",
    "box_not_four_numbers",
    "box_not_ordered",
    "list_empty",
    "point_missing",
    "point_not_two_numbers",
)
_MATCH = (
    "box_far",
    "box_invalid",
    "iou_low",
    "objects_too_few",
    "objects_too_many",
    "point_missed",
    "target_missed",
)

CODES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "format": {
        "aks": (*_STRUCTURE, "option_unknown"),
        "ktg": (*_STRUCTURE, *_LIST, *_ITEMS),
        "kfg": (*_STRUCTURE, "keyframe_unknown"),
    },
    "answer_format": {
        "aks": (*_BLOCKS, "think_unexpected", "option_unknown"),
        "ktg": (*_BLOCKS, "think_unexpected", *_LIST, *_ITEMS),
    },
    "option_accuracy": {"aks": ("answer_missing", "option_unknown", "option_wrong")},
    "hungarian_match": {"ktg": (*_LIST, *_MATCH)},
}
"""Module -> task -> codes that ordinary responses earn. Left out: codes of oversized responses and
of numbers that are not finite, and the modules of the public baselines."""


def reason_codes(recipe: RewardRecipe | RoutedRecipe) -> list[str]:
    """Return the codes that the modules of a reward recipe can give, sorted."""
    routes: Iterable[RewardRecipe] = (
        recipe.routes.values() if isinstance(recipe, RoutedRecipe) else [recipe]
    )
    codes: set[str] = set()
    for route in routes:
        for part in route.components.values():
            if part.weight > 0:
                codes.update(CODES.get(part.module, {}).get(route.task, ()))
    return sorted(codes)
