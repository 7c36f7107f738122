"""The checks of `rcot preflight`, one room each; `cluster/plan.py` runs them and prints."""
