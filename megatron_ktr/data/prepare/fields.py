"""Reads single fields of published records: texts, numbers, media paths, clips.

Every function raises ``ValueError`` that names the field and what was expected. Published files are not trusted: texts
have limits, and a path never leads out of the media root.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron_ktr.data.prepare.layout import Keyed, Options

MAX_TEXT = 100_000
"""Characters of a question, an option or an answer. The longest prompts have about this many."""
MAX_PATH = 4096
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_OPTION_COLUMN = re.compile(
    r"(?:(?:options?|opt|choices?|candidates?|answer|a)[ _-]?\d{1,2}|(?:(?:options?|opt|choices?|answer)[ _-]?)?[a-h])",
    re.IGNORECASE,
)
_MOST_SECONDS = 1e9
_EXTRA_CHARS = 10_000


def fields_of(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, Keyed):
        raise ValueError("expected an array of records or one a line, got a file that is one object")
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    return raw


def has_fields(raw: Any, *names: str) -> bool:
    """Whether ``raw`` is an object with all these fields."""
    return isinstance(raw, dict) and all(name in raw for name in names)


def text(raw: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that says something, as text without blanks around it; numbers are written out."""
    for name in names:
        value = raw.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return plain_text(value, name=name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"expected text in '{name}', got {short(value)}")
    raise ValueError(f"expected text in {_or(names)}, which is missing or empty")


def refuse_option_columns(raw: Mapping[str, Any], *, read: Collection[str] = ()) -> None:
    """Raises ``ValueError`` for a row whose options stand in columns that nobody reads (A, B, ..., option_1, ...): the
    question would be asked without them. ``read`` are the columns that are read as something else."""
    found = [
        name for name in raw if name not in read and _OPTION_COLUMN.fullmatch(name) and raw[name] not in (None, "")
    ]
    if len(found) >= 2:
        raise ValueError(
            f"the columns {short(found)} look like options, which are not read: name them with --from plain "
            f"--columns options={'+'.join(found)[:80]}"
        )


def optional_text(raw: Mapping[str, Any], *names: str) -> str:
    """Like ``text``, but "" where the fields are missing or empty."""
    if all(raw.get(name) is None or raw.get(name) == "" for name in names):
        return ""
    return text(raw, *names)


def plain_text(value: Any, *, name: str) -> str:
    """The text without blanks around it."""
    return whole_text(value, name=name).strip()


def whole_text(value: Any, *, name: str) -> str:
    """The text as it is, which is not too long and has no control characters but line ends and tabs."""
    if not isinstance(value, str):
        raise ValueError(f"expected text in '{name}', got {short(value)}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"'{name}' has {len(value)} characters, more than {MAX_TEXT}")
    if found := _CONTROL.search(value):
        raise ValueError(f"'{name}' has the control character U+{ord(found.group()):04X}")
    return value


def seconds(value: Any, *, name: str) -> float:
    """A time from 0 to 10^9 seconds, given as a number or, as in CSV files, as its text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_SECONDS:
        raise ValueError(f"expected seconds in '{name}', got {short(value)}")
    return value


def span(start: Any, end: Any, *, name: str) -> tuple[float, float]:
    """Start and end in seconds; the end is after the start."""
    first, last = seconds(start, name=name), seconds(end, name=name)
    if last <= first:
        raise ValueError(f"expected '{name}' to end after its start, got {written(first)} to {written(last)} seconds")
    return first, last


def clip(start: Any, end: Any, *, name: str) -> dict[str, float]:
    """The fields ``video_start`` and ``video_end`` of a record; none if there is neither start nor end."""
    if start in (None, "") and end in (None, ""):
        return {}
    first, last = span(start, end, name=name)
    return {"video_start": first, "video_end": last}


def written(value: float) -> str:
    """A number of seconds with at most 3 decimals.

    >>> written(24.30), written(30), written(1234567.0004)
    ('24.3', '30', '1234567')
    """
    return f"{value:.3f}".rstrip("0").rstrip(".")


def media_path(value: Any, options: Options, *, name: str) -> str:
    """A path below the media root, as records have it: no leading "/" or "./", with the prefixes of ``options``."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a path in '{name}', got {short(value)}")
    if len(value) > MAX_PATH:
        raise ValueError(f"the path in '{name}' has {len(value)} characters")
    if _CONTROL.search(value) or "\n" in value or "\r" in value or "\t" in value:
        raise ValueError(f"the path in '{name}' has control characters: {short(value)}")
    path = value.strip().replace("\\", "/")
    if options.strip_prefix and path.startswith(options.strip_prefix):
        path = path[len(options.strip_prefix) :]
    if _SCHEME.match(path):
        raise ValueError(f"expected a file's path in '{name}', got {short(value)}")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError(f"the path in '{name}' leads out of the media root: {short(value)}")
    folder = "/" if path.endswith("/") else ""  # the path of a folder of pictures
    return "/".join([*(part for part in options.add_prefix.split("/") if part), *parts]) + folder


def media_paths(value: Any, options: Options, *, name: str) -> list[str]:
    """The paths of a list, or the one path."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"expected paths in '{name}', got an empty list")
    return [media_path(one, options, name=name) for one in values]


def video_of_id(value: Any, options: Options, *, name: str) -> str:
    """The path of a video of which the layout gives the id: ``video_map``'s path or the id, with ``video_suffix``."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    path = media_path(value, Options(strip_prefix=options.strip_prefix), name=name).rstrip("/")
    if options.video_map:
        found = options.video_map.get(path)
        if found is None:
            raise ValueError(f"--video-map has no video {short(path)}")
        path = found
    if not path.lower().endswith(options.video_suffix.lower()):
        path += options.video_suffix
    return media_path(path, Options(add_prefix=options.add_prefix), name=name)


def extras(raw: Mapping[str, Any], names: Iterable[str | tuple[str, str]]) -> dict[str, Any]:
    """Plain data that records keep for wordings and reports: the named fields, or (published name, name in records).

    Only texts, numbers and lists of them, each of moderate length; others are left out.
    """
    kept = {}
    for name in names:
        source, target = (name, name) if isinstance(name, str) else name
        value = raw.get(source)
        if _is_plain(value) or (isinstance(value, list) and 0 < len(value) <= 256 and all(map(_is_plain, value))):
            kept[target] = value
    return kept


def short(value: Any) -> str:
    """A value for a message."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list nested too deeply
        shown = f"a long {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= _EXTRA_CHARS and not _CONTROL.search(value)
    return isinstance(value, bool) or (isinstance(value, int | float) and is_finite(value))


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
