"""Reward components: the paper's terms and optional ones, one pure function each."""
