"""Where a run's processes live: starting them, watching them, and leaving none behind."""
