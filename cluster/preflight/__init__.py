"""Checks before a run, and the plan with its costs."""
