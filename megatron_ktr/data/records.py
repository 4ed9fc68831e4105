"""Question files: Video-R1 style JSON or JSONL, checked once. ``docs/data.md`` is the reference.

A record after reading has all its own fields and, normalised,

    problem_id    text; the record's number where the file gives none
    problem       text of the question (absent where ``messages`` are given)
    messages      what is asked, where a conversation is given, without the answer (``conversation.py``)
    reply_turns   the turns to imitate, where given responses are imitated; the first and the last are the assistant's
    system_text   text of the system's turn, or None
    data_type     "video", "image" or "text"
    problem_type  text, e.g. "multiple choice"; ""
    options       list of text; []
    media         list of (kind, path as written, or a list of paths: the pictures of one video)
    media_requests  for each of them the fields that say how to read it (``media_source.py``)
    record_number where it stands in the file, from 1 (in JSONL the line); set by ``read_records``
    record_digest of what the file says, to notice other data on resuming; set by ``read_records``
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data import conversation
from megatron_ktr.data.media_files import resolve_media_path
from megatron_ktr.data.media_source import (
    MEDIA_LOOKALIKES,
    MediaKind,
    MediaRequest,
    MediaSource,
    check_request_fits,
    fields_for,
    group_files,
    is_picture,
    read_request,
)
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.errors import UserError
from megatron_ktr.files.json_files import parse_json

__all__ = ["Record", "check_record", "read_records", "resolve_media_path"]

Record = dict[str, Any]
NORMALISED = ("media", "media_requests", "reply_turns", "system_text", "record_number", "record_digest")
"""Fields that ``check_record`` and ``read_records`` add; a record that is written is read again without them."""
_DATA_TYPE_SYNONYMS = {"frame": "video"}
"""MVBench in Video-R1's release marks videos that were joined from single frames; the path is a video all the same."""
_PATH_FIELDS = frozenset({"path", "image", "images", "video", "videos"})


def read_records(
    path: Path | str,
    *,
    problem_types: Iterable[str] = (),
    option: str = "data_path",
    needs_solution: bool = True,
    needs_reply: bool = False,
    ignored: Collection[str] = (),
    problems: RecordProblems | None = None,
) -> list[Record]:
    """All records of a JSON array or a JSONL file, checked; only those of ``problem_types``, if any are given.

    Args:
        needs_solution, needs_reply, ignored: as in ``check_record``.
        problems: receives the records that are not usable as a question, which keep their place in the list with
            their number and nothing else; None = they are an error.

    Raises:
        UserError: file missing, not JSON, empty, or a record that is not usable as a question; the message has
            the records' numbers (from 1; in JSONL the line) and what is wrong.
    """
    path = Path(path)
    found = RecordProblems(option, path) if problems is None else problems
    kept_types, found_types = set(problem_types), set()
    kept: list[Record] = []
    numbered, is_suspect = _read_raw(path, option=option)
    for number, raw in numbered:
        problem_type = raw.get("problem_type") if isinstance(raw, dict) else None
        if isinstance(problem_type, str) or problem_type is None:
            found_types.add(problem_type or "")
        # One that cannot be used and does not say its type may be of a type that is wanted.
        if kept_types and isinstance(problem_type, str) and problem_type not in kept_types:
            continue
        try:
            if is_suspect:
                _check_writable(raw)
            record = check_record(
                raw, number=number, needs_solution=needs_solution, needs_reply=needs_reply, ignored=ignored
            )
            if kept_types and record["problem_type"] not in kept_types:
                continue
        except ValueError as error:
            found.add(len(kept), number=number, problem_id=None, reason=error)
            record = {"problem_id": str(number), "problem_type": "", "media": []}
        kept.append({**record, "record_number": number, "record_digest": record_digest(raw)})
    if not kept:
        reason = f"none of problem_types {sorted(kept_types)}; found {sorted(found_types)}" if found_types else ""
        raise UserError(f"{option}: {path} has {reason or 'no records at all'}")
    if problems is None:
        found.settle(len(kept), max_share=0.0)
    return kept


def check_record(
    raw: Any,
    *,
    number: int,
    needs_solution: bool = True,
    needs_reply: bool = False,
    ignored: Collection[str] = (),
) -> Record:
    """One normalised record.

    Args:
        needs_solution: the right answer must be there, in ``solution`` or as the final assistant turn.
        needs_reply: responses are imitated: one must be there, and the question ends where the first one begins.
        ignored: fields that are data here although they look like instructions.

    Raises:
        ValueError: with what was expected and got, without file and number.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    record: Record = {name: value for name, value in raw.items() if name not in NORMALISED}
    problem_id = raw.get("problem_id", str(number))
    if isinstance(problem_id, bool) or not isinstance(problem_id, str | int):
        raise ValueError(f"expected problem_id to be text or a whole number, got {problem_id!r}")
    record["problem_id"] = str(problem_id)
    messages = conversation.messages_of(raw)
    if messages is None and (not isinstance(raw.get("problem"), str) or not raw["problem"].strip()):
        raise ValueError(f"expected a question as text in 'problem', got {raw.get('problem')!r}")
    media = _media_of(raw, messages, ignored=ignored)
    for source in media:
        check_request_fits(source)
    record["media"] = [(source.kind, source.written) for source in media]
    record["media_requests"] = [source.request.given() for source in media]
    record["data_type"] = _data_type(raw, record["media"])
    record["problem_type"] = _text(raw, "problem_type")
    record["options"] = _options(raw.get("options"))
    record["system_text"] = None if "system" in ignored else _system_text(raw, messages)
    if messages is not None:
        _take_conversation(record, messages, needs_reply=needs_reply)
    elif needs_reply:
        record["reply_turns"] = [{"role": "assistant", "content": _response_text(record)}]
    solution = record.get("solution")
    if needs_solution and (isinstance(solution, bool) or not isinstance(solution, str | int | float)):
        raise ValueError(f"expected the right answer as text in 'solution', got {solution!r}")
    return record


def describe_repeated_ids(records: Sequence[Record]) -> str | None:
    """Which problem ids stand on several records, in words; None where each stands on one."""
    numbers: dict[str, list[int]] = {}
    for record in records:
        numbers.setdefault(record["problem_id"], []).append(record["record_number"])
    repeated = {problem_id: found for problem_id, found in numbers.items() if len(found) > 1}
    if not repeated:
        return None
    problem_id, (first, second, *_) = next(iter(repeated.items()))
    number = sum(map(len, repeated.values()))
    return (
        f"{number} of {len(records)} records share their problem_id with another (records {first} and {second} are "
        f"both {problem_id!r}): each is a question of its own, nothing goes by the id"
    )


def record_digest(raw: Any) -> str:
    """Of everything a record says, recorded responses and rewards included, however its JSON is laid out.

    Of a file it names only the last part of its path counts: data may be moved between two parts of a run.
    """
    content = json.dumps(_without_directories(raw), sort_keys=True, ensure_ascii=False)
    # Records with half a character (a lone surrogate) are unusable, but have their place in the list.
    return xxhash.xxh3_128(content.encode(errors="surrogatepass")).hexdigest()


def _without_directories(value: Any, *, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _without_directories(inner, is_path=name in _PATH_FIELDS) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner, is_path=is_path) for inner in value]
    return value.replace("\\", "/").rpartition("/")[2] if is_path and isinstance(value, str) else value


def _take_conversation(record: Record, messages: list[conversation.Message], *, needs_reply: bool) -> None:
    """Sets ``messages`` to what is asked; the rest is the reply, or the solution where the record has none."""
    record.pop("conversations", None)
    asked, rest = conversation.split_conversation(messages, at_first_answer=needs_reply)
    record["messages"] = asked
    if needs_reply:
        if conversation.has_media(rest):
            raise ValueError(
                "images and videos after the first assistant turn cannot be shown: expected them before it"
            )
        if messages[-1]["role"] != "assistant":
            rest.append({"role": "assistant", "content": _response_text(record)})
        elif record.get("response") not in (None, "", conversation.text_of(messages[-1])):
            raise ValueError("'response' differs from the conversation's last turn: which is to be imitated?")
        record["reply_turns"] = rest
    elif rest and record.get("solution") is None:
        record["solution"] = conversation.text_of(rest[-1])


def _response_text(record: Mapping[str, Any]) -> str:
    """The response to imitate: ``response``, or ``process`` and ``solution`` (Video-R1's chain-of-thought files)."""
    response = record.get("response")
    if isinstance(response, str) and response.strip():
        return response
    if response in (None, "") and record.get("process") and record.get("solution"):
        return f"{record['process']}{record['solution']}"
    raise ValueError(
        "no response to imitate: expected 'response', or 'process' and 'solution', or messages that end with an "
        f"assistant's turn, got {response!r}"
    )


def _read_raw(path: Path, *, option: str) -> tuple[list[tuple[int, Any]], bool]:
    """(number, value) of each record, and whether some may fail ``_check_writable``; a file whose first character is
    "[" is one JSON array, else JSONL."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(parse_json(text), start=1))
        except ValueError as error:
            raise UserError(f"{option}: {path} is not valid JSON: {error}") from error
        return numbered, _MAY_NOT_BE_WRITABLE.search(text) is not None
    numbered = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON text may contain U+2028
        if line.strip():
            try:
                numbered.append((number, parse_json(line)))
            except ValueError as error:
                raise UserError(
                    f"{option}: {path}, line {number} is not valid JSON: {error}; "
                    "expected a JSON array, or one object a line"
                ) from error
    return numbered, _MAY_NOT_BE_WRITABLE.search(text) is not None


_MAY_NOT_BE_WRITABLE = re.compile(r"\\u[dD]|NaN|Infinity|\d[eE]\+?\d{3}")


def _check_writable(raw: Any) -> None:
    """Raises ``ValueError`` for what a run cannot write into its rollouts: Python reads halves of characters, and NaN,
    from JSON that it does not write."""
    try:
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError as error:
        raise ValueError(f"expected text in whole characters and finite numbers: {error}") from error


def _media_of(
    raw: Mapping[str, Any], messages: list[conversation.Message] | None, *, ignored: Collection[str]
) -> list[MediaSource]:
    """The media that the record names, in parts of its messages or in fields of its own, and how to read them."""
    of_record = read_request(raw, ignored=ignored)
    media: list[tuple[MediaKind, str | tuple[str, ...]]] = [
        (kind, found) for kind in ("image", "video") for key in (kind, f"{kind}s") for found in _named(raw, kind, key)
    ]
    placed = conversation.media_in_parts(messages) if messages is not None else []
    if placed:
        if media and sorted(map(repr, media)) != sorted(repr((item.kind, item.written)) for item in placed):
            raise ValueError("parts of its messages name other media than its fields do: name them in one place")
    else:
        placed = [conversation.PlacedMedia(kind, written, {}) for kind, written in media or _media_in_path(raw)]
    sources = [
        MediaSource(item.kind, item.written, MediaRequest(**{**fields_for(item.kind, of_record), **item.request}))
        for item in placed
    ]
    _check_clip(of_record, sources)
    if not sources and _declared_type(raw) != "text":
        for name in MEDIA_LOOKALIKES & raw.keys() - set(ignored):
            if raw[name]:
                raise ValueError(
                    f"it names no image or video but has a field '{name}': expected image, images, video, videos, path "
                    f'(where \'{name}\' is only data: --ignore-fields {name}, or "data_type": "text")'
                )
    return sources


def _named(raw: Mapping[str, Any], kind: MediaKind, key: str) -> list[str | tuple[str, ...]]:
    return [written for _, written in group_files(kind, raw.get(key), key=key)]


def _media_in_path(raw: Mapping[str, Any]) -> list[tuple[MediaKind, str | tuple[str, ...]]]:
    """``path`` names media of the declared type; without one, pictures are images."""
    value, declared = raw.get("path"), _declared_type(raw)
    if declared in ("image", "video"):
        return group_files(declared, value, key="path")
    if declared is not None and value:
        raise ValueError(f"data_type is {declared!r}, but it has the path {value!r}")
    media = []
    for written in value if isinstance(value, list) else [value]:
        is_image = isinstance(written, str) and (is_picture(written) or written.lower().endswith(".gif"))
        media += group_files("image" if is_image else "video", written, key="path")
    return media


def _check_clip(of_record: Mapping[str, Any], sources: list[MediaSource]) -> None:
    """A clip of the record itself is of its one video."""
    if not {"video_start", "video_end"} & of_record.keys():
        return
    num_videos = sum(source.kind == "video" for source in sources)
    if num_videos != 1:
        raise ValueError(f"'video_start' and 'video_end' of a record with {num_videos} videos: which of them is meant?")


def _system_text(raw: Mapping[str, Any], messages: list[conversation.Message] | None) -> str | None:
    """Text of ``system``, or of the conversation's first message where that is the system's."""
    given = raw.get("system")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"expected system to be text, got {given!r}")
    if messages is None or messages[0]["role"] != "system":
        return given or None
    told = conversation.text_of(messages[0])
    if given and given != told:
        raise ValueError("'system' differs from the system's text in 'messages': which is meant?")
    return told


def _data_type(raw: Mapping[str, Any], media: list[tuple[str, Any]]) -> str:
    kinds = {kind for kind, _ in media}
    declared = _declared_type(raw)
    if declared is None:
        return "video" if "video" in kinds else "image" if kinds else "text"
    if declared not in ("video", "image", "text"):
        raise ValueError(f"expected data_type to be video, image or text, got {declared!r}")
    if declared == "text" and kinds:
        raise ValueError(f"data_type is 'text', but it has {', '.join(kind for kind, _ in media)}")
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
