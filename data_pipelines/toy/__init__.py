"""Procedurally generated corpora in the five public layouts."""
