"""Checks before a run, and estimates of what it takes."""
