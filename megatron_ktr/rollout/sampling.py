"""Seeded sampling: the same (seed, step, prompt identity, sample) gives the same response in any batch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ktr.config.sections import HF_BATCH_RESPONSES
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled; temperature 0 is greedy."""

    num_generations: int
    max_response_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings, and counts as finished. The string stays in
    its text, so that the text matches the trained tokens."""
    seed: int = 0
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the response has already."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token as often as the response has it already."""
    max_batch_size: int = HF_BATCH_RESPONSES
    """The most responses decoded together. More are decoded in several batches, which changes no response."""

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise UserError("--stop has an empty string, which would end every response at its first token")

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the response so far. Log-probs of the model are not recorded then."""
        return bool(self.presence_penalty or self.frequency_penalty)


def sample_seed(*, seed: int, step: int, identity: str, sample: int) -> int:
    """A 63-bit seed for one response; ``identity`` is the ``Prompt.identity`` of its prompt.

    The seed is a cryptographic hash, because Python's own hash of a string differs between processes.
    """
    key = "\x1f".join((str(seed), str(step), identity, str(sample)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def end_token_ids(model_dir: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end tokens that the model's generation config names; if it names none, the tokenizer's end token.

    A generation config that is there and cannot be read is an error: other end tokens would give other responses.
    """
    from transformers import AutoConfig, GenerationConfig

    from megatron_ktr.files.hf_model import reading_model

    with reading_model(model_dir):
        if os.path.lexists(Path(model_dir) / "generation_config.json"):
            ends = GenerationConfig.from_pretrained(model_dir).eos_token_id
        else:
            ends = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_dir)).eos_token_id
    ends = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    if wrong := [end for end in ends if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < 2**31]:
        raise UserError(f"model: expected token ids in eos_token_id of {model_dir}, got {wrong[0]!r}")
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if not ends:
        raise UserError("model: neither generation_config.json nor the tokenizer names an end token")
    return tuple(ends)


MAX_OPEN_TOKENS = 8
"""The number of tokens that may be held back because they do not complete a character. A character has at most four
bytes, so this many tokens are not valid text, and they are taken as they are. Otherwise, if a model wrote lone bytes,
all of them would be decoded again at every token."""


class StopStrings:
    """Detects, token by token, which token of a row completes a stop string.

    The text of a token is considered once its last character is complete, as in vLLM: a token that ends within a
    multi-byte character is considered together with the token that completes the character.
    """

    def __init__(self, stop: Sequence[str], *, decode: Callable[[list[int]], str], num_rows: int) -> None:
        """``decode`` returns the text of token ids and leaves out special tokens."""
        self._stop = tuple(stop)
        self._decode = decode
        self._num_kept = max(map(len, stop)) - 1
        self._rows = [_RowText() for _ in range(num_rows)]

    def completed_by(self, row: int, token_id: int) -> bool:
        """Whether ``token_id``, the next one of ``row``, completes a stop string."""
        state = self._rows[row]
        state.token_ids.append(token_id)
        # A token's text may depend on the token before it (blanks) but never on earlier ones. So only the tokens taken
        # up last and the new ones are decoded.
        before = self._decode(state.token_ids[: state.num_settled])
        text = self._decode(state.token_ids)
        is_open = len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_open and len(state.token_ids) - state.num_settled < MAX_OPEN_TOKENS:
            return False
        state.tail += text[len(before) :]
        is_complete = any(stop in state.tail for stop in self._stop)
        state.tail = state.tail[max(0, len(state.tail) - self._num_kept) :]
        state.token_ids = state.token_ids[state.num_settled :]
        state.num_settled = len(state.token_ids)
        return is_complete


@dataclass
class _RowText:
    """The end of one row's text, as far back as an unfinished stop string could begin."""

    token_ids: list[int] = field(default_factory=list)
    num_settled: int = 0
    """The number of leading ``token_ids`` whose text is already in ``tail``."""
    tail: str = ""


class GumbelSampler:
    """Chooses one token per row by the Gumbel-max rule and remembers its log-prob.

        token = argmax_v (log p_v + g_v),  g_v ~ Gumbel(0, 1)  has exactly the distribution p

    Each row has its own random generator, so that its noise depends only on its seed; a multinomial draw over the batch
    would depend on the rows above it. p is cut to top-k and top-p before the choice. The remembered log-prob is that of
    the full softmax of logits / temperature before any cut, because this is what the trainer computes.

    ``temperature`` 0 is greedy: there is no noise, and log-probs are those at temperature 1.
    """

    def __init__(self, row_seeds: Sequence[int], *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> None:
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise ValueError(
                f"expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got {temperature}, {top_p}, {top_k}"
            )
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._generators = [torch.Generator().manual_seed(seed) for seed in row_seeds]
        self.logprobs: list[Tensor] = []
        """fp32 [B] on the host for each token chosen so far."""

    def choose(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]: the next token of each row."""
        logprob_BV = torch.log_softmax(logits_BV.float() / (self.temperature or 1.0), dim=-1)
        choice_B = self._perturbed(logprob_BV).argmax(dim=-1)
        self.logprobs.append(logprob_BV.gather(1, choice_B[:, None])[:, 0].cpu())
        return choice_B

    def _perturbed(self, logprob_BV: Tensor) -> Tensor:
        if self.temperature == 0:
            return logprob_BV
        uniform = torch.stack([torch.rand(logprob_BV.shape[1], generator=g) for g in self._generators])
        # Exactly 0 would give -log(-log 0) = -inf, and exactly 1 +inf; the clamp keeps both finite.
        uniform = uniform.clamp(torch.finfo(uniform.dtype).tiny, 1 - 2**-24)
        gumbel = -torch.log(-torch.log(uniform))
        return cut(logprob_BV, top_p=self.top_p, top_k=self.top_k) + gumbel.to(logprob_BV.device)


def penalised(logits_BV: Tensor, token_ids_BR: Tensor, *, presence: float, frequency: float) -> Tensor:
    """logits_v - frequency * n_v - presence * [n_v > 0], n_v = how often the response so far has token v.

    As in OpenAI's and vLLM's APIs: the prompt does not count, and the temperature comes afterwards.
    """
    ones_BR = torch.ones_like(token_ids_BR, dtype=logits_BV.dtype)
    count_BV = torch.zeros_like(logits_BV).scatter_add_(1, token_ids_BR, ones_BR)
    return logits_BV - frequency * count_BV - presence * (count_BV > 0)


def cut(logprob_BV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Log-probs with -inf outside the top-k tokens and outside the smallest set whose probability reaches top_p."""
    vocab_size = logprob_BV.shape[1]
    if 0 < top_k < vocab_size:
        threshold = logprob_BV.topk(top_k, dim=-1).values[:, -1:]
        logprob_BV = logprob_BV.masked_fill(logprob_BV < threshold, -math.inf)
    if top_p < 1:
        ordered, order = logprob_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays while the probability before it has not reached top_p; the first one always stays.
        is_out = probability.cumsum(dim=-1) - probability >= top_p
        is_out = torch.zeros_like(is_out).scatter(1, order, is_out)
        logprob_BV = logprob_BV.masked_fill(is_out, -math.inf)
    return logprob_BV
