"""Imports go down: a room imports from floors below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "rcot_rl.cli": 7,
    "rcot_rl.chain": 6,
    "rcot_rl.stages": 6,
    "rcot_rl.study_runs": 6,
    "cluster": 5,
    "rcot_rl.annotation": 5,
    "rcot_rl.runfolder": 5,
    "rcot_rl.runlock": 5,
    "rcot_rl.training": 4,
    "rcot_rl.inference": 4,
    "rcot_rl.evaluation": 4,
    "rcot_rl.monitoring": 4,
    "rcot_rl.plugin": 5,
    "rcot_rl.tiny": 5,
    "rcot_rl.segmentation": 3,
    "data_pipelines": 3,
    "reward_fns": 2,
    "rcot_rl": 1,
}
TOPS = ("rcot_rl", "cluster", "data_pipelines", "reward_fns")
SAME_FLOOR = {4}
"""Floors whose rooms do not import one another."""


def room_of(module: str) -> str:
    """Return the longest key of FLOORS that is `module` or a package of it."""
    return max(
        (r for r in FLOORS if module == r or module.startswith(f"{r}.")), key=len, default=""
    )


def imports(file: Path) -> set[str]:
    """Return the modules of this project that a file imports, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {m for m in modules if m.split(".")[0] in TOPS}


def upward() -> set[tuple[str, str]]:
    """Return (file, imported room) of every import that goes up, or across a floor."""
    imports_up = set()
    for top in TOPS:
        for file in (ROOT / top).rglob("*.py"):
            name = file.relative_to(ROOT)
            own_room = room_of(".".join(name.with_suffix("").parts))
            for module in imports(file):
                room = room_of(module)
                across = FLOORS[room] == FLOORS[own_room] and FLOORS[own_room] in SAME_FLOOR
                if room != own_room and (FLOORS[room] > FLOORS[own_room] or across):
                    imports_up.add((str(name), room))
    return imports_up


def test_imports_go_down() -> None:
    assert upward() == set()
