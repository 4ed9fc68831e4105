"""Reads and checks question files: JSON or JSONL in the style of Video-R1. ``docs/records.md`` is the reference.

A record that was read has all its own fields, and these normalised ones:

    problem_id    text; the record's number if the file gives no id
    problem       the question as text; absent if ``messages`` are given
    messages      the question as a conversation without the answer, if a conversation is given (``conversation.py``)
    reply_turns   in supervised fine-tuning the turns to imitate; the first and the last are the assistant's
    system_text   text of the system's turn, or None
    data_type     "video", "image" or "text"
    problem_type  text, e.g. "multiple choice"; "" if there is none
    options       list of text; empty if there are none
    media         list of (kind, path as written); a list of paths names the pictures of one video
    media_requests  for each of the media the fields that say how to read it (``media/request.py``)
    record_number place in the file, from 1 (in JSONL the line); set by ``read_records``
    record_digest digest of the record in the file, to notice other data on resuming; set by ``read_records``
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data import conversation
from megatron_ktr.data.media.files import resolve_media_path
from megatron_ktr.data.media.names import is_picture
from megatron_ktr.data.media.request import (
    MEDIA_LOOKALIKES,
    MediaKind,
    MediaRequest,
    MediaSource,
    check_request_fits,
    fields_for,
    group_files,
    read_request,
)
from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.errors import UserError

__all__ = ["Record", "check_record", "read_records", "resolve_media_path"]

Record = dict[str, Any]
NORMALISED = ("media", "media_requests", "reply_turns", "system_text", "record_number", "record_digest")
"""Fields that ``check_record`` and ``read_records`` add. If a record with them is read again, they are dropped and
computed anew."""
_DATA_TYPE_SYNONYMS = {"frame": "video"}
"""MVBench in Video-R1's release marks videos that were joined from single frames in this way. The path is nevertheless
that of a video."""
MAX_NESTING = 200
"""Levels of lists and objects in a record. How many Python itself bears depends on its version."""
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
    """All records of a JSON array or a JSONL file, checked. If ``problem_types`` are given, only those of these types.

    Args:
        needs_solution, needs_reply, ignored: as in ``check_record``.
        problems: collects the records that are not usable as a question. They keep their place in the list, but hold
            hardly more than their number. None means that such records are an error.

    Raises:
        UserError: the file is missing, not JSON or empty, or a record is not usable as a question. The message has the
            records' numbers (from 1; in JSONL the line) and what is wrong.
    """
    path = Path(path)
    found = RecordProblems(option, path) if problems is None else problems
    kept_types, found_types = set(problem_types), set()
    kept: list[Record] = []
    for number, raw in iter_raw_records(path, option=option):
        problem_type = raw.get("problem_type") if isinstance(raw, dict) else None
        if isinstance(problem_type, str) or problem_type is None:
            found_types.add(problem_type or "")
        # A record without a valid type is not left out here, because it may be meant to be of a wanted type.
        if kept_types and isinstance(problem_type, str) and problem_type not in kept_types:
            continue
        written = write_down(raw)
        try:
            if written.fault is not None:
                raise ValueError(written.fault)
            record = check_record(
                raw, number=number, needs_solution=needs_solution, needs_reply=needs_reply, ignored=ignored
            )
            if kept_types and record["problem_type"] not in kept_types:
                continue
        except ValueError as error:
            found.add(len(kept), number=number, problem_id=None, reason=error)
            record = {"problem_id": str(number), "problem_type": "", "media": []}
        kept.append({**record, "record_number": number, "record_digest": written.digest})
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
        needs_solution: whether the record must have the right answer, in ``solution`` or as the final assistant turn.
        needs_reply: for supervised fine-tuning: the record must have a response, and the question ends before the
            first assistant turn.
        ignored: fields that are only data although they look like instructions.

    Raises:
        ValueError: the record is unusable. The message says what was expected and found, without file and number.
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
    """A sentence about problem ids that several records share; None if every id is unique."""
    numbers: dict[str, list[int]] = {}
    for record in records:
        numbers.setdefault(record["problem_id"], []).append(record["record_number"])
    repeated = {problem_id: found for problem_id, found in numbers.items() if len(found) > 1}
    if not repeated:
        return None
    problem_id, (first, second, *_) = next(iter(repeated.items()))
    number = sum(map(len, repeated.values()))
    return repeated_ids_text(number, len(records), first=first, second=second, problem_id=problem_id)


def repeated_ids_text(number: int, num_records: int, *, first: int, second: int, problem_id: str) -> str:
    """The sentence about ``number`` records whose problem id another has, with the numbers of two that share one."""
    return (
        f"{number} of {num_records} records share their problem_id with another (records {first} and {second} are "
        f"both {problem_id!r}): each is a question of its own, nothing goes by the id"
    )


def digest_of_records(records: Sequence[Record]) -> str:
    """A digest of all records in their order. A store of records knows those of its records; otherwise they have them,
    or get them from their content."""
    if (known := getattr(records, "records_digest", None)) is not None:
        return str(known)
    together = xxhash.xxh3_128()
    for record in records:
        together.update((record.get("record_digest") or record_digest(record)).encode())
    return together.hexdigest()


def record_digest(raw: Any) -> str:
    """A digest of a record's whole content, including recorded responses and rewards. The layout of its JSON does not
    matter.

    Only the last part of a media path counts, because data may be moved before a run is resumed.
    """
    content = json.dumps(_without_directories(raw), sort_keys=True, ensure_ascii=False)
    # Records with half a character (a lone surrogate) are unusable, but still have a place in the list and a digest.
    return xxhash.xxh3_128(content.encode(errors="surrogatepass")).hexdigest()


def _without_directories(value: Any, *, is_path: bool = False, depth: int = 0) -> Any:
    if depth > MAX_NESTING:
        raise RecursionError(f"more than {MAX_NESTING} levels")
    if isinstance(value, dict):
        return {
            name: _without_directories(inner, is_path=name in _PATH_FIELDS, depth=depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_directories(inner, is_path=is_path, depth=depth + 1) for inner in value]
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path and isinstance(value, str) else value


def _take_conversation(record: Record, messages: list[conversation.Message], *, needs_reply: bool) -> None:
    """Sets ``messages`` to the question. The rest becomes the reply with ``needs_reply``; without, it becomes the
    solution if the record has none."""
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
    """The response to imitate: ``response``, or else ``process`` followed by ``solution``, as in Video-R1's
    chain-of-thought files."""
    response = record.get("response")
    if isinstance(response, str) and response.strip():
        return response
    if response in (None, "") and record.get("process") and record.get("solution"):
        return f"{record['process']}{record['solution']}"
    raise ValueError(
        "no response to imitate: expected 'response', or 'process' and 'solution', or messages that end with an "
        f"assistant's turn, got {response!r}"
    )


def check_writable(raw: Any) -> None:
    """Raises ``ValueError`` for values that Python reads from JSON but cannot write again as valid JSON: lone
    surrogates, NaN and infinity, endless nesting. A run must be able to write its records into its rollouts."""
    if (fault := write_down(raw).fault) is not None:
        raise ValueError(fault)


@dataclass(frozen=True)
class WrittenRecord:
    """A record as it is stored."""

    text: bytes
    """Its JSON; empty if it has none."""
    digest: str
    """As ``record_digest``."""
    fault: str | None
    """Why it has no JSON, although it was read from JSON."""


def write_down(raw: Any) -> WrittenRecord:
    """A record, as it stands in its file, in the form in which it is stored."""
    try:
        digest = record_digest(raw)
        text = json.dumps(raw, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except RecursionError:
        return WrittenRecord(
            b"", xxhash.xxh3_128(b"nested").hexdigest(), f"expected at most {MAX_NESTING} levels of nesting"
        )
    except ValueError as error:
        return WrittenRecord(b"", digest, f"expected text in whole characters and finite numbers: {error}")
    return WrittenRecord(text, digest, None)


def _media_of(
    raw: Mapping[str, Any], messages: list[conversation.Message] | None, *, ignored: Collection[str]
) -> list[MediaSource]:
    """The media that the record names, in parts of its messages or in its own fields, and how to read them."""
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
    """The media in the field ``path``. They are of the declared type; if no type is declared, pictures are images and
    all other files videos."""
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
    """Raises ValueError if the record's own fields name a clip but it does not have exactly one video."""
    if not {"video_start", "video_end"} & of_record.keys():
        return
    num_videos = sum(source.kind == "video" for source in sources)
    if num_videos != 1:
        raise ValueError(f"'video_start' and 'video_end' of a record with {num_videos} videos: which of them is meant?")


def _system_text(raw: Mapping[str, Any], messages: list[conversation.Message] | None) -> str | None:
    """The text of the field ``system``, or of the conversation's first message if its role is system."""
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
