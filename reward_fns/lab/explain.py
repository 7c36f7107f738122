"""`rcot score explain`: every point that one response lost, and why.

The losses add up to the difference from the maximum. For KTG each predicted item is shown with its
assigned target, IoU and distances, and the terms of equation 11 that it earned. Other modules show
value, maximum and reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rcot_rl.protocol.grounding import GroundedObject
from rcot_rl.protocol.parser import answer_only_faults
from reward_fns.components.format import Format
from reward_fns.components.hungarian_match import (
    LOST,
    AssignedPair,
    HungarianMatch,
    PairScorer,
    best_pairs,
)
from reward_fns.ground_truth import Objects, read_ground_truth
from reward_fns.registry import Response, Term, modules
from reward_fns.reward_recipe import Component, RewardRecipe
from reward_fns.score import RecipeReward, Reward, RoutedReward, Score


@dataclass
class Loss:
    """Points lost for one reason."""

    component: str
    reason: str
    points: float
    """After the weight."""
    where: str = ""


@dataclass
class Match:
    """A predicted item and its target in the best assignment."""

    item: int
    target: int | None
    box: list[float] | None
    point: list[float] | None
    iou: float | None = None
    box_distance: float | None = None
    point_distance: float | None = None
    """None if the point is missing or outside its own box."""
    earned: list[str] = field(default_factory=list)


@dataclass
class Explanation:
    """Breakdown of one score."""

    reward: float
    max_reward: float | None
    well_formed: bool
    answer: str | None
    faults: list[tuple[str, int]]
    """Structure faults, each with its character position in the response."""
    components: dict[str, dict[str, float]]
    """Value, maximum and weight by component."""
    losses: list[Loss]
    matches: list[Match]
    reasons: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Return the explanation as text for the terminal."""
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
    """Explain the score of a response. Arguments and errors are those of `Reward.score`."""
    score = reward.score(response, ground_truth, **row)
    response = response if isinstance(response, str) else ""  # the reasons of the score include it
    part = reward.route(row.get("data_source")) if isinstance(reward, RoutedReward) else reward
    sample = Response(response, row, getattr(part, "segmenter", None))
    parsed = sample.parsed
    faults = parsed.faults
    if isinstance(part, RecipeReward) and part.recipe.response == "answer":
        faults = answer_only_faults(sample.text)
    explanation = Explanation(
        reward=score.reward,
        max_reward=part.max_reward,
        well_formed=not faults,
        answer=parsed.answer,
        faults=[(str(fault), fault.at) for fault in faults],
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
    recipe: RewardRecipe,
) -> None:
    module = modules()[component.module]
    term = module.score(sample, truth, component.params, recipe)
    most = module.maximum(component.params, recipe)
    weight = component.weight
    explanation.components[name] = {"value": term.value, "maximum": most, "weight": weight}
    if isinstance(component.params, HungarianMatch) and _matchable(sample, truth):
        scorer = PairScorer(component.params, recipe.scale)
        matches, losses = _matches(sample, truth, scorer)
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


def _matches(sample: Response, truth: Objects, scorer: PairScorer) -> tuple[list[Match], Losses]:
    """Return every item with its target, and the points lost (before the weight)."""
    items = sample.grounding.items
    valid = [number for number, item in enumerate(items) if item.box is not None]
    scored = [(item.box, item.point) for item in items if item.box is not None]
    pairs = {valid[pair.prediction]: pair for pair in best_pairs(scored, truth, scorer)}
    matches: list[Match] = []
    losses: list[tuple[str, float, str]] = []
    count = max(len(items), len(truth.boxes))
    full_value = sum(scorer.alphas)
    for number, item in enumerate(items):
        pair = pairs.get(number)
        matches.append(_match_of(number, item, pair, truth, scorer))
        if pair is not None:
            losses += _pair_losses(pair, scorer, count, f"item {number}, target {pair.target}")
    for number, item in enumerate(items):
        if number not in pairs:
            reason = "box_invalid" if item.box is None else "objects_too_many"
            losses.append((reason, full_value / count, f"item {number}"))
    taken = {pair.target for pair in pairs.values()}
    missed = [j for j in range(len(truth.boxes)) if j not in taken]
    # an invalid item already lost the points of one missed target
    spare = count - len(items)
    losses += [("objects_too_few", full_value / count, f"target {j}") for j in missed[:spare]]
    return matches, iter(losses)


def _match_of(
    number: int, item: GroundedObject, pair: AssignedPair | None, truth: Objects, scorer: PairScorer
) -> Match:
    match = Match(number, None, _list(item.box), _list(item.point))
    if pair is not None and item.box is not None:
        j = pair.target
        match.target = j
        match.iou, match.box_distance, point_distance = scorer.measure(
            item.box, item.point, truth.boxes[j], truth.points[j]
        )
        match.point_distance = point_distance if point_distance != float("inf") else None
        names = ("iou", "box", "point")
        match.earned = [name for bit, name in zip(LOST, names, strict=True) if pair.full & bit]
    return match


def _pair_losses(pair: AssignedPair, scorer: PairScorer, count: int, where: str) -> Losses:
    """Yield each term that a pair does not earn in full; soft terms share what is missing."""
    short = [
        (reason, alpha)
        for (bit, reason), alpha in zip(LOST.items(), scorer.alphas, strict=True)
        if alpha and not pair.full & bit
    ]
    missing, short_sum = sum(scorer.alphas) - pair.value, sum(alpha for _, alpha in short)
    for reason, alpha in short:
        yield reason, missing * alpha / short_sum / count, where


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
