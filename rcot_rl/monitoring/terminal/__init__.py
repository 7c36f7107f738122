"""What a run prints to a terminal."""
