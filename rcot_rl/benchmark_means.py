"""How a benchmark's J&F is made of its expressions' scores.

The evaluation makes the figure and the reports show its change: both have this rule from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SUBSET_MEANS: Mapping[str, tuple[str, ...]] = {"revos": ("referring", "reasoning")}
"""Benchmarks whose figure is the unweighted mean of their subsets' means; others are not counted.

All other benchmarks take the mean over all expressions.
"""

DECIMALS: Mapping[str, int] = {"revos": 2}
"""Benchmarks that round J and F of an expression, in percent, before they are averaged."""


def rounded(dataset: str | None, values: Any) -> np.ndarray:
    """Return J or F of expressions, in percent, as the benchmark's means take them."""
    array, decimals = np.asarray(values, dtype=float), DECIMALS.get(dataset or "")
    return array if decimals is None else np.round(array, decimals)


def is_counted(dataset: str | None, subset: str | None) -> bool:
    """Return True if the benchmark's figure counts expressions of this subset."""
    subsets = SUBSET_MEANS.get(dataset or "")
    return subsets is None or subset in subsets
