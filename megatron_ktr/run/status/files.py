"""Where ranks say what they do, and the words they use. Read by tools, so nothing large is imported here."""

from __future__ import annotations

from pathlib import Path

FOLDER = "status"
RUNNING, TRAINED, LEFT, FAILED = "running", "trained", "left", "failed"
"""The states of a rank: trained = the last step is done; left = ended before it, when asked to or by an alarm."""
RECENT_STEPS = 20
"""The last steps, by which the pace of a run and what looks wrong are judged."""


def rank_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank_{rank:05d}.json"
