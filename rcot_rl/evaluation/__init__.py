"""J, F and J&F of predicted masks; the entry point is `benchmarks.evaluate`."""
