"""Checks and pictures of finished shards."""
