"""Conversations in records: ``messages`` (role, content) or ShareGPT's ``conversations`` (from, value).

    [system] user ... user | assistant user ... | assistant
             question        earlier turns        final answer

A final assistant turn is never part of the question. If responses are sampled or recorded, this turn is dropped; if the
record has no solution, the turn becomes its solution. In supervised fine-tuning, the question ends before the first
assistant turn. That turn and all later ones are the reply, whose assistant turns carry the loss and whose user turns do
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ktr.data.media.request import HONOURED, SYNONYMS, group_files, read_request
from megatron_ktr.types import MediaKind

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
REFUSED_IN_MESSAGE = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "weight",
    "loss",
    "loss_weight",
    "loss_mask",
    "train",
    "prefix",
    "name",
)
"""Keys of a message that would change what is asked or learnt. They are not supported, so such records are refused."""
_PART_KEYS = ("type", "text", "image", "video", *HONOURED, *SYNONYMS)
Message = Mapping[str, Any]


@dataclass(frozen=True)
class PlacedMedia:
    """One medium that a part of a message names."""

    kind: MediaKind
    written: str | tuple[str, ...]
    request: Mapping[str, Any]


def messages_of(raw: Mapping[str, Any]) -> list[Message] | None:
    """The conversation of a record in the form of ``messages``, with its structure checked; None if there is none.

    Raises:
        ValueError: the value is not a conversation, or the order of its turns is wrong.
    """
    messages, turns = raw.get("messages"), raw.get("conversations")
    if turns is not None:
        if messages is not None:
            raise ValueError("expected 'messages' or 'conversations', got both")
        messages = _from_sharegpt(turns)
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected messages to be a list of messages, got {messages!r}")
    for message in messages:
        _check_message(message)
    _check_order([message["role"] for message in messages])
    return messages


def media_in_parts(messages: Sequence[Message]) -> list[PlacedMedia]:
    """The media that parts of messages name by path, in order. A part without a path is not among them: it stands for
    the record's next medium of its kind."""
    found = []
    for message in messages:
        for part in parts_of(message):
            if part["type"] == "text":
                continue
            request = read_request(part)
            media = group_files(part["type"], part.get(part["type"]), key=part["type"])
            if request and not media:
                raise ValueError(f"{', '.join(request)} of a part that names no {part['type']}: name it there")
            found += [PlacedMedia(kind, written, request) for kind, written in media]
    return found


def parts_of(message: Message) -> list[dict[str, Any]]:
    """The content of a message as a list of parts; plain text becomes a single part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: Message) -> str:
    """The text of a message without its media."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def has_media(messages: Sequence[Message]) -> bool:
    return any(part["type"] != "text" for message in messages for part in parts_of(message))


def split_conversation(messages: Sequence[Message], *, at_first_answer: bool) -> tuple[list[Message], list[Message]]:
    """(messages of the question, messages of the answer). The cut is before the first assistant turn with
    ``at_first_answer``, else before a final assistant turn.

    >>> turns = [{"role": role} for role in ("user", "assistant", "user", "assistant")]
    >>> [len(part) for flag in (True, False) for part in split_conversation(turns, at_first_answer=flag)]
    [1, 3, 3, 1]
    """
    roles = [message["role"] for message in messages]
    place = len(roles)
    if at_first_answer and "assistant" in roles:
        place = roles.index("assistant")
    elif roles[-1] == "assistant":
        place = len(roles) - 1
    return list(messages[:place]), list(messages[place:])


def _from_sharegpt(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected conversations to be a list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        if "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        if turn.get("from") not in _SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"expected turns with 'from' ({', '.join(_SHAREGPT_ROLES)}) and text in 'value', got {turn}"
            )
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({**others, "role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"expected messages with a role of {', '.join(ROLES)}, got {message!r}")
    for name in REFUSED_IN_MESSAGE:
        if message.get(name) is not None:
            raise ValueError(f"key '{name}' of a message is not followed: remove it")
    content = message.get("content")
    if isinstance(content, str):
        return
    for part in content if isinstance(content, list) and content else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if part is None or kind not in ("text", "image", "video"):
            raise ValueError(f"expected message parts of type text, image or video, got {part!r}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"expected text in a text part, got {part!r}")
        if kind != "text" and message["role"] != "user":
            raise ValueError(
                f"expected images and videos in users' turns, got a {kind} in one of the {message['role']}"
            )
        # Data sets that are stored as tables give every key to every part; empty ones are allowed.
        for name in part:
            if part[name] is not None and (name not in _PART_KEYS or (name in ("image", "video") and name != kind)):
                raise ValueError(f"key '{name}' of a {kind} part is not followed: remove it")


def _check_order(roles: Sequence[str]) -> None:
    """Raises ValueError unless the system text comes first and every assistant turn follows a user's turn."""
    if "user" not in roles:
        raise ValueError("expected messages with a user's turn")
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), start=1):
        if role == "system" and number > 1:
            raise ValueError(f"expected the system's text as the first message, got it as message {number}")
        if role == "assistant" and before != "user":
            raise ValueError(
                f"expected an assistant's turn after a user's, got message {number} after {before or 'nothing'}"
            )
