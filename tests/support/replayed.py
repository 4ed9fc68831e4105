"""Options of a run of recorded responses: plain GRPO on a tiny model, seconds long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model


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


def write_text_replay(folder: Path) -> Path:
    """Writes ``model/`` and ``rollouts.jsonl``: text questions with recorded responses, of which some earned more."""
    save_tiny_model(folder / "model", corpus=corpus(), hidden_size=32, ffn_size=64, num_layers=2, vision_hidden_size=32)
    words = corpus()[0].split()
    with (folder / "rollouts.jsonl").open("w") as file:
        for number in range(8):
            responses = [{"text": " ".join(words[k : k + 4]), "reward": (number + k) % 3} for k in range(3)]
            file.write(json.dumps({"problem_id": str(number), "problem": "red", "responses": responses}) + "\n")
    return folder
