"""Corpora to shards: readers, geometry, plan, traces, rows; and procedural corpora."""
