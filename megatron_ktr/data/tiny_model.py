"""Makes the model of the laptop demo: a tiny random Qwen2.5-VL with its own tokenizer, in Hugging Face format.

It learns in minutes on one core thanks to its shape and three settings: ``initializer_range`` 0.08, ``rope_theta`` 100,
and one or two positions per temporal patch. With the usual 0.02 and 10,000 it never learned to look up an option's
letter.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.data.media.preprocess import CLIP_MEAN, CLIP_STD
from megatron_ktr.errors import UserError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
WORDING = "{{ problem }}{% for option in options %} {{ option }}{% endfor %}"
"""The prompt wording of the demo. This model knows a few dozen words, but the default template needs hundreds."""


@dataclass(frozen=True)
class TinySizes:
    """The sizes of the language model and of the vision encoder, and the side of a frame in pixels."""

    num_layers: int = 3
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 256
    vision_depth: int = 2
    vision_hidden_size: int = 64
    frame_size: int = 56


def save_tiny_model(
    directory: Path,
    *,
    corpus: Sequence[str],
    seed: int = 0,
    **sizes: int,
) -> None:
    """Trains a tokenizer on ``corpus`` and writes it together with a randomly initialised model. ``sizes`` are fields
    of ``TinySizes``.

    The directory is complete: config, weights, generation config, tokenizer (``tokenizer.model`` of sentencepiece
    and the same as ``tokenizer.json``), chat template, preprocessor config, ``prompt_template.txt``.
    Raises UserError if it exists and is not empty.
    """
    chosen = TinySizes(**sizes)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} already exists and is not empty; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = _save_tokenizer(directory, corpus)
    _save_model(
        directory,
        token_ids,
        seed=seed,
        text=dict(
            num_hidden_layers=chosen.num_layers,
            hidden_size=chosen.hidden_size,
            num_attention_heads=chosen.num_heads,
            num_key_value_heads=chosen.num_kv_heads,
            intermediate_size=chosen.ffn_size,
        ),
        vision=dict(
            depth=chosen.vision_depth,
            hidden_size=chosen.vision_hidden_size,
            intermediate_size=2 * chosen.vision_hidden_size,
        ),
    )
    limits = {"min_pixels": chosen.frame_size**2, "max_pixels": chosen.frame_size**2}
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        # Mean and deviation are given, as in published checkpoints. Hugging Face has them as defaults, but vLLM uses
        # only this file: without them its encoder would silently get raw bytes.
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        **limits,
    }
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / name).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    (directory / "prompt_template.txt").write_text(WORDING, encoding="utf-8")


def _save_tokenizer(directory: Path, corpus: Sequence[str]) -> dict[str, int]:
    """Writes the tokenizer and returns the ids of the special tokens."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = io.BytesIO()
    # Tags are added as whole tokens below, so sentencepiece is trained only on the words between them.
    sentences = [" ".join(word for word in line.split() if word not in TAG_TOKENS) for line in corpus]
    sentencepiece.SentencePieceTrainer.train(
        # Single characters are added, so that words that are not in the corpus can be spelled.
        sentence_iterator=iter([*sentences, *string.ascii_letters, *string.digits, *string.punctuation]),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,
        # Whole words as tokens: the tiny model has no capacity to spare for spelling.
        user_defined_symbols=sorted({f"▁{word}" for sentence in sentences for word in sentence.split()}),
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=True,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Added tokens absorb the blanks around them, so that "<think> i" and "<think>i" give the same tokens.
    tokenizer.add_special_tokens([AddedToken(t, special=True, lstrip=True, rstrip=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, lstrip=True, rstrip=True) for t in TAG_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    vocabulary_of = fast.get_vocab()
    ids: dict[str, int] = {token: vocabulary_of[token] for token in SPECIAL_TOKENS}
    return ids | {"size": len(fast)}


def _save_model(directory: Path, token_ids: dict[str, int], *, seed: int, text: dict, vision: dict) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig
    from transformers.utils import logging

    from megatron_ktr.files.hf_model import hf_model_class

    head_size = text["hidden_size"] // text["num_attention_heads"]
    side = head_size // 2 * 3 // 8
    ends = dict(eos_token_id=token_ids["<|im_end|>"], pad_token_id=token_ids["<|endoftext|>"])
    config = Qwen2_5_VLConfig(
        text_config=dict(
            text,
            # The vocabulary is padded to a multiple of 64, so that small tensor-parallel sizes divide it. Published
            # vocabularies are padded, too.
            vocab_size=-(-token_ids["size"] // 64) * 64,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [head_size // 2 - 2 * side, side, side],
            },
            initializer_range=0.08,
            tie_word_embeddings=False,
            use_sliding_window=False,
            bos_token_id=None,
            **ends,
        ),
        vision_config=dict(
            vision,
            num_heads=4,
            out_hidden_size=text["hidden_size"],
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=[vision["depth"] - 1],
            tokens_per_second=2,
            initializer_range=0.08,
        ),
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf_model_class()(config)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    model.save_pretrained(directory)
