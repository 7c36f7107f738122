"""`explain`: one response, every point lost, and why. The lines add up to what is missing.

For KTG each predicted item is shown with the target that it was assigned to, its IoU and distances
and the terms of equation 11 that it earned; a module without such detail gives its value, its
maximum and its reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rcot_rl.protocol.grounding import Item
from reward_fns.components.assignment import best_assignment
from reward_fns.components.format import Format
from reward_fns.components.hungarian_match import LOST, HungarianMatch, Rule, rule_of
from reward_fns.ground_truth import Objects, read_ground_truth
from reward_fns.recipe import Component, Recipe
from reward_fns.registry import Response, Term, modules
from reward_fns.score import RecipeReward, Reward, RoutedReward, Score


@dataclass
class Loss:
    """Points that are missing."""

    component: str
    reason: str
    points: float
    """After the weight."""
    where: str = ""


@dataclass
class Match:
    """A predicted item, and the target that the best assignment gives it."""

    item: int
    target: int | None
    box: list[float] | None
    point: list[float] | None
    iou: float | None = None
    box_distance: float | None = None
    point_distance: float | None = None
    """None: there is no point, or it does not lie in its own box."""
    earned: list[str] = field(default_factory=list)


@dataclass
class Explanation:
    """What one score is made of."""

    reward: float
    max_reward: float | None
    well_formed: bool
    answer: str | None
    faults: list[tuple[str, int]]
    """Of the structure, with the character of the response."""
    components: dict[str, dict[str, float]]
    """value, maximum, weight."""
    losses: list[Loss]
    matches: list[Match]
    reasons: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def text(self) -> str:
        """For the terminal."""
        of = "" if self.max_reward is None else f" of {self.max_reward:g}"
        lines = [f"reward {self.reward:.4g}{of}"]
        for name, part in self.components.items():
            value, most, weight = part["value"], part["maximum"], part["weight"]
            lines.append(f"  {name:<12} {value:.4g} of {most:g}, weight {weight:g}")
        faults = ", ".join(f"{code} at character {at}" for code, at in self.faults)
        lines.append(f"structure: {'well formed' if self.well_formed else faults}")
        if self.answer is not None:
            lines.append(f"answer: {_short(self.answer)}")
        lines += [_match_line(match) for match in self.matches]
        lines.append("points lost:" if self.losses else "nothing lost")
        for loss in self.losses:
            where = f"  {loss.where}" if loss.where else ""
            lines.append(f"  {-loss.points:+8.4f}  {loss.component}: {loss.reason}{where}")
        return "\n".join(lines)


def explain(reward: Reward, response: str, ground_truth: Any, /, **row: Any) -> Explanation:
    """Why `reward` scores a response as it does. Arguments and errors as `Reward.score`."""
    score = reward.score(response, ground_truth, **row)
    response = response if isinstance(response, str) else ""  # the score has said so
    part = reward.route(row.get("data_source")) if isinstance(reward, RoutedReward) else reward
    sample = Response(response, row, getattr(part, "segmenter", None))
    parsed = sample.parsed
    explanation = Explanation(
        reward=score.reward,
        max_reward=part.max_reward,
        well_formed=parsed.well_formed,
        answer=parsed.answer,
        faults=[(str(fault), fault.at) for fault in parsed.faults],
        components={},
        losses=[],
        matches=[],
        reasons=list(score.reasons),
    )
    if isinstance(part, RecipeReward):
        truth = read_ground_truth(ground_truth, part.recipe)
        for name, component in part.recipe.components.items():
            _component(explanation, name, component, sample, truth, part.recipe)
    else:
        _user(explanation, score)
    return explanation


def _component(
    explanation: Explanation,
    name: str,
    component: Component,
    sample: Response,
    truth: Any,
    recipe: Recipe,
) -> None:
    module = modules()[component.module]
    term = module.score(sample, truth, component.params, recipe)
    most = module.maximum(component.params, recipe)
    weight = component.weight
    explanation.components[name] = {"value": term.value, "maximum": most, "weight": weight}
    if isinstance(component.params, HungarianMatch) and _matchable(sample, truth):
        rule = rule_of(component.params, recipe)
        matches, losses = _matches(sample, truth, rule)
        explanation.matches += matches
    elif isinstance(component.params, Format) and recipe.task == "ktg":
        losses = _format_losses(sample, term, most)
    else:
        losses = iter([(", ".join(term.reasons), most - term.value, "")])
    explanation.losses += [
        Loss(name, reason, weight * points, where)
        for reason, points, where in losses
        if weight * points > 1e-12
    ]


def _user(explanation: Explanation, score: Score) -> None:
    for name, value in score.components.items():
        explanation.components[name] = {"value": value, "maximum": float("nan"), "weight": 0.0}


def _matchable(sample: Response, truth: Any) -> bool:
    grounding = sample.grounding
    return isinstance(truth, Objects) and grounding.n_items > 0 and len(truth.boxes) > 0


Losses = Iterator[tuple[str, float, str]]


def _matches(sample: Response, truth: Objects, rule: Rule) -> tuple[list[Match], Losses]:
    """Every item with its target, and what is missing (before the weight)."""
    items = sample.grounding.items
    valid = [number for number, item in enumerate(items) if item.box is not None]
    targets = list(zip(truth.boxes, truth.points, strict=True))
    cells = [[rule.pair(*_pair(items[k]), b, q) for b, q in targets] for k in valid]
    chosen = best_assignment([[cell[0] for cell in row] for row in cells]) if cells else []
    partner = {valid[i]: (i, j) for i, j in chosen}
    matches: list[Match] = []
    losses: list[tuple[str, float, str]] = []
    count = max(len(items), len(targets))
    for number, item in enumerate(items):
        match = Match(number, None, _list(item.box), _list(item.point))
        if number in partner:
            i, j = partner[number]
            value, full = cells[i][j]
            _fill(match, item, j, targets[j], rule, full)
            losses += _pair_losses(value, full, rule, count, f"item {number}, target {j}")
        matches.append(match)
    whole = sum(rule.alphas)
    taken = {j for _, j in partner.values()}
    for number in range(len(items)):
        if number not in partner and items[number].box is None:
            losses.append(("box_invalid", whole / count, f"item {number}"))
        elif number not in partner:
            losses.append(("objects_too_many", whole / count, f"item {number}"))
    missed = [j for j in range(len(targets)) if j not in taken]
    # a target that an invalid item stands for is lost with that item, and only once
    spare = count - len(items)
    losses += [("objects_too_few", whole / count, f"target {j}") for j in missed[:spare]]
    return matches, iter(losses)


def _fill(match: Match, item: Item, j: int, target: Any, rule: Rule, full: int) -> None:
    iou, far, apart = rule.terms(*_pair(item), *target)
    match.target, match.iou, match.box_distance = j, iou, far
    match.point_distance = apart if apart != float("inf") else None
    names = ("iou", "box", "point")
    match.earned = [name for bit, name in zip(LOST, names, strict=True) if full & bit]


def _pair_losses(value: float, full: int, rule: Rule, count: int, where: str) -> Losses:
    """Of one pair: each term that it does not earn in full; soft terms share what is missing."""
    short = [
        (reason, alpha)
        for (bit, reason), alpha in zip(LOST.items(), rule.alphas, strict=True)
        if alpha and not full & bit
    ]
    missing, whole = sum(rule.alphas) - value, sum(alpha for _, alpha in short)
    for reason, alpha in short:
        yield reason, missing * alpha / whole / count, where


def _format_losses(sample: Response, term: Term, most: float) -> Losses:
    grounding, left = sample.grounding, most - term.value
    n = grounding.n_items
    for number, item in enumerate(grounding.items):
        for fault in item.faults:
            points = 1.0 / n
            left -= points
            yield str(fault), points, f"item {number}"
    if left > 1e-12:
        others = [r for r in term.reasons if not any(r in i.faults for i in grounding.items)]
        yield ", ".join(others), left, ""


def _pair(item: Item) -> tuple[Any, Any]:
    return item.box, item.point


def _list(value: tuple[float, ...] | None) -> list[float] | None:
    return None if value is None else list(value)


def _match_line(match: Match) -> str:
    head = f"item {match.item}: "
    if match.box is None:
        return head + "no valid box"
    if match.target is None:
        return f"{head}box {_numbers(match.box)} has no target"
    point = "no point in its box" if match.point_distance is None else f"{match.point_distance:.3g}"
    return (
        f"{head}box {_numbers(match.box)} with target {match.target}: IoU {match.iou:.3f}, "
        f"box distance {match.box_distance:.3g}, point distance {point}; "
        f"earns {', '.join(match.earned) or 'nothing in full'}"
    )


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values) + "]"


def _short(text: str, most: int = 300) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[:most]} … ({len(plain) - most} more)"
