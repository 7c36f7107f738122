"""Followers of a run folder: Weights & Biases, TensorBoard and trackers of users."""
