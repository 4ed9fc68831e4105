"""Reads and writes JSON. Anything wrong with a user's file raises ``ValueError``, or ``UserError`` naming the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import MOST_JSON_BYTES, read_text


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` that raises only ``ValueError``, even for JSON that is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path | str, *, option: str = "") -> Any:
    """Reads the value in a file; ``option`` is the command-line option that names the file, for the error message.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_text(path, most_bytes=MOST_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"{option and f'{option}: '}{path} cannot be read as JSON: {_words(error)}") from error


def read_json_object(path: Path | str, *, option: str = "") -> dict[str, Any]:
    """Reads a file that must hold one JSON object; otherwise like ``read_json``."""
    value = read_json(path, option=option)
    if not isinstance(value, dict):
        raise UserError(f"{option and f'{option}: '}expected one JSON object in {path}, got {type(value).__name__}")
    return value


def _words(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def to_json(value: Any, **options: Any) -> str:
    """Like ``json.dumps``, but with null for numbers that are not finite, so that every JSON reader accepts it.

    Python's own NaN and Infinity are not part of JSON.

    >>> to_json({"loss": float("nan"), "steps": [1, float("inf")]})
    '{"loss": null, "steps": [1, null]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
