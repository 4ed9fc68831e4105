"""Compares the weights of servers by what they compute, because a label can be wrong.

Every server that takes new weights, or comes back, is asked for the log-probs of a few fixed tokens. Servers with the
same weights agree up to rounding. What it finds: another model, the weights of the start, layers that were not loaded.
What it cannot find: weights that differ by less than rounding does, such as those of one step before in 16 bits; the
metric ``sampler_trainer_logprob_gap`` shows whether all servers together are the trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rollout.server.wire import MalformedAnswer

TOKENS = range(10, 26)
"""Among the first of the vocabulary, which are text in every model of the family."""
Fingerprint = tuple[float, ...]
"""The log-probs of the tokens after the first one."""


def probe_body() -> bytes:
    """The request."""
    values = {
        "n": 1,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "detokenize": False,
        "ignore_eos": True,
    }
    return json.dumps({"token_ids": list(TOKENS), "sampling_params": values, "stream": False}).encode()


def read_fingerprint(answer: bytes, *, label: str) -> Fingerprint:
    """What the answer to ``probe_body`` says.

    Raises:
        MalformedAnswer: it is something else, or was computed with weights of another label.
    """
    try:
        found = parse_json(answer.decode("utf-8"))
        rows = found["prompt_logprobs"]
        (choice,) = found["choices"]
        labels = {str(span["version"]) for span in choice["weight_versions"]}
        if len(rows) != len(TOKENS) or rows[0] is not None:
            raise MalformedAnswer(f"{len(rows)} rows of log-probs of {len(TOKENS)} tokens")
        values = tuple(_logprob(row, token) for row, token in zip(rows[1:], TOKENS[1:], strict=True))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise MalformedAnswer(f"no log-probs of its weights ({type(error).__name__}: {error})") from None
    if labels != {label}:
        raise MalformedAnswer(f"it computes with weights {', '.join(sorted(labels))}, expected {label}")
    return values


def _logprob(row: Mapping[str, Mapping[str, float]], token: int) -> float:
    value = float(row[str(token)]["logprob"])
    if not math.isfinite(value):
        raise ValueError(f"a log-prob of {value}")
    return value


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """The mean difference of log-probs, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def agreed(
    found: Mapping[str, Fingerprint], *, before: Mapping[str, Fingerprint] | None = None, limit: float
) -> list[str] | None:
    """The servers to believe after an update: all if their fingerprints are within ``limit`` of one another, or more
    than half; None if there are no such servers. A lone server agrees with itself.

    Where they disagree, those are left out first that compute to the last bit what they did ``before`` the update,
    unless all do: they have not loaded anything.

    >>> agreed({"a": (1.0,), "b": (1.0,), "c": (3.0,)}, limit=0.1)
    ['a', 'b']
    >>> agreed({"a": (1.0,), "b": (3.0,)}, limit=0.1) is None
    True
    >>> agreed({"a": (1.0,), "b": (3.0,)}, before={"a": (1.0,), "b": (1.0,)}, limit=0.1)
    ['b']
    """
    urls = list(found)
    if all(distance(found[urls[0]], found[url]) <= limit for url in urls):
        return urls
    has_changed = [url for url in urls if found[url] != (before or {}).get(url)]
    believed = has_changed or urls
    for one in believed:
        near = [url for url in believed if distance(found[one], found[url]) <= limit]
        if 2 * len(near) > len(believed):
            return near
    return None
