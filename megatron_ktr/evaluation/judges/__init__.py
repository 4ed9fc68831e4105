"""Judges of published harnesses, with their slips, one file for each: pure functions of an item and a response.

A matcher (``holmes_letter``, ``first_capital``, ...) does what the harness does with the text it gets. The ``judge`` of
the same file says which text that is, and compares what was matched with the right answer. ``Verdict.answer`` is None
where a harness finds no answer. Some harnesses leave such answers out of the denominator; here they count as wrong, as
everywhere else, and their number stands in the table.
"""
