"""Rules between the options by which a run is watched. ``checks.py`` applies them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ktr.config import Config

MOST_PROFILED = 100
"""Steps of a trace. A tiny model's step is some megabytes of JSON, a large one's hundreds."""


def problems(config: Config) -> Iterator[str]:
    """One sentence for each rule that is broken."""
    section = config.resilience
    if steps := section.profile_steps:
        shown = ",".join(map(str, steps))
        if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
            yield f"--profile-steps takes the first and the last step, such as 11,13; got {shown}"
        elif steps[1] - steps[0] >= MOST_PROFILED:
            yield f"--profile-steps {shown} are {steps[1] - steps[0] + 1} steps: at most {MOST_PROFILED} fit a trace"
        elif config.trainer.train_steps is not None and steps[0] > config.trainer.train_steps:
            yield f"--profile-steps {shown} begin after the last step (--train-steps {config.trainer.train_steps})"
    if section.wandb_project is not None:
        if not section.wandb_project.strip():
            yield "--wandb-project must not be empty; none = no project"
        elif not _is_installed("wandb"):
            yield "--wandb-project needs the package wandb, which is not installed (pip install wandb)"
    if not section.metrics_host.strip():
        yield "--metrics-host must not be empty: 127.0.0.1, or the address of the network that may read the metrics"


def _is_installed(package: str) -> bool:
    """A folder of that name in the working directory, as wandb itself makes, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
