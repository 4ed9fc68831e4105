"""Evaluation between the steps of a run."""
