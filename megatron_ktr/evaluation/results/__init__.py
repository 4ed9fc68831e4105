"""Figures of an evaluation, and what shows them: tables, comparison, page."""
