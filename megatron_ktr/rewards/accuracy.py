"""Accuracy of a response by problem type, in [0, 1], under one of the protocols of ``protocols.py``.

Questions with several right letters can be rewarded in parts (TW-GRPO, arXiv 2505.24718). With S the answer's letters
and T the right ones, the reward is |S| / |T| if S is a subset of T, else 0. A single wrong letter costs the whole
reward; otherwise it would pay to name all letters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.rewards import math_answers, standard
from megatron_ktr.rewards.protocols import STANDARD, Judge, Protocol
from megatron_ktr.rewards.truth import Truth

ACCURACY_BY_TYPE: dict[str, Judge] = standard.JUDGES
"""The known problem types. Every protocol can judge all of them; "math" needs math-verify (``known_types``)."""


def known_types() -> list[str]:
    """The problem types that can be judged on this machine."""
    return sorted(kind for kind in ACCURACY_BY_TYPE if kind != "math" or math_answers.is_installed())


def accuracy(
    response: str,
    *,
    solution: str | int | float,
    problem_type: str,
    options: Sequence[str] = (),
    protocol: Protocol = STANDARD,
) -> float:
    """Accuracy of a response against ``solution`` (text with or without its ``<answer>`` tags, or a JSON number).

    Raises UserError for an unknown ``problem_type``, naming the known ones.
    """
    judge = protocol.judges.get(problem_type)
    if judge is None:
        raise UserError(f"problem_type {problem_type!r} is unknown, expected one of {sorted(protocol.judges)}")
    answer = protocol.finder_of(problem_type)(response)
    return 0.0 if answer is None else judge(answer, Truth.of(solution, options=options))


def accuracy_of_record(response: str, record: Mapping[str, Any], *, protocol: Protocol = STANDARD) -> float:
    """``accuracy`` on the record's ``solution``, ``problem_type`` and ``options``."""
    return accuracy(
        response,
        solution=record["solution"],
        problem_type=str(record["problem_type"]),
        options=record.get("options") or (),
        protocol=protocol,
    )


def with_soft_choice(protocol: Protocol) -> Protocol:
    """The same protocol, except that multiple choice with several right letters pays in parts (``soft_choice``)."""
    return dataclasses.replace(protocol, judges={**protocol.judges, "multiple choice": standard.soft_choice})
