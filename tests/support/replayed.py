"""Options of a run of recorded responses: plain GRPO on a tiny model, seconds long."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def replay_values(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """``inputs`` holds ``model/`` and ``rollouts.jsonl`` with three responses a question."""
    return {
        "model": str(inputs / "model"),
        "prompt_template": str(inputs / "model" / "prompt_template.txt"),
        "replay_path": str(inputs / "rollouts.jsonl"),
        "num_generations": 3,
        "objective": "grpo",
        "kl_beta": 0.0,
        "length_bonus": 0.0,
        "lr": 1e-3,
        "run_dir": str(run_dir),
        **changes,
    }
