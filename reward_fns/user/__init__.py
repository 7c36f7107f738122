"""Users' reward functions: found, loaded and called in a separate process."""
