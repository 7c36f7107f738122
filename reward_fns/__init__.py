"""Rewards: pure functions of a response and a ground truth, composed by YAML recipes."""

from reward_fns.score import Reward, Score, load_reward

__all__ = ["Reward", "Score", "load_reward"]
