"""A reward for an untrained model: its responses differ, so that every step has something to learn."""

from __future__ import annotations

from typing import Any


def uneven(response: str, record: dict[str, Any]) -> float:
    return len(response) % 5 / 5
