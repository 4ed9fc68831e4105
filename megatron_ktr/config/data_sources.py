"""The value of ``--data-path``: one file of questions, or a mixture of several.

    --data-path questions.jsonl                     one file
    --data-path a.jsonl:0.7,b.jsonl:0.3             several: the number after the last colon is the weight
    --data-path a.jsonl,b.jsonl                     every record of both once an epoch
    data_path: [{path: a.jsonl, weight: 0.7, media_root: videos/a}, {path: b.jsonl, weight: 0.3}]      in a run file

A file of a mixture has a weight (its share of the prompts) or a number of epochs (how often its records are drawn while
the mixture goes round once). A mixture has one or the other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

MAX_PERIOD = 10**6
"""The most elements in which weights must come out even: 0.123456 and 0.876544 do, with a digit more they do not."""
MAX_SOURCES = 1000
_TEXT_WITH_WEIGHT = re.compile(r"(?P<path>.*):(?P<weight>\d+\.?\d*|\.\d+)", re.DOTALL)
_MOST = 1e6
"""The largest weight or number of epochs."""


@dataclass(frozen=True)
class DataSource:
    """One file of questions in a mixture. None means the option of the same name, for all files."""

    path: str
    weight: float | None = None
    """Its share of the prompts, relative to the weights of the others."""
    epochs: float | None = None
    """How often its records are drawn while the mixture goes round once."""
    name: str | None = None
    """Its name in metrics; None means the file's name without its suffix."""
    media_root: str | None = None
    prompt_template: str | None = None
    reward_functions: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem


def parse_data_path(value: Any) -> str | tuple[DataSource, ...]:
    """The value of the option: a single path stays a text, anything more becomes sources.

    Raises:
        ValueError: says what was expected.
    """
    if isinstance(value, str):
        items: list[Any] = [part.strip() for part in value.split(",")] if "," in value else [value]
    else:
        items = list(value) if isinstance(value, list | tuple) else [value]
    if not items or "" in items:
        raise ValueError("expected the path of a file, or several with weights, and one of them is empty")
    if len(items) > MAX_SOURCES:
        raise ValueError(f"expected at most {MAX_SOURCES} files, got {len(items)}")
    sources = tuple(map(_source_of, items))
    (first, *others) = sources
    is_plain = not others and first == DataSource(first.path) and "," not in first.path
    if is_plain and _TEXT_WITH_WEIGHT.fullmatch(first.path) is None:
        return first.path
    _check_together(sources)
    return sources


def draws_of_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of ``weights``, exactly as their decimals were written.

    >>> draws_of_weights([0.7, 0.3])
    (7, 3)

    Raises:
        ValueError: their sum, the length of a period, exceeds ``MAX_PERIOD``.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    draws = tuple(number // divisor for number in whole)
    if sum(draws) > MAX_PERIOD:
        raise ValueError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} come out even only after {sum(draws)} "
            f"prompts, at most {MAX_PERIOD} are possible: write them with fewer digits"
        )
    return draws


def _source_of(item: Any) -> DataSource:
    if isinstance(item, str):
        match = _TEXT_WITH_WEIGHT.fullmatch(item)
        given: dict[str, Any] = match.groupdict() if match else {"path": item}
    elif isinstance(item, DataSource):
        given = dataclasses.asdict(item)
    elif isinstance(item, Mapping):
        given = {str(key): value for key, value in item.items()}
    else:
        raise ValueError(f"expected a path, or a mapping with the key path, got {_short(item)}")
    names = [field.name for field in dataclasses.fields(DataSource)]
    if unknown := given.keys() - set(names):
        raise ValueError(f"unknown key {_short(min(unknown))} of a file, expected some of {', '.join(names)}")
    given = {name: value for name, value in given.items() if value is not None}
    if "path" not in given:
        raise ValueError(f"expected the key path of every file, got {_short(item)}")
    values = {name: _READERS[name](name, value) for name, value in given.items()}
    return DataSource(**values)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"expected {name} of a file to be text, got {_short(value)}")
    return value


def _label(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text.isprintable() or len(text) > 100:
        raise ValueError(f"expected {name} of a file to be a short line, got {_short(value)}")
    return text


def _number(name: str, value: Any) -> float:
    # YAML 1.1 reads 1e-1 (no dot) as text, so numbers are accepted as text too.
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= _MOST:
        raise ValueError(f"expected {name} of a file to be a number > 0 and <= {_MOST:g}, got {_short(value)}")
    return number


def _texts(name: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(f"expected {name} of a file to be a list of names, got {_short(value)}")
    names = tuple(_text(name, item).strip() for item in items)
    if len(set(names)) < len(names):
        raise ValueError(f"{name} of a file names the same item twice: {', '.join(names)}")
    return names


_READERS = {
    "path": _text,
    "weight": _number,
    "epochs": _number,
    "name": _label,
    "media_root": _text,
    "prompt_template": _text,
    "reward_functions": _texts,
}


def _check_together(sources: Sequence[DataSource]) -> None:
    labels = [source.label for source in sources]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two files are called {repeated[0]!r}: give each a name of its own (name: in a run file)")
    if len(sources) == 1 and (sources[0].weight or sources[0].epochs):
        raise ValueError(
            f"a weight or epochs are of several files, and {sources[0].path} is alone (a path that ends in a colon and "
            "a number stands under the key path in a run file)"
        )
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return
    if any(source.epochs is not None for source in sources):
        raise ValueError("weight and epochs cannot be mixed: give every file a weight, or none of them")
    if len(weights) < len(sources):
        without = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"{without} has no weight: give every file one, or none of them")
    draws_of_weights(weights)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def sources_of(value: str | tuple[DataSource, ...] | None) -> tuple[DataSource, ...]:
    """The files of a value of the option; empty without any."""
    if value is None:
        return ()
    return (DataSource(value),) if isinstance(value, str) else value
