"""A tiny random model whose greedy responses have the form of answers, so that some are right and some are cut off."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model

_LETTERS = ("A", "B", "C", "D")
_WORDS = ("i", "see", "is", "first", "red", "blue", "green")
_NEXT = {
    "assistant": ("<think>",),
    "<think>": _WORDS,
    **dict.fromkeys(_WORDS, (*_WORDS, "</think>")),
    "</think>": ("<answer>",),
    "<answer>": _LETTERS,
    **dict.fromkeys(_LETTERS, ("</answer>",)),
    "</answer>": ("<|im_end|>",),
}
"""What may follow each word. Which of them does depends on all that the model is shown."""
_LOUDNESS = 3.4
_RULE = 8.0


def save_speaking_model(directory: Path) -> None:
    """The tiny model of the demo, with an output layer that obeys ``_NEXT``.

    The words' embeddings are so large that they are most of what the last layer puts out at their places. The output
    row of a word is its random row, plus the directions of the words that it may follow. All other rows are zero.
    """
    save_tiny_model(directory, corpus=corpus(), num_layers=2)
    tokenizer = load_tokenizer(directory)

    def row(word: str) -> int:
        return tokenizer.encode(word, add_special_tokens=False)[-1]

    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    (embedded,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    (head_name,) = (name for name in tensors if name.endswith("lm_head.weight"))
    random = tensors[head_name]
    head = torch.zeros_like(random)
    for word, following in _NEXT.items():
        direction = torch.nn.functional.normalize(embedded[row(word)], dim=0)
        for other in following:
            head[row(other)] += _RULE * direction
        embedded[row(word)] *= _LOUDNESS
    rows = sorted({row(other) for following in _NEXT.values() for other in following})
    head[rows] += random[rows] - random[rows].mean(dim=0)
    tensors[head_name] = head
    save_file(tensors, path, metadata={"format": "pt"})
