"""`rcot score --check REWARD`: check the contract of a reward before any GPU is allocated.

Runs a recipe or a user's function on the built-in rows of `contract_rows.py` and checks: how it is
called; numeric and finite results; the same components on every row; equal results for equal inputs
(repeated, and in a fresh process in another order); time per call; hostile texts; and that the
right answer earns more than a wrong or an empty one. Each finding is one line: problem, cost in
training, fix.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcot_rl.errors import InputError
from reward_fns.lab.contract_report import CheckName, CheckReport, Level
from reward_fns.lab.contract_rows import SampleRow, hostile_texts, sample_rows
from reward_fns.lab.contract_run import RewardCall, Runner, call_of
from reward_fns.reward_recipe import RewardRecipe, RoutedRecipe
from reward_fns.score import Reward, UserReward, load_reward
from reward_fns.user.guard import Result
from reward_fns.user.user_result import BAD_RESULT, DIED, TIMEOUT

if TYPE_CHECKING:
    from reward_fns.components.mask_iou import MaskSegmenter

USER_TASKS = {"aks": "rcot/aks", "ktg": "rcot/ktg"}
"""Tasks and data sources that a user's function is tested on; it may support only one."""

TIMED_CALLS = 200
TIMED_S = 5.0
"""Time limit of the timed calls."""
SLOW_TEXT_S = 1.0
"""A hostile text that takes longer is reported."""
SLOW_CALL_S = 0.1
"""A longer median call is reported."""
MAX_TIMEOUTS = 3
"""Stop the hostile texts after this many timeouts: each takes a full deadline."""
SLOW_FIX = "limit the input length first; look for a regular expression that backtracks"


def check_reward(
    spec: str,
    *,
    canvas: int | None = None,
    deadline_s: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    segmenter: MaskSegmenter | None = None,
) -> CheckReport:
    """Check the contract of one reward. Takes the arguments of `load_reward`. Raises InputError."""
    reward = load_reward(
        spec, canvas=canvas, deadline_s=deadline_s, overrides=overrides, segmenter=segmenter
    )
    report = CheckReport(reward.name, reward.hash)
    runner = Runner(reward, spec, canvas, overrides, segmenter)
    try:
        runner.describe(report)
        rows = _scorable(runner, _rows(reward, canvas), report)
        if rows:
            _check_keys(runner, rows, report)
            _check_order(runner, rows, report)
            _check_again(runner, rows, report)
            _check_time(runner, rows, report)
            _check_hostile(runner, rows, report)
    finally:
        runner.close()
    return report


def _rows(reward: Reward, canvas: int | None) -> list[SampleRow]:
    recipe: RewardRecipe | RoutedRecipe | None = getattr(reward, "recipe", None)
    pairs: list[tuple[str, str, int | None]]
    if isinstance(recipe, RoutedRecipe):
        pairs = [(part.task, source, part.canvas) for source, part in recipe.routes.items()]
    elif recipe is not None:
        pairs = [(recipe.task, USER_TASKS.get(recipe.task, recipe.task), recipe.canvas)]
    else:
        pairs = [(task, source, canvas) for task, source in USER_TASKS.items()]
    rows = [row for task, source, side in pairs for row in sample_rows(task, source, side)]
    if not rows:
        tasks = ", ".join(task for task, _, _ in pairs)
        raise InputError(f"cannot be checked: no built-in rows for {tasks}", key=reward.name)
    return rows


def _cases(rows: Iterable[SampleRow]) -> list[RewardCall]:
    return [
        call_of(f"{row.name}, {kind} answer", getattr(row, kind), row.ground_truth, row.row)
        for row in rows
        for kind in ("right", "wrong", "empty")
    ]


def _scorable(runner: Runner, rows: list[SampleRow], report: CheckReport) -> list[SampleRow]:
    """Return the rows that the reward can score; report the others."""
    results = {row.name: runner.run(_cases([row])[0]) for row in rows}
    scored_tasks = {row.task for row in rows if not results[row.name].failed}
    bad = [row for row in rows if results[row.name].failed]
    for row in bad:
        result = results[row.name]
        other_task = (
            isinstance(runner.reward, UserReward) and scored_tasks and row.task not in scored_tasks
        )
        hint = ""
        timed_out = result.failed[0] == TIMEOUT
        if isinstance(runner.reward, UserReward) and not timed_out and _scores_parsed(runner, row):
            hint = "json.loads the ground truth: training passes it as JSON text"
        report.add(
            "warning" if other_task else "error",
            "result",
            f"{row.name}, right answer: {result.failed[0]}, {result.message}",
            f"every {row.task} row earns 0 and has no gradient",
            hint or (f"ignore this if it is not meant for {row.task}" if other_task else ""),
        )
    good = [row for row in rows if row not in bad]
    if good:
        report.add("ok", "result", f"finite numbers on {len(good)} of {len(rows)} sample rows")
    return good


def _scores_parsed(runner: Runner, row: SampleRow) -> bool:
    return not runner.run(call_of(row.name, row.right, row.truth, row.row)).failed


def _check_keys(runner: Runner, rows: list[SampleRow], report: CheckReport) -> None:
    cases = _cases(rows)
    shapes: dict[tuple[str, ...], str] = {}
    failures: dict[str, list[tuple[str, Result]]] = {}
    for case, result in zip(cases, map(runner.run, cases), strict=True):
        if result.failed:
            failures.setdefault(result.failed[-1], []).append((case.name, result))
        else:
            shapes.setdefault(tuple(sorted(result.components)), case.name)
    for group in failures.values():
        _failed(report, "result", group[0][0] + _more(group), group[0][1])
    if len(shapes) > 1:
        (first, first_row), (other, other_row) = list(shapes.items())[:2]
        report.add(
            "error",
            "keys",
            f"components {list(first)} on '{first_row}' but {list(other)} on '{other_row}'",
            f"the second kind of row is a {BAD_RESULT} and earns 0",
            "return every component on every row, 0.0 if it does not apply",
        )
    else:
        names = ", ".join(next(iter(shapes), ())) or "none besides the reward"
        report.add("ok", "keys", f"the same components on every row: {names}")


def _check_order(runner: Runner, rows: list[SampleRow], report: CheckReport) -> None:
    faults = []
    for row in rows:
        right, wrong, empty = (runner.run(case) for case in _cases([row]))
        for kind, other in (("a wrong", wrong), ("an empty", empty)):
            if not right.failed and right.reward <= other.reward:
                earns = f"the right answer earns {right.reward:g}, {kind} one {other.reward:g}"
                faults.append(f"{row.name}, ground truth {row.ground_truth[:40]}: {earns}")
    if not faults:
        report.add("ok", "order", "right answers earn more than wrong and empty ones")
        return
    report.add(
        "error",
        "order",
        faults[0] + _more(faults),
        "the policy has no incentive to answer correctly",
        "check how the function reads this ground truth, JSON text as in training",
    )


def _more(faults: Sequence[Any]) -> str:
    return f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""


def _check_again(runner: Runner, rows: list[SampleRow], report: CheckReport) -> None:
    cases = _cases(rows)
    first = [runner.run(case) for case in cases]
    ways = {
        "scored again": [runner.run(case) for case in cases],
        "scored together": runner.run_all(cases),
        "in a fresh process, in reverse order": runner.run_fresh(cases[::-1])[::-1],
    }
    faults = 0
    for way, results in ways.items():
        for case, a, b in zip(cases, first, results, strict=True):
            if (a.reward, a.components) != (b.reward, b.components):
                faults += 1
                report.add(
                    "error",
                    "determinism",
                    f"'{case.name}' earns {a.reward!r}, {way} {b.reward!r}",
                    "rewards differ by chance; resumed runs and replays are not reproducible",
                    "seed random numbers from the response; keep no state between calls",
                )
                break
    if not faults:
        report.add(
            "ok", "determinism", "equal results when repeated, batched and in a fresh process"
        )


def _check_time(runner: Runner, rows: list[SampleRow], report: CheckReport) -> None:
    cases = _cases(rows)
    seconds: list[float] = []
    end = time.perf_counter() + TIMED_S
    while len(seconds) < TIMED_CALLS and (not seconds or time.perf_counter() < end):
        start = time.perf_counter()
        runner.run(cases[len(seconds) % len(cases)])
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    median, p99 = statistics.median(seconds), seconds[int(0.99 * (len(seconds) - 1))]
    message = f"median {_time(median)}, p99 {_time(p99)} of {len(seconds)} calls"
    deadline = runner.deadline_s
    if deadline is not None:
        message += f", deadline {_time(deadline)}"
    costs = f"128 responses per step on 8 workers take {_time(16 * median)}"
    if deadline is not None and p99 > deadline / 2:
        fix = "make it faster, or raise grpo.reward_deadline_s"
        report.add("error", "time", message, f"{costs}; slow ones earn 0", fix)
    elif median > SLOW_CALL_S:
        report.add("warning", "time", message, costs, "make it faster, async or a batch function")
    else:
        report.add("ok", "time", message)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _check_hostile(runner: Runner, rows: list[SampleRow], report: CheckReport) -> None:
    row, texts = rows[-1], hostile_texts()
    honest, _, nothing = (runner.run(case).reward for case in _cases([row]))
    failures: dict[str, list[tuple[str, Result]]] = {}
    paid, slow = [], []
    for name, text in texts.items():
        start = time.perf_counter()
        result = runner.run(call_of(name, text, row.ground_truth, row.row))
        seconds = time.perf_counter() - start
        if result.failed:
            failures.setdefault(result.failed[-1], []).append((name, result))
        elif result.reward >= honest > nothing:  # otherwise `order` reports it
            paid.append(f"'{name}' earns {result.reward:g}, the right answer {honest:g}")
        elif seconds > SLOW_TEXT_S:
            slow.append(f"'{name}' took {_time(seconds)}")
        if len(failures.get(TIMEOUT, [])) == MAX_TIMEOUTS:
            break
    for group in failures.values():
        _failed(report, "hostile", group[0][0] + _more(group), group[0][1])
    if paid:
        costs = "the policy will find it and produce nothing else"
        fix = "score only a single, valid answer"
        report.add("error", "hostile", paid[0] + _more(paid), costs, fix)
    if slow:
        costs = "such responses block their worker"
        report.add("warning", "hostile", slow[0] + _more(slow), costs, SLOW_FIX)
    if not (failures or paid or slow):
        report.add(
            "ok", "hostile", f"{len(texts)} hostile texts are scored, none earns the full reward"
        )


def _failed(report: CheckReport, check: CheckName, name: str, result: Result) -> None:
    code = result.failed[0]
    if code == TIMEOUT:
        costs, fix = (
            "each such response blocks its worker for the whole deadline",
            SLOW_FIX,
        )
    elif code == DIED:
        costs, fix = "each such response costs a restart", "see the message"
    elif code == BAD_RESULT:
        costs, fix = "such responses earn 0", "return a finite number, or a dict of them"
    else:
        costs = "such responses earn 0 because of the error, not by your rule"
        fix = "handle it and return the intended reward"
    level: Level = "error" if code in (TIMEOUT, DIED) or check == "result" else "warning"
    report.add(level, check, f"'{name}': {code}, {result.message}", costs, fix)
