"""JSON of users' files: whatever is wrong with one is a ``ValueError``, or a ``UserError`` that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError


def parse_json(text: str) -> Any:
    """``json.loads``, whose every refusal is a ``ValueError``: also of what is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path | str, *, option: str = "") -> Any:
    """The value in a file; ``option`` is the one that names it, for the message.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option and f'{option}: '}{path} cannot be read as JSON: {_words(error)}") from error


def read_json_object(path: Path | str, *, option: str = "") -> dict[str, Any]:
    """Likewise, of a file that holds one object."""
    value = read_json(path, option=option)
    if not isinstance(value, dict):
        raise UserError(f"{option and f'{option}: '}expected one JSON object in {path}, got {type(value).__name__}")
    return value


def _words(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
