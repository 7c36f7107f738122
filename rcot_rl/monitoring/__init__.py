"""Metrics files, W&B and the report page."""
