"""Processes of a stage: start, watch, judge, end."""
