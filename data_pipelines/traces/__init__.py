"""Descriptions and reasoning: texts, the trace filter, the response cache."""
