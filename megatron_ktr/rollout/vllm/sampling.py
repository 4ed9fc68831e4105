"""Converts our sampling settings to vLLM's, and vLLM's responses to ours, for the colocated engine and for servers.

- Every response is a request of its own (n = 1) with its own seed, so that it depends only on (seed, step, prompt,
  sample). Thanks to vLLM's prefix cache the prompt is still computed only once.
- End tokens are passed as stop tokens. vLLM's own end token is switched off, because it knows only one, and takes it
  from another source.
- Stop strings are handled by ``StopStrings``. vLLM's own need its detokenizer. With log-probs the detokenizer fails on
  ids that the model has and its tokenizer does not know, and such a failure ends the request and the engine.
- Log-probs must be those of logits / temperature over the full vocabulary. vLLM has one mode for a whole engine: raw
  log-probs ignore the temperature, processed ones are renormalised over top-p and top-k. If neither mode gives the
  right log-probs, none are recorded.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Rollout

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
TEMPERATURES = (0.01, 2.0)
"""The lowest and highest temperature. vLLM silently raises lower ones to 0.01, and refuses higher ones."""


def logprobs_mode(sampling: SamplingSettings) -> LogprobsMode:
    """The engine option ``logprobs_mode`` that gives exact log-probs of responses sampled with ``sampling``."""
    return "raw_logprobs" if sampling.temperature in (0, 1) else "processed_logprobs"


def records_logprobs(sampling: SamplingSettings, *, mode: LogprobsMode) -> bool:
    """Whether an engine in ``mode`` gives log-probs as ``Rollout.sampler_logprobs`` needs them."""
    if sampling.has_penalties:
        return False
    if mode == "raw_logprobs":
        return sampling.temperature in (0, 1)
    # For greedy requests vLLM applies no top-p or top-k, and computes log-probs at temperature 1.
    return sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k == 0)


def sampling_values(
    sampling: SamplingSettings, *, seed: int, end_token_ids: Sequence[int], mode: LogprobsMode
) -> dict[str, Any]:
    """The keyword arguments of ``vllm.SamplingParams`` for one response, as plain values that fit into JSON.

    Raises:
        UserError: vLLM would silently change the temperature, or refuse it.
    """
    temperature = sampling.temperature
    if temperature and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise UserError(
            f"vLLM samples at temperatures from {TEMPERATURES[0]} to {TEMPERATURES[1]}, or 0, got {temperature:g}"
        )
    values = {
        "n": 1,
        "max_tokens": sampling.max_response_length,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "ignore_eos": True,
        "stop_token_ids": list(end_token_ids),
        "detokenize": False,
    }
    if sampling.has_penalties:
        values |= {"presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty}
    if temperature:
        values["seed"] = seed
    if records_logprobs(sampling, mode=mode):
        values["logprobs"] = 0  # only that of the sampled token, without the most likely others
    return values


def rollout_of(
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None,
    *,
    finish_reason: str | None,
    end_token_ids: Sequence[int],
    tokenizer: Tokenizer,
) -> Rollout:
    """One response of vLLM as a ``Rollout``. The tokens include the end token or the stop string; the text includes the
    stop string, but not the end token.

    Raises:
        RuntimeError: vLLM gave up the request, so that its response is not a sample of the model.
    """
    if finish_reason not in ("stop", "length") or not token_ids:
        raise RuntimeError(f"vLLM ended a request after {len(token_ids)} tokens for the reason {finish_reason!r}")
    has_end_token = token_ids[-1] in end_token_ids
    return Rollout(
        token_ids=tuple(token_ids),
        sampler_logprobs=None if logprobs is None else tuple(logprobs[: len(token_ids)]),
        text=tokenizer.decode(list(token_ids[:-1] if has_end_token else token_ids), skip_special_tokens=True),
        is_finished=finish_reason == "stop",
    )
