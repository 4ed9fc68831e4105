"""From a record to a tokenised prompt: wording, chat format, expanded visual placeholders.

    record --wording template--> user's text --chat template--> one string --tokenizer--> ids --expand--> Prompt

The wording is a Jinja file that the user can replace (``data/templates/think_answer.jinja`` is the built-in one and
documents its variables). The chat format is the tokenizer's own ``chat_template``, or Qwen2.5-VL's where the tokenizer
has none. Each image or video is one placeholder in the string and becomes as many token ids as it has visual tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, VisualInput

BUILT_IN_WORDING = Path(__file__).parent / "templates" / "think_answer.jinja"
DEFAULT_SYSTEM = "You are a helpful assistant."
_VISUAL_NAMES = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}


@dataclass(frozen=True)
class VisualTokens:
    """The four tokens around and inside media: their text for the chat string, their ids for the model."""

    vision_start: str
    vision_end: str
    image: str
    video: str
    image_id: int
    video_id: int

    @classmethod
    def from_model(cls, model_dir: Path | str, tokenizer: Any) -> VisualTokens:
        """Ids of ``config.json`` (their text as the tokenizer spells it), Qwen's names where it gives none.

        Raises:
            UserError: the tokenizer lacks one of them, or would not read it back as that one token.
        """
        config_path = Path(model_dir) / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        keys = {"vision_start": "vision_start_token_id", "vision_end": "vision_end_token_id"}
        keys |= {"image": "image_token_id", "video": "video_token_id"}
        ids: dict[str, int] = {}
        texts: dict[str, str] = {}
        for name, key in keys.items():
            token_id = config.get(key)
            if token_id is None:
                token_id = tokenizer.convert_tokens_to_ids(_VISUAL_NAMES[name])
            text = tokenizer.convert_ids_to_tokens(token_id) if token_id is not None else None
            is_unknown = token_id is not None and token_id == tokenizer.unk_token_id
            if (
                not text
                or is_unknown
                or token_id in ids.values()
                or tokenizer(text, add_special_tokens=False)["input_ids"] != [token_id]
            ):
                raise UserError(
                    f"model: the tokenizer in {model_dir} does not read {text or _VISUAL_NAMES[name]!r} as a single "
                    f"token of its own ({key} {token_id} of config.json); "
                    "it needs Qwen2.5-VL's visual tokens as special tokens"
                )
            ids[name], texts[name] = int(token_id), str(text)
        return cls(**texts, image_id=ids["image"], video_id=ids["video"])

    def placeholder(self, kind: str) -> str:
        """One image or video in the chat string."""
        return f"{self.vision_start}{self.image if kind == 'image' else self.video}{self.vision_end}"


@dataclass(frozen=True)
class Wording:
    """What a wording template rendered. ``system`` is None where the template sets none."""

    user: str
    system: str | None = None


class WordingTemplate:
    """A Jinja file that words the question; rendered in a sandbox, undefined variables are errors."""

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else BUILT_IN_WORDING
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
        try:
            self.text = self.path.read_text(encoding="utf-8")
            self._template = environment.from_string(self.text)
        except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
            raise UserError(f"prompt_template: {self.path} cannot be used: {error}") from error

    def render(self, record: Mapping[str, Any]) -> Wording:
        """The user's text (and the template's ``system``, if it sets one) for one record."""
        variables = {
            "problem": record.get("problem", ""),
            "options": list(record.get("options") or ()),
            "problem_type": record.get("problem_type", ""),
            "data_type": record.get("data_type", "text"),
            "record": dict(record),
        }
        try:
            module = self._template.make_module(variables)
        except Exception as error:  # a template can raise anything its expressions can
            raise UserError(f"prompt_template: {self.path} failed: {type(error).__name__}: {error}") from error
        system = getattr(module, "system", None)
        return Wording(user=str(module).strip(), system=None if system is None else str(system))


class PromptBuilder:
    """Turns records and their loaded media into ``Prompt``s."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        visual_tokens: VisualTokens,
        merge_size: int = 2,
        wording: WordingTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.visual_tokens = visual_tokens
        self.merge_size = merge_size
        self.wording = wording or WordingTemplate()
        tokens = visual_tokens
        self._control = {
            tokens.vision_start,
            tokens.vision_end,
            tokens.image,
            tokens.video,
            "<|im_start|>",
            "<|im_end|>",
        }
        self._control |= {str(token) for token in tokenizer.all_special_tokens}

    def build(self, record: Mapping[str, Any], media: Sequence[VisualInput] = ()) -> Prompt:
        """The prompt of one record. Media come in the order of ``messages``, or before the question.

        Raises:
            UnusableSample: the record's text contains control tokens, or its messages name other media.
        """
        text = self.chat_text(record, [medium.kind for medium in media])
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(
            problem_id=str(record["problem_id"]),
            token_ids=tuple(self._expand(token_ids, media, source=str(record["problem_id"]))),
            media=tuple(media),
            record=record,
        )

    def chat_text(self, record: Mapping[str, Any], kinds: Sequence[str]) -> str:
        """The whole conversation as one string, one placeholder per medium, ending where the response begins."""
        if record.get("messages"):
            messages = self._given_messages(record, kinds)
        else:
            wording = self.wording.render(record)
            self._refuse_control_tokens(wording.user, record)
            placeholders = "".join(self.visual_tokens.placeholder(kind) for kind in kinds)
            messages = [{"role": "user", "content": placeholders + wording.user}]
            if wording.system is not None:
                messages.insert(0, {"role": "system", "content": wording.system})
        if getattr(self.tokenizer, "chat_template", None):
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return _qwen_chat(messages)

    def _given_messages(self, record: Mapping[str, Any], kinds: Sequence[str]) -> list[dict[str, str]]:
        """``messages`` with every content as one string. Media that no content part names go before the first
        user's text."""
        unplaced = list(kinds)
        messages = []
        for message in record["messages"]:
            content = ""
            parts = message["content"]
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                if part["type"] == "text":
                    self._refuse_control_tokens(part["text"], record)
                    content += part["text"]
                elif unplaced and unplaced[0] == part["type"]:
                    content += self.visual_tokens.placeholder(unplaced.pop(0))
                else:
                    raise UnusableSample(
                        record["problem_id"], f"messages name more {part['type']}s than the record has"
                    )
            messages.append({"role": message["role"], "content": content})
        if unplaced:
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None or len(unplaced) != len(kinds):
                raise UnusableSample(record["problem_id"], "messages do not say where its media belong")
            first["content"] = "".join(map(self.visual_tokens.placeholder, unplaced)) + first["content"]
        return messages

    def _refuse_control_tokens(self, text: str, record: Mapping[str, Any]) -> None:
        """Text of a data set must not open another role's turn or stand for media that are not there."""
        for token in self._control:
            if token and token in text:
                raise UnusableSample(f"record {record['problem_id']}", f"its text contains the control token {token}")

    def _expand(self, token_ids: Sequence[int], media: Sequence[VisualInput], *, source: str) -> list[int]:
        remaining = list(media)
        expanded: list[int] = []
        kinds = {self.visual_tokens.image_id: "image", self.visual_tokens.video_id: "video"}
        for token_id in token_ids:
            if token_id not in kinds:
                expanded.append(token_id)
                continue
            if not remaining or remaining[0].kind != kinds[token_id]:
                raise UserError(f"model: the chat template places other media than record {source} has")
            time, height, width = remaining.pop(0).grid_thw
            expanded.extend([token_id] * (time * height * width // self.merge_size**2))
        if remaining:
            raise UserError(f"model: the chat template drops {len(remaining)} of the media of record {source}")
        return expanded


def load_tokenizer(model_dir: Path | str) -> Any:
    """The HF tokenizer of a model directory, with the chat template of ``chat_template.json`` if it carries none.

    Raises:
        UserError: there is no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"model: no usable tokenizer in {model_dir}: {error}") from error
    side_file = Path(model_dir) / "chat_template.json"
    if not tokenizer.chat_template and side_file.is_file():
        tokenizer.chat_template = json.loads(side_file.read_text(encoding="utf-8")).get("chat_template")
    return tokenizer


def _qwen_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Qwen2.5-VL's chat format, generation prompt included."""
    text = ""
    if messages[0]["role"] != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for message in messages:
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"
