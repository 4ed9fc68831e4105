"""The two models of a step."""

from __future__ import annotations

import enum


class ModelRole(enum.Enum):
    """Which model a pass runs."""

    POLICY = "policy"
    """The model that is trained."""
    REFERENCE = "reference"
    """The frozen model that the KL term measures the distance to."""
