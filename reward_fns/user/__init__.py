"""Users' reward functions: found, loaded and called in a process of their own."""
