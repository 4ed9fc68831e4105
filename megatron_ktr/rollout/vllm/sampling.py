"""Our sampling settings as vLLM's, and vLLM's responses as ours; for the engine in process and for servers.

- Every response is a request of its own (n = 1) with its own seed, so that a response depends on nothing but
  (seed, step, prompt, sample). vLLM's prefix cache computes the prompt once all the same.
- End tokens are passed as stop tokens and vLLM's own idea of them is switched off: it knows one, and from elsewhere.
- Stop strings are left to ``StopStrings``. vLLM's own need its detokenizer, and with log-probs that one fails on ids
  which the model has and its tokenizer does not know; the request, and the engine with it, is lost.
- Log-probs must be of logits / temperature over the full vocabulary. vLLM has one mode per engine: raw ones know no
  temperature, processed ones are renormalised over top-p and top-k. Where neither fits, none are recorded.

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
"""vLLM raises lower ones to 0.01, and refuses higher ones."""


def logprobs_mode(sampling: SamplingSettings) -> LogprobsMode:
    """The engine option ``logprobs_mode`` under which responses sampled with ``sampling`` have exact log-probs."""
    return "raw_logprobs" if sampling.temperature in (0, 1) else "processed_logprobs"


def records_logprobs(sampling: SamplingSettings, *, mode: LogprobsMode) -> bool:
    """Whether an engine in ``mode`` gives the log-probs that ``Rollout.sampler_logprobs`` means."""
    if mode == "raw_logprobs":
        return sampling.temperature in (0, 1)
    # Greedy requests are not cut to top-p and top-k, and their temperature is 1.
    return sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k == 0)


def sampling_values(
    sampling: SamplingSettings, *, seed: int, end_token_ids: Sequence[int], mode: LogprobsMode
) -> dict[str, Any]:
    """Keywords of ``vllm.SamplingParams`` for one response; plain values, as JSON takes them too.

    Raises:
        UserError: a temperature that vLLM would change in silence, or refuse.
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
    if temperature:
        values["seed"] = seed
    if records_logprobs(sampling, mode=mode):
        values["logprobs"] = 0  # of the sampled token, and no others beside it
    return values


def rollout_of(
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None,
    *,
    finish_reason: str | None,
    end_token_ids: Sequence[int],
    tokenizer: Tokenizer,
) -> Rollout:
    """One response of vLLM: end token and stop string included, the end token not part of the text.

    Raises:
        RuntimeError: vLLM gave the request up; its response is not a sample of the model.
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
