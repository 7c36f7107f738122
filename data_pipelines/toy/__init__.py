"""Procedurally generated corpora, written in the five public layouts."""
