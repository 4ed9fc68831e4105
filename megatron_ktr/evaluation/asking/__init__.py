"""Asks what an output directory lacks: questions of items, controls, votes, the loop, and the store of answers."""
