"""The test files that take longest, the dearest first: they are started first, so that the last ones to run are short.

Processor seconds of each file with all processes it starts, as measured on the CPU stack, are what it is sorted by. A
file that is missing here costs little, or is new; a name that is wrong costs nothing but the order, and
``tests/house/test_makefile.py`` finds it.
"""

from __future__ import annotations

from pathlib import PurePath

DEAREST_FIRST = (
    "step/test_training_step.py",
    "run/test_checkpoint.py",
    "policy/test_rollout_offload.py",
    "objectives/test_tw_grpo.py",
    "run/test_online_training.py",
)

_PLACES = {name: place for place, name in enumerate(DEAREST_FIRST)}


def place_of(path: PurePath) -> int:
    """Where a test file stands in the order; all that are not named come last, as they were."""
    return _PLACES.get("/".join(path.parts[-2:]), len(_PLACES))
