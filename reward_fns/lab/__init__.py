"""Tools to inspect a reward without training: contract check, explanation, exploits."""
