"""Metrics files, terminal output, and the HTML pages of runs."""
