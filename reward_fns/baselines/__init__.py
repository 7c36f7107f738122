"""Rewards of public projects, reproduced: VisionReasoner, Seg-Zero, Veason-R1."""
