"""Rules of the options of the second prompt of a group, which asks for responses to shuffled frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config.objective_registry import objective_entry

if TYPE_CHECKING:
    from megatron_ktr.config import Config


def problems(config: Config) -> Iterator[str]:
    """One sentence for each problem; none where nothing is asked twice.

    An objective without the bonus passes the two other options over: a comparison of algorithms changes one line of a
    run file, its objective.
    """
    rollout, name = config.rollout, config.objective.objective
    entry = objective_entry(name)
    if rollout.temporal_bonus and entry.is_supervised:
        yield f"--temporal-bonus: --objective {name} samples no responses that it could compare"
    elif not rollout.temporal_bonus and "temporal_bonus" in entry.defaults and rollout.temporal_responses is not None:
        yield "--temporal-responses is not read with --temporal-bonus 0, which asks for no second prompt"
