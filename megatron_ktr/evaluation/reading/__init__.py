"""Reads published files as items, and finds their media."""
