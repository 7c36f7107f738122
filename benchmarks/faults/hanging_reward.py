"""A user's reward that hangs once if RCOT_FAULTS/reward exists, and removes that file first."""

import os
import time
from typing import Any


def reward(response: str, ground_truth: Any) -> float:
    """Return a number from 0 to 1 that depends on the response's length."""
    try:
        os.unlink(os.path.join(os.environ["RCOT_FAULTS"], "reward"))
    except FileNotFoundError:
        return len(response) % 7 / 6
    time.sleep(1e6)
    return 0.0
