"""Compare the speed of rewards with that of a plain NumPy reward in the same run, on one thread.

    python benchmarks/bench_rewards.py [--seconds 1.0]

The plain reward is the algorithm of the public baselines: regular expressions for the structure,
json, arrays of all pairs, scipy's assignment. Ratios compare responses per second; for both, the
best of five rounds counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from reward_fns import load_reward

SIZES = (1, 2, 3, 10, 120)
LENGTHS = (10_000, 100_000, 1_000_000)


def plain_reward(response: str, ground_truth: str) -> float:
    """Return format (3), accuracy (3) and non-repeat (1) rewards of a valid answer."""
    value, truth = 0.0, json.loads(ground_truth)
    frame = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    value += 1.0 if frame.fullmatch(response) else 0.0
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", response, re.DOTALL)
    items = json.loads(match[1]) if match else []
    for item in items:
        good = int(isinstance(item["bbox_2d"], list) and len(item["bbox_2d"]) == 4)
        good += int(isinstance(item["point_2d"], list) and len(item["point_2d"]) == 2)
        value += good / len(items)
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", response, re.DOTALL)
    items = json.loads(match[1]) if match else []
    boxes = np.array([i["bbox_2d"] for i in items])[:120]
    points = np.array([i["point_2d"] for i in items])[:120]
    gt_boxes = np.array([t["bbox_2d"] for t in truth])[:120]
    gt_points = np.array([t["point_2d"] for t in truth])[:120]
    left_top = np.maximum(boxes[:, None, :2], gt_boxes[None, :, :2])
    right_bottom = np.minimum(boxes[:, None, 2:], gt_boxes[None, :, 2:])
    inter = np.prod(np.maximum(0, right_bottom - left_top + 1), axis=2)
    area, gt_area = (np.prod(b[:, 2:] - b[:, :2] + 1, axis=1) for b in (boxes, gt_boxes))
    iou = (inter / (area[:, None] + gt_area[None] - inter) > 0.5).astype(float)
    near = (np.mean(np.abs(boxes[:, None] - gt_boxes[None]), axis=2) < 10).astype(float)
    close = np.sqrt(np.sum((points[:, None] - gt_points[None]) ** 2, axis=2)) < 30
    inside = np.all((points >= boxes[:, :2]) & (points <= boxes[:, 2:]), axis=1)
    cost = 3.0 - (iou + near + (close & inside[:, None]))
    rows, columns = linear_sum_assignment(cost)
    value += (3 * len(rows) - cost[rows, columns].sum()) / max(len(boxes), len(gt_boxes))
    pieces = [piece.strip() for piece in response.split(".") if piece.strip()]
    return value + (1.0 if len(pieces) - len(set(pieces)) < 2 else 0.0)


def case(rng: np.random.Generator, n: int) -> tuple[str, str]:
    """Return a response of typical length that is close to the truth, and the truth as JSON."""
    corners = rng.integers(0, 600, (n, 2))
    boxes = np.concatenate([corners, corners + rng.integers(40, 200, (n, 2))], axis=1)
    points = (boxes[:, :2] + boxes[:, 2:]) // 2

    def objects(shift: int) -> list[dict]:
        moved = boxes + rng.integers(-shift, shift + 1, boxes.shape)
        centres = points + rng.integers(-shift, shift + 1, points.shape)
        pairs = zip(moved.tolist(), centres.tolist(), strict=True)
        return [{"bbox_2d": b, "point_2d": p} for b, p in pairs]

    thought = " ".join(f"word{k}" for k in rng.integers(0, 500, 180))
    answer = json.dumps(objects(8))
    return f"<think>{thought}</think>\n<answer>{answer}</answer>", json.dumps(objects(0))


def rate(score: Callable[[str, str], object], cases: list, seconds: float) -> float:
    """Return responses per second in the best of five rounds."""
    best = 0.0
    for _ in range(5):
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds / 5:
            for response, truth in cases:
                score(response, truth)
            done += len(cases)
        best = max(best, done / spent)
    return best


def throughput(seconds: float) -> None:
    """Print responses per second by number of objects."""
    print("objects   plain/s     ktg/s  ratio   visionreasoner/s  ratio")
    ktg, lineage = load_reward("ktg"), load_reward("visionreasoner")
    rng = np.random.default_rng(0)
    for n in SIZES:
        cases = [case(rng, n) for _ in range(64 if n < 100 else 8)]
        for response, truth in cases[:8]:
            baseline, plain = lineage.score(response, truth).reward, plain_reward(response, truth)
            assert abs(baseline - plain) < 1e-9, (baseline, plain)
        base = rate(plain_reward, cases, seconds)
        rates = [rate(reward.score, cases, seconds) for reward in (ktg, lineage)]
        cells = "".join(f"{r:12.0f} {r / base:6.1f}" for r in rates)
        print(f"{n:4} x {n:<4}{base:9.0f}{cells}")


def step(seconds: float) -> None:
    """Print the milliseconds of a GRPO step's responses."""
    rng = np.random.default_rng(1)
    cases = [case(rng, int(n)) for n in rng.integers(1, 4, 16 * 8)]
    for name in ("ktg", "ktg-zero-target", "visionreasoner"):
        milliseconds = 1000 * len(cases) / rate(load_reward(name).score, cases, seconds)
        print(f"a step's 16 x 8 responses, {name}: {milliseconds:.1f} ms")


def lengths() -> None:
    """Print seconds per MB at three lengths; they are equal for a linear parser."""
    reward = load_reward("ktg")
    truth = [{"bbox_2d": [1, 1, 9, 9], "point_2d": [5, 5]}]
    item = json.dumps(truth[0])
    shapes: dict[str, Callable[[int], str]] = {
        "blanks": lambda n: "<answer>" + " " * n,
        "tags": lambda n: "<think>" * (n // 7),
        "pairs of tags": lambda n: "<answer></answer>" * (n // 17),
        "brackets": lambda n: f"<think></think><answer>{'[' * n}</answer>",
        "digits": lambda n: f"<think></think><answer>[{'1' * n}]</answer>",
        "quotes": lambda n: "<think></think><answer>" + '"' * n + "</answer>",
        "objects": lambda n: (
            f"<think></think><answer>[{', '.join([item] * (n // (len(item) + 2)))}]</answer>"
        ),
    }
    print("seconds a MB  " + "".join(f"{n // 1000:>9} kB" for n in LENGTHS))
    for name, make in shapes.items():
        cells = []
        for n in LENGTHS:
            response, times = make(n), []
            for _ in range(5):
                started = time.perf_counter()
                reward.score(response, truth)
                times.append(time.perf_counter() - started)
            cells.append(f"{min(times) * 1e6 / n:12.4f}")
        print(f"{name:<14}{''.join(cells)}")


def startup() -> None:
    """Print the seconds of importing rewards and of the command line."""
    code = (
        "import sys, time; t = time.perf_counter(); import reward_fns; "
        "reward_fns.load_reward('ktg'); print(time.perf_counter() - t); "
        "print([m for m in ('torch', 'ray', 'vllm', 'scipy', 'numpy') if m in sys.modules])"
    )
    times, heavy = [], ""
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        out.check_returncode()
        seconds, heavy = out.stdout.split("\n")[:2]
        times.append(float(seconds))
    print(f"import reward_fns and load ktg: {min(times):.3f} s; of the heavy modules: {heavy}")
    line = '{"response": "", "ground_truth": "A"}\n'
    command = [sys.executable, "-m", "rcot_rl.cli", "score", "aks"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, input=line, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    print(f"rcot score, one line, from nothing: {min(times):.3f} s")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    seconds = parser.parse_args().seconds
    throughput(seconds)
    step(seconds)
    lengths()
    startup()


if __name__ == "__main__":
    main()
