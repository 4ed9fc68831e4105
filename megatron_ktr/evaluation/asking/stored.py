"""Makes dataclasses of what the files of an output directory hold, which may have been damaged or edited by hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

LARGEST_WHOLE = 2**53
"""Whole numbers beyond it are no counts of anything, and too large for the arithmetic of means."""
_Class = TypeVar("_Class")


def made_of(cls: type[_Class], value: Any) -> _Class:
    """The object of a dataclass with these fields. Fields that are not there have their defaults.

    Raises:
        TypeError: a field is unknown, or one without a default is missing.
        ValueError: ``value`` is no JSON object, or a field has another type than the class says.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with the fields of {cls.__name__}, got {type(value).__name__}")
    hints = _hints(cls)
    return cls(**{name: _checked(part, hints.get(name, Any), name=name) for name, part in value.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(value: Any, hint: Any, *, name: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return made_of(typing.cast(type, hint), value)
    if origin is types.UnionType and value is None and types.NoneType in parts:
        return None
    if origin is types.UnionType:
        (hint,) = [part for part in parts if part is not types.NoneType]
        return _checked(value, hint, name=name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(part, parts[0], name=name) for part in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _checked(part, parts[1], name=name) for key, part in value.items()}
    if origin is Literal and isinstance(value, str) and value in parts:
        return value
    if isinstance(hint, type) and _is(value, hint):
        return value
    raise ValueError(f"{name} is {value!r:.80}")


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        # Half a character (a lone surrogate) cannot be written anywhere.
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= LARGEST_WHOLE and math.isfinite(value)
    return isinstance(value, kind) and not (isinstance(value, int) and abs(value) > LARGEST_WHOLE)
