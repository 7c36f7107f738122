"""Names are unique in the product, so that a search for one finds one thing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    file
    for top in ("rcot_rl", "reward_fns", "data_pipelines", "cluster")
    for file in sorted((ROOT / top).rglob("*.py"))
]
MODULES = [file.stem for file in FILES if not file.stem.startswith("__")]
PACKAGES = [file.parent.name for file in FILES if file.name == "__init__.py"]


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def test_module_names_are_unique() -> None:
    assert repeated(MODULES) == []


def test_no_module_is_called_like_a_package() -> None:
    assert set(MODULES) & set(PACKAGES) == set()


def test_class_names_are_unique() -> None:
    classes = [
        node.name
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert repeated(classes) == []
