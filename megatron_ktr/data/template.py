"""Turns a record into a tokenised prompt: words the question, applies the chat format, expands visual placeholders.

    record --wording template--> user's text --chat template--> one string --tokenizer--> ids --expand--> Prompt

The wording is a Jinja file that the user can replace (``wording.py``). The chat format is the one that the user gives
(``load_tokenizer``), else the tokenizer's own ``chat_template``, else Qwen2.5-VL's. Each image or video has one
placeholder in the string, at its marker ``<image>`` or ``<video>`` in the text, or before the text if there are no
markers. The placeholder becomes as many token ids as the medium has visual tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data.conversation import parts_of, text_of
from megatron_ktr.data.template_probe import require_bounded
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError, passing_cause, unreadable
from megatron_ktr.files.chat_template import read_chat_template
from megatron_ktr.files.json_files import read_json_object
from megatron_ktr.types import Prompt, VisualInput

_MARKER = re.compile(r"<(image|video)>")
"""The marker for the place of a medium in a question, as in the records of LLaVA and ShareGPT."""
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
    def from_model(cls, model_dir: Path | str, tokenizer: Tokenizer) -> VisualTokens:
        """The tokens with the ids in ``config.json``, or with Qwen's names if the file gives no ids.

        Raises:
            UserError: the tokenizer lacks one of them, or would not read its text as that single token.
        """
        config_path = Path(model_dir) / "config.json"
        config = read_json_object(config_path, option="model") if config_path.is_file() else {}
        keys = {"vision_start": "vision_start_token_id", "vision_end": "vision_end_token_id"}
        keys |= {"image": "image_token_id", "video": "video_token_id"}
        ids: dict[str, int] = {}
        texts: dict[str, str] = {}
        for name, key in keys.items():
            token_id = config.get(key)
            if token_id is None:
                token_id = tokenizer.convert_tokens_to_ids(_VISUAL_NAMES[name])
            if token_id is not None and (not isinstance(token_id, int) or not 0 <= token_id < 2**31):
                raise UserError(f"model: expected a token id in {key} of {config_path}, got {token_id!r}")
            text = tokenizer.convert_ids_to_tokens(token_id) if token_id is not None else None
            is_unknown = token_id is not None and token_id == tokenizer.unk_token_id
            if (
                token_id is None
                or not text
                or is_unknown
                or token_id in ids.values()
                or tokenizer(text, add_special_tokens=False)["input_ids"] != [token_id]
            ):
                raise UserError(
                    f"model: the tokenizer in {model_dir} does not read {text or _VISUAL_NAMES[name]!r} as a single "
                    f"token of its own ({key} {token_id} of config.json); "
                    "it needs Qwen2.5-VL's visual tokens as special tokens"
                )
            ids[name], texts[name] = token_id, text
        return cls(**texts, image_id=ids["image"], video_id=ids["video"])

    def placeholder(self, kind: str) -> str:
        """The text that stands for one image or video in the chat string."""
        return f"{self.vision_start}{self.image if kind == 'image' else self.video}{self.vision_end}"


class PromptBuilder:
    """Turns records and their loaded media into ``Prompt``s."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        visual_tokens: VisualTokens,
        merge_size: int = 2,
        wording: WordingTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.visual_tokens = visual_tokens
        self.merge_size = merge_size
        self.wording = wording or WordingTemplate()
        self._control = control_tokens(tokenizer, visual_tokens)

    def build(self, record: Mapping[str, Any], media: Sequence[VisualInput] = ()) -> Prompt:
        """The prompt of one record. Media are placed at the parts of ``messages`` or the markers in the text; if there
        are none, they come before the question.

        Raises:
            UnusableSample: the record's text contains control tokens, or has places for other media than it names.
        """
        messages, order = self.messages(record, [medium.kind for medium in media])
        placed = [media[index] for index in order]
        token_ids = self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]
        return Prompt(
            problem_id=str(record["problem_id"]),
            token_ids=tuple(self._expand(token_ids, placed, source=str(record["problem_id"]))),
            media=tuple(placed),
            record=record,
        )

    def chat_text(self, record: Mapping[str, Any], kinds: Sequence[str]) -> str:
        """The whole conversation as one string, one placeholder per medium, ending where the response begins."""
        return self.render(self.messages(record, kinds)[0])

    def render(self, messages: Sequence[Mapping[str, str]], *, is_asking: bool = True) -> str:
        """``messages`` in the model's chat format. With ``is_asking`` the text ends with the opened assistant turn."""
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return str(
                    self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=is_asking)
                )
            except Exception as error:  # a template can raise anything its expressions can
                raise UserError(f"model: the chat template failed: {type(error).__name__}: {error}") from error
        return _qwen_chat(messages, is_asking=is_asking)

    def messages(self, record: Mapping[str, Any], kinds: Sequence[str]) -> tuple[list[dict[str, str]], list[int]]:
        """The question as messages of plain text with placeholders, and the order of its media.

        The order lists indices of ``kinds``, in the order in which the media occur in the text.

        Raises:
            UnusableSample: as in ``build``.
        """
        source = f"record {record['problem_id']}"
        system, turns = question_turns(record, wording=self.wording)
        for _, parts in turns:
            self.refuse_control_tokens("".join(part["text"] for part in parts if part["type"] == "text"), record)
        messages, order = [], []
        for role, pieces in place_media(turns, kinds, source=source):
            order += [piece for piece in pieces if isinstance(piece, int)]
            texts = [self.visual_tokens.placeholder(kinds[p]) if isinstance(p, int) else p for p in pieces]
            messages.append({"role": role, "content": "".join(texts)})
        if system is not None:
            self.refuse_control_tokens(system, record)
            if has_marker(system):
                raise UnusableSample(source, "the system's text has a marker <image> or <video>")
            messages.insert(0, {"role": "system", "content": system})
        return messages, order

    def refuse_control_tokens(self, text: str, record: Mapping[str, Any]) -> None:
        """Raises UnusableSample for text with a control token. With it, the text of a data set could open the turn of
        another role, or stand for media that do not exist."""
        if (token := self.control_token_in(text)) is not None:
            raise UnusableSample(f"record {record['problem_id']}", f"its text contains the control token {token}")

    @property
    def control_pattern(self) -> str:
        """The regular expression that finds control tokens."""
        return self._control.pattern

    def control_token_in(self, text: str) -> str | None:
        """The first control token that the tokenizer would read in ``text``."""
        found = self._control.search(text)
        return None if found is None else found.group()

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


Turn = tuple[str, list[dict[str, Any]]]
"""(role, parts of the message)."""


def question_turns(
    record: Mapping[str, Any], *, wording: WordingTemplate | None = None
) -> tuple[str | None, list[Turn]]:
    """(the system's text, the other turns) of a question: the record's ``messages``, else its text in ``wording``."""
    system = record.get("system_text")
    if record.get("messages"):
        given = list(record["messages"])
        if given[0]["role"] == "system":
            system = text_of(given.pop(0))
        return system, [(message["role"], parts_of(message)) for message in given]
    rendered = (wording or WordingTemplate()).render(record)
    system = rendered.system if system is None else system
    return system, [("user", [{"type": "text", "text": rendered.user}])]


def place_media(turns: Sequence[Turn], kinds: Sequence[str], *, source: str) -> list[tuple[str, list[str | int]]]:
    """(role, pieces) of every turn: text, and indices of ``kinds`` where media stand. Every part and every marker of a
    user's turn takes the record's next medium of its kind. Without parts and markers all media come before the first
    user's text.

    Raises:
        UnusableSample: the numbers of places and of media of a kind differ.
    """
    placer = _MediaPlacer(kinds)
    placed = [
        (role, [p for part in parts for p in (placer.place(part) if role == "user" else [part["text"]])])
        for role, parts in turns
    ]
    first = next(pieces for role, pieces in placed if role == "user")
    first[:0] = placer.finish(source)
    return placed


class _MediaPlacer:
    """Assigns to every part and every marker of a conversation the record's next medium of its kind."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = kinds
        self._waiting = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in ("image", "video")}
        self._num_places: Counter[str] = Counter()

    def place(self, part: Mapping[str, Any]) -> list[str | int]:
        """The pieces of one part of a user's turn."""
        if part["type"] != "text":
            return self._next(part["type"])
        texts_and_kinds = _MARKER.split(part["text"])  # text, kind, text, kind, ..., text
        pieces: list[str | int] = []
        for place, found in enumerate(texts_and_kinds):
            pieces += self._next(found) if place % 2 else [found]
        return pieces

    def finish(self, source: str) -> list[str | int]:
        """What comes before the first user's text: all media if no part or marker places any, else nothing."""
        if not self._num_places:
            return list(range(len(self._kinds)))
        for kind in ("image", "video"):
            num_media = sum(other == kind for other in self._kinds)
            if self._num_places[kind] != num_media:
                raise UnusableSample(
                    source,
                    f"its text has {self._num_places[kind]} places for {kind}s (markers <{kind}>, parts of messages), "
                    f"and it names {num_media}",
                )
        return []

    def _next(self, kind: str) -> list[str | int]:
        self._num_places[kind] += 1
        return [self._waiting[kind].pop(0)] if self._waiting[kind] else []


def has_marker(text: str) -> bool:
    return _MARKER.search(text) is not None


def control_tokens(tokenizer: Tokenizer, visual_tokens: VisualTokens | None = None) -> re.Pattern[str]:
    """A pattern that matches all control tokens: every text that the tokenizer reads as one token with a special
    meaning. It also matches ``visual_tokens``, which may be ordinary tokens in some models."""
    tokens = {"<|im_start|>", "<|im_end|>", *_VISUAL_NAMES.values()}
    tokens |= {str(token) for token in tokenizer.all_special_tokens}
    if visual_tokens is not None:
        tokens |= {visual_tokens.vision_start, visual_tokens.vision_end, visual_tokens.image, visual_tokens.video}
    for token in tokenizer.added_tokens_decoder.values():
        # All other added tokens are ordinary text with an id of its own, such as <tool_call>.
        if token.special or str(token).startswith("<|"):
            tokens.add(str(token))
    # The longest first, and in the same order in every process: the pattern names what a check of records found.
    ordered = sorted(sorted(tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in ordered if token))


def check_vocabulary(tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Raises ``UserError`` if the tokenizer has ids for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"model: the tokenizer has token ids up to {largest}, the model's vocabulary ends at {vocab_size - 1}: "
            "do tokenizer and config.json belong together?"
        )


def load_tokenizer(model_dir: Path | str, *, chat_template: Path | str | None = None) -> Tokenizer:
    """The Hugging Face tokenizer of a model directory. If it has no chat template, it gets that of
    ``chat_template.json``; ``chat_template`` is a Jinja file that takes the place of any.

    Raises:
        UserError: there is no tokenizer that transformers can load, or ``chat_template`` is not a template that shows
            what it is given. ``TransientError`` where an error that may pass was behind it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        if (passing := passing_cause(error)) is not None:
            raise unreadable(model_dir, passing, option="model") from passing
        raise UserError(f"model: no usable tokenizer in {model_dir}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
        require_bounded(tokenizer.chat_template, where=f"chat_template: {chat_template}")
        _check_chat_template(tokenizer, chat_template)
        return tokenizer
    side_file = Path(model_dir) / "chat_template.json"
    if not tokenizer.chat_template and side_file.is_file():
        tokenizer.chat_template = read_json_object(side_file, option="model").get("chat_template")
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str):
            require_bounded(template, where=f"model: {model_dir}")
    return tokenizer


def chat_format_digest(tokenizer: Tokenizer) -> str:
    """A digest of the chat format of ``PromptBuilder.render``, whoever gave it."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # of several, by name
        template = template.get("default")
    return xxhash.xxh3_128(str(template or "Qwen2.5-VL's").encode(errors="surrogatepass")).hexdigest()


def _check_chat_template(tokenizer: Tokenizer, path: Path | str) -> None:
    """Raises ``UserError`` unless the template of ``path`` shows the texts and the roles of a short conversation."""
    turns = [("system", "first probe"), ("user", "second probe"), ("assistant", "third probe"), ("user", "last probe")]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        shown, closed = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
            for asks in (True, False)
        )
    except Exception as error:  # a template can raise anything its expressions can
        raise UserError(f"chat_template: {path} failed: {type(error).__name__}: {error}") from error
    missing = next((content for _, content in turns if content not in shown), None)
    if missing is not None:
        raise UserError(f"chat_template: {path} does not show a turn of the conversation it is given ({missing!r})")
    if shown == closed or not shown.startswith(closed):
        raise UserError(f"chat_template: {path} opens no turn for the answer at its end (add_generation_prompt)")


def _qwen_chat(messages: Sequence[Mapping[str, str]], *, is_asking: bool) -> str:
    """``messages`` in Qwen2.5-VL's chat format, followed by the generation prompt with ``is_asking``."""
    text = ""
    if messages[0]["role"] != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for message in messages:
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return text + "<|im_start|>assistant\n" if is_asking else text
