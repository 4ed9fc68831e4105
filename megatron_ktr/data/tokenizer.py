"""The interface of tokenizers in this code. Those of transformers have it, and so may any stand-in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer as ``load_tokenizer`` returns it (Hugging Face's ``PreTrainedTokenizerBase``)."""

    chat_template: Any
    """The chat format as Jinja text, or None."""

    @property
    def all_special_tokens(self) -> Sequence[Any]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def eos_token(self) -> Any:
        """The text of ``eos_token_id``, or None."""

    @property
    def eos_token_id(self) -> Any:
        """The id of the end token, or None if the tokenizer has none."""

    @property
    def unk_token_id(self) -> Any:
        """The id for unknown text, or None if the tokenizer can represent every text."""

    def __len__(self) -> int: ...

    def __call__(self, text: Any, *, add_special_tokens: bool = ...) -> Mapping[str, Any]:
        """A mapping with the ``input_ids`` of a text."""
        ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = ..., add_generation_prompt: bool = ...
    ) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...
