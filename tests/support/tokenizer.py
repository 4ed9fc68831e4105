"""A character-level tokenizer with Qwen2.5-VL's special tokens, at the ids of ``tests.support.tiny``."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import (
    EOS_ID,
    FIRST_SPECIAL_ID,
    IMAGE_TOKEN_ID,
    PAD_ID,
    VIDEO_TOKEN_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCAB_SIZE,
)

SPECIAL = {
    "<|vision_start|>": VISION_START_ID,
    "<|vision_end|>": VISION_END_ID,
    "<|image_pad|>": IMAGE_TOKEN_ID,
    "<|video_pad|>": VIDEO_TOKEN_ID,
    "<|im_end|>": EOS_ID,
    "<|endoftext|>": PAD_ID,
    "<|im_start|>": 196,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; everything else is ``<unk>``. No chat template."""
    vocab = {"<unk>": 0} | {character: 1 + i for i, character in enumerate("\n" + string.printable[:95])}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), FIRST_SPECIAL_ID)}
    vocab |= SPECIAL
    vocab |= {f"<unused{i}>": i for i in range(max(SPECIAL.values()) + 1, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[name for name in SPECIAL if name not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )


def save_tiny_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(str(directory))
    return tokenizer
