"""How a benchmark averages the scores of its expressions into J&F.

The evaluation and the reports share this rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SUBSET_MEANS: Mapping[str, tuple[str, ...]] = {"revos": ("referring", "reasoning")}
"""Benchmark -> subsets; its J&F is the unweighted mean of their means, without other subsets.

All other benchmarks take the mean over all expressions.
"""

DECIMALS: Mapping[str, int] = {"revos": 2}
"""Benchmark -> decimals to which it rounds J and F of an expression, in percent."""


def rounded(dataset: str | None, values: Any) -> np.ndarray:
    """Return J or F of expressions, in percent, as the benchmark averages them."""
    array, decimals = np.asarray(values, dtype=float), DECIMALS.get(dataset or "")
    return array if decimals is None else np.round(array, decimals)


def is_counted(dataset: str | None, subset: str | None) -> bool:
    """Return True if the benchmark's J&F counts expressions of this subset."""
    subsets = SUBSET_MEANS.get(dataset or "")
    return subsets is None or subset in subsets
