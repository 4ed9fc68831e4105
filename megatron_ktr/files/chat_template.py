"""A chat template that takes the place of a model's own: how it is read, and how a Hugging Face directory gets it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import MOST_OPTIONS_BYTES, read_text
from megatron_ktr.files.json_files import read_json_object

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_FILES_WITH_A_KEY = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Files that may hold a chat template under the key ``chat_template``."""
_LEGACY_FILE = "chat_template.json"


def read_chat_template(path: Path | str) -> str:
    """The text of a chat template.

    Raises:
        UserError: the file cannot be read as text, or is empty.
    """
    try:
        text = read_text(path, most_bytes=MOST_OPTIONS_BYTES, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template: {path} cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"chat_template: {path} is empty")
    return text


def set_chat_template(directory: Path, text: str) -> None:
    """Makes ``text`` the only chat template of a Hugging Face directory, for tokenizer and processor alike.

    It is written to chat_template.jinja, and into every other place where the directory has a template: programs differ
    in which of them they read, and older ones know no chat_template.jinja.
    """
    (directory / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")
    for name in (*_FILES_WITH_A_KEY, _LEGACY_FILE):
        path = directory / name
        values = read_json_object(path, option="model") if path.is_file() else {}
        if "chat_template" in values:
            values["chat_template"] = text
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
