"""The intervals of held-out rewards. They lie on a floor below, for the report shows them too."""

from rcot_rl.intervals import Interval, mean_interval, paired_difference

__all__ = ["Interval", "mean_interval", "paired_difference"]
