"""The checks of `rcot preflight`, one file per subject; `plan.py` runs them."""
