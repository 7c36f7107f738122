"""J, F and J&F of predicted masks. Start at `benchmarks.evaluate`."""
