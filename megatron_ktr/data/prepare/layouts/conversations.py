"""Conversations for supervised fine-tuning: ShareGPT, LLaVA, and messages with roles.

    {"id": "7", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat ...?"},
                                                    {"from": "gpt", "value": "..."}]}
    {"messages": [{"role": "user", "content": "<image>What ...?"}, {"role": "assistant", "content": "..."}],
     "images": ["a.jpg"]}

Media are in ``image``, ``images``, ``video`` or ``videos``. LLaVA marks the place of a video with ``<image>``: where a
record has videos alone, that becomes ``<video>``. Contents are texts; contents in parts are kept with text parts alone,
because their media have paths of their own, which training reads directly (docs/records.md).

Seen in: hiyouga/LLaMA-Factory, ``data/dataset_info.json`` (formats sharegpt and its tags); tulerfeng/OneThinker,
``LLaMA-Factory/data/dataset_info.json``; LLaVA's training files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.conversation import REFUSED_IN_MESSAGE
from megatron_ktr.data.media.request import MEDIA_LOOKALIKES, SYNONYMS
from megatron_ktr.data.prepare.fields import extras, fields_of, media_paths, optional_text, short, whole_text
from megatron_ktr.data.prepare.layout import Layout, Options, Record

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MOST_TURNS = 1000


def recognises(raw: Any) -> bool:
    return isinstance(raw, dict) and any(isinstance(raw.get(name), list) for name in ("messages", "conversations"))


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    media: dict[str, Any] = {}
    for kind in ("image", "video"):
        found = [path for name in (kind, f"{kind}s") if fields.get(name) for path in _paths(fields, name, options)]
        if found:
            media[f"{kind}s"] = found
    if not media and (lost := sorted(name for name in MEDIA_LOOKALIKES if fields.get(name))):
        raise ValueError(f"expected paths in image, images, video or videos, got the field '{lost[0]}'")
    if lost := [name for name in SYNONYMS if fields.get(name) is not None and name not in options.ignored]:
        raise ValueError(
            f"a clip is not read here: expected no field '{lost[0]}' (only data: --ignore-fields {lost[0]})"
        )
    if fields.get("messages") and fields.get("conversations"):
        raise ValueError("expected 'messages' or 'conversations', got both")
    turns = fields.get("messages") or fields.get("conversations")
    if not isinstance(turns, list) or not 0 < len(turns) <= _MOST_TURNS:
        raise ValueError(f"expected 1 to {_MOST_TURNS} turns in 'messages' or 'conversations', got {short(turns)}")
    messages = [_message(turn) for turn in turns]
    if "images" not in media:
        for message in messages:
            if message["role"] == "user" and "videos" in media:
                message["content"] = message["content"].replace("<image>", "<video>")
    system = optional_text(fields, "system")
    return {
        "problem_id": optional_text(fields, "id", "problem_id"),
        "messages": messages,
        **({"system": system} if system else {}),
        **(media or {"data_type": "text"}),
        **extras(fields, ["data_source", "problem_type"]),
    }


def _paths(fields: Mapping[str, Any], name: str, options: Options) -> list[str]:
    return media_paths(fields[name], options, name=name)


def _message(turn: Any) -> dict[str, str]:
    fields = fields_of(turn)
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    if refused := [name for name in REFUSED_IN_MESSAGE if fields.get(name) is not None]:
        raise ValueError(f"the key '{refused[0]}' of a turn is not followed: leave it out")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"expected a turn of {', '.join(_ROLES)}, got {short(role)}")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise ValueError("media in parts of a message have paths of their own: expected text parts")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"expected text in a turn of {role}, got {short(content)}")
    return {"role": _ROLES[role], "content": whole_text(content, name=role)}


LAYOUT = Layout(
    name="conversations",
    title="ShareGPT, LLaVA or messages, whole, for supervised fine-tuning (--objective sft)",
    media_root="the folder that the paths in image, images, video, videos are below",
    recognises=recognises,
    convert=convert,
    is_supervised=True,
)
