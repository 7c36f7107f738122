"""Check finished shards, and show their rows."""
