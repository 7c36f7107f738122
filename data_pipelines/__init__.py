"""Corpora to shards: readers, geometry, sampling plan, traces, rows, and procedurally made corpora."""
