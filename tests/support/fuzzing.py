"""Settings of tests that draw hostile inputs: the same examples in every run, and no limit of time."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings


def fuzzed(num_examples: int) -> Any:
    return settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
