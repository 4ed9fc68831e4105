"""Question files: Video-R1 style JSON or JSONL, checked once, and the paths in them.

A record after reading has all its own fields and, normalised,

    problem_id    text; the record's number where the file gives none
    problem       text of the question (absent where ``messages`` are given)
    data_type     "video", "image" or "text"
    problem_type  text, e.g. "multiple choice"; ""
    options       list of text; []
    media         list of (kind, path as written); several images or videos are allowed
    record_number where it stands in the file, from 1 (in JSONL the line); set by ``read_records``
    record_digest of what the file says, to notice other data on resuming; set by ``read_records``
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_ktr.errors import UserError

Record = dict[str, Any]
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_DATA_TYPE_SYNONYMS = {"frame": "video"}
"""MVBench in Video-R1's release marks videos that were joined from single frames; the path is a video all the same."""
_PATH_FIELDS = frozenset({"path", "image", "images", "video", "videos"})
_ROLES = ("system", "user", "assistant")


def read_records(
    path: Path | str, *, problem_types: Iterable[str] = (), option: str = "data_path", needs_solution: bool = True
) -> list[Record]:
    """All records of a JSON array or a JSONL file, checked; only those of ``problem_types``, if any are given.

    Raises:
        UserError: file missing, not JSON, empty, or a record that is not usable as a question; the message names
            the record's number (from 1; in JSONL the line) and what is wrong.
    """
    path = Path(path)
    records = []
    for number, raw in _read_raw(path, option=option):
        try:
            record = check_record(raw, number=number, needs_solution=needs_solution)
            records.append({**record, "record_number": number, "record_digest": record_digest(raw)})
        except ValueError as error:
            raise UserError(f"{option}: {path}, record {number}: {error}") from error
    kept_types = set(problem_types)
    kept = [record for record in records if not kept_types or record["problem_type"] in kept_types]
    if not kept:
        found = sorted({record["problem_type"] for record in records})
        reason = f"none of problem_types {sorted(kept_types)}; found {found}" if records else "no records at all"
        raise UserError(f"{option}: {path} has {reason}")
    return kept


def check_record(raw: Any, *, number: int, needs_solution: bool = True) -> Record:
    """One normalised record.

    Raises:
        ValueError: with what was expected and got, without file and number.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    record: Record = dict(raw)
    problem_id = raw.get("problem_id", str(number))
    if isinstance(problem_id, bool) or not isinstance(problem_id, str | int):
        raise ValueError(f"expected problem_id to be text or a whole number, got {problem_id!r}")
    record["problem_id"] = str(problem_id)
    if raw.get("messages") is not None:
        placed = _check_messages(raw["messages"])
    elif not isinstance(raw.get("problem"), str) or not raw["problem"].strip():
        raise ValueError(f"expected a question as text in 'problem', got {raw.get('problem')!r}")
    else:
        placed = []
    record["media"] = placed or _media_of(raw)
    record["data_type"] = _data_type(raw, record["media"])
    record["problem_type"] = _text(raw, "problem_type")
    record["options"] = _options(raw.get("options"))
    if needs_solution and (
        isinstance(raw.get("solution"), bool) or not isinstance(raw.get("solution"), str | int | float)
    ):
        raise ValueError(f"expected the right answer as text in 'solution', got {raw.get('solution')!r}")
    return record


def record_digest(raw: Any) -> str:
    """Of everything a record says, recorded responses and rewards included, however its JSON is laid out.

    Of a file it names only the last part of its path counts: data may be moved between two parts of a run.

    Raises:
        ValueError: text with half a character in it (a lone surrogate), which no tokenizer takes.
    """
    content = json.dumps(_without_directories(raw), sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128(content.encode()).hexdigest()


def _without_directories(value: Any, *, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _without_directories(inner, is_path=name in _PATH_FIELDS) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner, is_path=is_path) for inner in value]
    return value.replace("\\", "/").rpartition("/")[2] if is_path and isinstance(value, str) else value


def resolve_media_path(media_root: Path | str, written: str) -> Path:
    """The file that ``written`` names below ``media_root``; a leading "/" means the media root, as in Video-R1.

    Raises:
        UserError: the path leads out of the media root, by "..", by a drive or by a link.
    """
    root = Path(media_root).resolve()
    parts = PurePosixPath(written.replace("\\", "/")).parts
    if not written.strip() or "\0" in written or ".." in parts or any(":" in part for part in parts[:1]):
        raise UserError(
            f"media path {written!r}: expected a path below media_root {media_root}, without '..' or scheme"
        )
    inside = Path(written)
    if not (inside.is_absolute() and inside.is_relative_to(root)):
        inside = root.joinpath(*(part for part in parts if part != "/"))
    try:
        resolved = inside.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"media path {written!r} below media_root {media_root}: {error}") from error
    if not resolved.is_relative_to(root):
        raise UserError(
            f"media path {written!r} leads by a link out of media_root {media_root} (to {resolved}); "
            "set media_root to a directory that contains the linked files"
        )
    return resolved


def _read_raw(path: Path, *, option: str) -> list[tuple[int, Any]]:
    """(number, value) of each record; a file whose first character is "[" is one JSON array, else JSONL."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{option}: {path} is not valid JSON: {error}") from error
    numbered = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON text may contain U+2028
        if line.strip():
            try:
                numbered.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{option}: {path}, line {number} is not valid JSON: {error}; "
                    "expected a JSON array, or one object a line"
                ) from error
    return numbered


def _media_of(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    media: list[tuple[str, str]] = []
    for kind in ("image", "video"):
        for key in (kind, f"{kind}s"):
            media.extend((kind, written) for written in _paths(raw, key))
    if not media:
        for written in _paths(raw, "path"):
            guess = "image" if Path(written).suffix.lower() in _IMAGE_SUFFIXES else "video"
            kind = _declared_type(raw) or guess
            if kind == "text":
                raise ValueError(f"data_type is 'text', but it has the path {written!r}")
            media.append((str(kind), written))
    return media


def _paths(raw: Mapping[str, Any], key: str) -> list[str]:
    value = raw.get(key)
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    for written in values:
        if not isinstance(written, str) or not written.strip():
            raise ValueError(f"expected a path (or a list of paths) in '{key}', got {written!r}")
    return values


def _data_type(raw: Mapping[str, Any], media: list[tuple[str, str]]) -> str:
    kinds = {kind for kind, _ in media}
    declared = _declared_type(raw)
    if declared is None:
        return "video" if "video" in kinds else "image" if kinds else "text"
    if declared not in ("video", "image", "text"):
        raise ValueError(f"expected data_type to be video, image or text, got {declared!r}")
    if declared != "text" and declared not in kinds:
        raise ValueError(f"data_type is '{declared}', but it names no {declared} (keys: path, {declared})")
    return str(declared)


def _declared_type(raw: Mapping[str, Any]) -> Any:
    declared = raw.get("data_type")
    return _DATA_TYPE_SYNONYMS.get(declared, declared) if isinstance(declared, str) else declared


def _options(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise ValueError(f"expected options to be a list of text, got {value!r}")
    return value


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"expected {key} to be text, got {value!r}")
    return value


def _check_messages(messages: Any) -> list[tuple[str, str]]:
    """Checks a conversation and returns the media its parts name, in order."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected messages to be a list of messages, got {messages!r}")
    media = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"expected messages with a role of {', '.join(_ROLES)}, got {message!r}")
        content = message.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or [None]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image", "video"):
                raise ValueError(f"expected message parts of type text, image or video, got {part!r}")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"expected text in a text part, got {part!r}")
            if kind != "text" and part.get(kind) is not None:
                media.extend((kind, written) for written in _paths(part, kind))
    return media
