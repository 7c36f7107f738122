"""J, F and J&F of predicted masks, and intervals for rewards. Start at `benchmarks.evaluate`."""
