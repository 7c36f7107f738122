"""Descriptions and traces: texts from files or templates, trace filter, response cache."""
