"""What a training step of each objective computes: the table of docs/algorithms.md, from the accounting of a step.

``python -m megatron_ktr.accounting.objective_costs FILE`` writes the table anew between its markers in FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ktr.accounting.flops import count_step
from megatron_ktr.accounting.rates import settings_of
from megatron_ktr.accounting.work import GroupWork, video_grid
from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.objective_registry import available_objectives
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.objectives import build_objective
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

BEGIN, END = "<!-- costs of objectives -->", "<!-- end of costs -->"
SIZE = "7B"
NUM_FRAMES, TOKENS_PER_FRAME, NUM_TEXT_TOKENS, NUM_RESPONSES, RESPONSE_LENGTH = 32, 128, 200, 8, 768
BASE = "grpo"
OF_UPDATE = ("policy_forward", "policy_backward", "policy_recompute")


def costs_table(names: Sequence[str] | None = None) -> str:
    """The table as Markdown: a line for each of ``names``, by default for every objective.

    Each objective has its own defaults. The step has one prompt with a video, whose size the constants of this module
    say, and every part of the model is trained.
    """
    rows = {name: _row(name) for name in dict.fromkeys([BASE, *(names or available_objectives())])}
    base = rows[BASE][-1]
    lines = ["| `--objective` | passes without gradient | also sampled | operations of a step |"]
    lines.append("|---|---|---|---|")
    for name in names or available_objectives():
        passes, second, flops = rows[name]
        lines.append(f"| `{name}` | {', '.join(passes) or 'none'} | {second or 'nothing'} | {flops / base:.2f} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """``page`` with the table written anew between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{costs_table()}\n{END}{after}"


def _row(name: str) -> tuple[list[str], str, float]:
    """(passes of a step without gradient, what is sampled besides, operations of the step)."""
    config = config_from_values({"objective": name, "num_generations": NUM_RESPONSES})
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    model = PUBLISHED_CONFIGS[SIZE]
    video = video_grid(NUM_FRAMES, tokens_per_frame=TOKENS_PER_FRAME, vision=model.vision)
    work = GroupWork(NUM_TEXT_TOKENS, (RESPONSE_LENGTH,) * NUM_RESPONSES, video_grids=(video,))
    flops = count_step(model, [work], settings=settings_of(StepOptions.of(config), objective))
    passes = [one for one, value in flops.by_pass().items() if value and one not in OF_UPDATE]
    return passes, _also_sampled(config), flops.total


def _also_sampled(config: Config) -> str:
    if config.objective.is_supervised:
        return ""
    rollout = config.rollout
    parts = [f"{rollout.num_shuffled} responses to shuffled frames"] if rollout.num_shuffled else []
    parts += ["the groups that the filter rejects"] if rollout.filter_groups != "off" else []
    return ", ".join(parts)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_atomically(path, with_table(path.read_text(encoding="utf-8")))
