"""Imports go down: a room imports from floors below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "rcot_rl.cli": 7,
    "rcot_rl.chain": 6,
    "rcot_rl.data_stage": 6,
    "cluster": 5,
    "rcot_rl.annotation": 5,
    "rcot_rl.runfolder": 5,
    "rcot_rl.runlock": 5,
    "rcot_rl.doctor": 5,
    "rcot_rl.training": 4,
    "rcot_rl.inference": 4,
    "rcot_rl.evaluation": 4,
    "rcot_rl.monitoring": 4,
    "rcot_rl.tiny": 4,
    "rcot_rl.plugin": 5,
    "data_pipelines": 3,
    "reward_fns": 2,
    "rcot_rl": 1,
}
TOPS = ("rcot_rl", "cluster", "data_pipelines", "reward_fns")
SAME_FLOOR = {4}
"""Floors whose rooms do not import one another."""

EXCEPTIONS = {
    ("cluster/launch/local.py", "rcot_rl.chain"),
    ("rcot_rl/tiny/sam2_card.py", "rcot_rl.inference"),
    ("rcot_rl/tiny/sam2_eval.py", "rcot_rl.inference"),
    ("rcot_rl/tiny/sam2_train.py", "rcot_rl.inference"),
    ("rcot_rl/training/reward.py", "rcot_rl.inference"),
}
"""(importing file, imported module) that are left; the list may only shrink."""


def room_of(module: str) -> str:
    """The longest key of FLOORS that `module` is or lies in."""
    return max(
        (r for r in FLOORS if module == r or module.startswith(f"{r}.")), key=len, default=""
    )


def imports(file: Path) -> set[str]:
    """Modules of this project that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {m for m in found if m.split(".")[0] in TOPS}


def upward() -> set[tuple[str, str]]:
    """(importing file, room imported from) of every import that goes up, or across a floor."""
    found = set()
    for top in TOPS:
        for file in (ROOT / top).rglob("*.py"):
            name = file.relative_to(ROOT)
            own = room_of(".".join(name.with_suffix("").parts))
            for module in imports(file):
                room = room_of(module)
                across = FLOORS[room] == FLOORS[own] and FLOORS[own] in SAME_FLOOR
                if room != own and (FLOORS[room] > FLOORS[own] or across):
                    found.add((str(name), room))
    return found


def test_imports_go_down() -> None:
    assert upward() - EXCEPTIONS == set()


def test_every_exception_is_still_needed() -> None:
    assert EXCEPTIONS - upward() == set()
