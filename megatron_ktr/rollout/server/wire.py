"""Encodes requests to a vLLM server, and decodes its answers and checks every token of them.

The route is vLLM's token-in, token-out one (``/inference/v1/generate``). Tokens are sent as they are, with every visual
placeholder expanded. Media are sent as the model's own inputs: the trainer's fp32 patches, grid and seconds. So nothing
is decoded, resized, normalised or tokenised a second time. Media are sent once per prompt, because one request asks for
all G responses; vLLM gives response i the seed ``seed + i``.

A medium is encoded as msgpack in base64, in the format of vLLM's own ``/render`` route:

    {"pixel_values_videos": {"data": [dtype, shape, bytes as extension 3], "field": [how to batch, {options}]}, ...}

Nothing here imports vLLM. A test compares these inputs with those that vLLM itself makes of the same frames.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rollout.sampling import SamplingSettings, sample_seed
from megatron_ktr.rollout.vllm.sampling import LogprobsMode, records_logprobs, sampling_values
from megatron_ktr.types import Prompt, VisualInput

RAW_BYTES = 3
"""The number of vLLM's msgpack extension for the bytes of a tensor."""
NO_LOGPROB = -9999.0
"""The value that vLLM writes if a log-prob is missing or infinite."""


_MOST_WORDS = 300
"""Characters of a message about an answer, which may quote it."""
_BYTES_PER_TOKEN = 2048
"""What vLLM writes about one token has 200 to 400 bytes."""


class MalformedAnswer(Exception):
    """An answer is not what was asked for: it is not JSON, lacks fields or log-probs, or has unknown tokens."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message)[:_MOST_WORDS])


@dataclass(frozen=True)
class Sample:
    """One response as the server returned it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: str
    """Either "stop" or "length"."""
    versions: tuple[str, ...]
    """The labels of the weights that its tokens were sampled from, in order. There are several if the weights changed
    during the response."""


def encode_request(
    prompt: Prompt,
    *,
    step: int,
    sampling: SamplingSettings,
    mode: LogprobsMode,
    media: MediaSpec,
    end_token_ids: Sequence[int],
) -> bytes:
    """The body of one request, which asks for all responses to one prompt. The same arguments give the same bytes."""
    seed = sample_seed(seed=sampling.seed, step=step, identity=prompt.identity, sample=0)
    # vLLM adds the response's index to the seed; the sum must fit into a signed 64-bit number.
    seed %= 2**63 - sampling.num_generations
    params = sampling_values(sampling, seed=seed, end_token_ids=end_token_ids, mode=mode)
    body: dict[str, Any] = {
        "token_ids": list(prompt.token_ids),
        "sampling_params": params | {"n": _num_asked(sampling)},
        "stream": False,
    }
    if prompt.media:
        body["features"] = _features(prompt, media=media)
    return json.dumps(body, separators=(",", ":")).encode()


def most_answer_bytes(sampling: SamplingSettings) -> int:
    """The largest answer that the responses to one prompt can have."""
    return (1 << 20) + _num_asked(sampling) * sampling.max_response_length * _BYTES_PER_TOKEN


def _num_asked(sampling: SamplingSettings) -> int:
    """The number of responses to ask for. It is 1 for greedy sampling, because vLLM refuses several greedy responses,
    which would all be the same."""
    return 1 if sampling.temperature == 0 else sampling.num_generations


def read_answer(
    body: bytes,
    *,
    prompt: Prompt,
    sampling: SamplingSettings,
    mode: LogprobsMode,
    vocab_size: int,
    end_token_ids: Sequence[int],
) -> list[Sample]:
    """The G responses of an answer to ``encode_request``, in order.

    Raises:
        MalformedAnswer: the body is anything else.
    """
    try:
        answer = parse_json(body.decode("utf-8"))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        num_prompt_tokens = answer["usage"]["prompt_tokens"]
        expected = _num_asked(sampling)
        if [choice["index"] for choice in choices] != list(range(expected)):
            raise MalformedAnswer(f"expected {expected} responses, got {[choice['index'] for choice in choices]}")
        if num_prompt_tokens != len(prompt.token_ids):
            raise MalformedAnswer(f"{len(prompt.token_ids)} prompt tokens were sent, {num_prompt_tokens} were read")
        samples = [_sample(choice, sampling=sampling, mode=mode, vocab_size=vocab_size) for choice in choices]
        for sample in samples:
            _check_end(sample, end_token_ids)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise MalformedAnswer(f"unreadable ({type(error).__name__}: {error})") from None
    return samples * (sampling.num_generations // expected)


def _sample(choice: Mapping[str, Any], *, sampling: SamplingSettings, mode: LogprobsMode, vocab_size: int) -> Sample:
    token_ids, reason = choice["token_ids"], choice["finish_reason"]
    if not isinstance(token_ids, list):
        raise MalformedAnswer(f"tokens of the type {type(token_ids).__name__}")
    length = len(token_ids)
    if reason not in ("stop", "length"):
        raise MalformedAnswer(f"a response ended by {reason!r}")
    if not 0 < length <= sampling.max_response_length or (reason == "length" and length < sampling.max_response_length):
        raise MalformedAnswer(f"a response of {length} tokens, asked for {sampling.max_response_length} at most")
    if unknown := [token for token in token_ids if type(token) is not int or not 0 <= token < vocab_size]:
        raise MalformedAnswer(f"token {unknown[0]!r} is not in the vocabulary of {vocab_size}")
    spans = choice["weight_versions"]
    if [span["start"] for span in spans] + [length] != [0] + [span["end"] for span in spans]:
        raise MalformedAnswer(f"weight versions that do not cover the response: {spans}")
    return Sample(
        token_ids=tuple(token_ids),
        logprobs=_logprobs(choice, token_ids) if records_logprobs(sampling, mode=mode) else None,
        finish_reason=reason,
        versions=tuple(str(span["version"]) for span in spans),
    )


def _check_end(sample: Sample, end_token_ids: Sequence[int]) -> None:
    """A server that stops elsewhere than it was told to answers as another policy would."""
    ends = [token in end_token_ids for token in sample.token_ids]
    if any(ends[:-1]):
        raise MalformedAnswer("a response that goes on after its end token")
    if sample.finish_reason == "stop" and not ends[-1]:
        raise MalformedAnswer(f"a response that stops after token {sample.token_ids[-1]}, which is no end token")


def _logprobs(choice: Mapping[str, Any], token_ids: Sequence[int]) -> tuple[float, ...]:
    content = choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != token_ids:
        raise MalformedAnswer(f"{len(token_ids)} tokens with the log-probs of {len(content)} tokens, or of others")
    given = [entry["logprob"] for entry in content]
    if strange := [value for value in given if type(value) not in (int, float)]:  # float() would read false and "-1"
        raise MalformedAnswer(f"a log-prob of the type {type(strange[0]).__name__}")
    logprobs = tuple(map(float, given))
    # The log-prob of a token with probability 1 may be a little above 0 by rounding.
    if bad := [value for value in logprobs if not math.isfinite(value) or not NO_LOGPROB < value < 1e-3]:
        raise MalformedAnswer(f"a log-prob of {bad[0]}")
    return logprobs


# --- media ----------------------------------------------------------------------------------------------------


def placeholder_runs(prompt: Prompt, *, media: MediaSpec) -> list[tuple[int, int]]:
    """(first index, length) of each medium's placeholders in ``prompt.token_ids``, in order of occurrence.

    Raises:
        ValueError: a run of placeholders fits no medium, or a medium has no placeholders.
    """
    runs: list[tuple[int, int]] = []
    row = 0
    while row < len(prompt.token_ids):
        if not media.is_visual(prompt.token_ids[row]):
            row += 1
            continue
        medium = prompt.media[len(runs)] if len(runs) < len(prompt.media) else None
        length = 0 if medium is None else media.num_visual_tokens(medium)
        if medium is None or not length or prompt.token_ids[row : row + length] != (media.token_id(medium),) * length:
            raise ValueError(f"prompt {prompt.problem_id!r}: the placeholders from token {row} fit no medium")
        runs.append((row, length))
        row += length
    if len(runs) < len(prompt.media):
        raise ValueError(f"prompt {prompt.problem_id!r} has no placeholders for {len(prompt.media) - len(runs)} media")
    return runs


def medium_item(medium: VisualInput, *, media: MediaSpec) -> dict[str, Any]:
    """The model's inputs for one image or video, with grid and seconds per temporal patch. Pixels are passed as
    patches; if the medium carries the trainer's features, these are passed instead."""
    is_image = medium.kind == "image"
    if medium.features is not None:
        name, values = f"{medium.kind}_embeds", medium.features
    else:
        name = "pixel_values" if is_image else "pixel_values_videos"
        values = media.patchify(medium.frames_FCHW, medium)
    per_item = ["batched", {"keep_on_cpu": True}]
    item = {
        name: {"data": values, "field": ["flat", {"slices": [[0, len(values), None]], "dim": 0, "keep_on_cpu": False}]},
        f"{medium.kind}_grid_thw": {"data": torch.tensor(medium.grid_thw), "field": per_item},
    }
    if not is_image:
        # Without this value vLLM assumes 1.0 s. It is fp32, as in vLLM. A single temporal patch has 0 seconds, but no
        # position depends on the value then, so 1.0 is passed.
        seconds = torch.tensor(medium.seconds_per_grid or 1.0, dtype=torch.float32)
        item["second_per_grid_ts"] = {"data": seconds, "field": per_item}
    return item


def _features(prompt: Prompt, *, media: MediaSpec) -> dict[str, Any]:
    hashes: dict[str, list[str]] = {}
    places: dict[str, list[dict[str, int]]] = {}
    items: dict[str, list[str]] = {}
    for medium, (offset, length) in zip(prompt.media, placeholder_runs(prompt, media=media), strict=True):
        raw = pack(medium_item(medium, media=media))
        # vLLM's caches rely on this hash: the same hash must mean the same patches, grid and seconds.
        hashes.setdefault(medium.kind, []).append(hashlib.blake2b(raw, digest_size=32).hexdigest())
        places.setdefault(medium.kind, []).append({"offset": offset, "length": length})
        items.setdefault(medium.kind, []).append(base64.b64encode(raw).decode("ascii"))
    return {"mm_hashes": hashes, "mm_placeholders": places, "kwargs_data": items}


def pack(value: Any) -> bytes:
    """``value`` as msgpack. It may consist of maps, lists, text, integers, booleans, None, and tensors, which are
    written in vLLM's format."""
    parts: list[bytes] = []
    _pack(value, parts)
    return b"".join(parts)


def _pack(value: Any, parts: list[bytes]) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value])
    elif isinstance(value, int):
        parts.append(struct.pack(">Bq", 0xD3, value))
    elif isinstance(value, str):
        raw = value.encode()
        parts.append(struct.pack(">BI", 0xDB, len(raw)) + raw)
    elif isinstance(value, list):
        parts.append(struct.pack(">BI", 0xDD, len(value)))
        for entry in value:
            _pack(entry, parts)
    elif isinstance(value, dict):
        parts.append(struct.pack(">BI", 0xDF, len(value)))
        for name, entry in value.items():
            _pack(name, parts)
            _pack(entry, parts)
    elif isinstance(value, Tensor):
        raw = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        parts.append(struct.pack(">BI", 0xDD, 3))
        _pack(str(value.dtype).removeprefix("torch."), parts)
        _pack(list(value.shape), parts)
        parts.append(struct.pack(">BIb", 0xC9, len(raw), RAW_BYTES) + raw)
    else:
        raise TypeError(f"cannot send a {type(value).__name__}")


def check_length(prompt: Prompt, *, sampling: SamplingSettings, max_model_len: int) -> None:
    """Raises UserError if a server would silently cut the response short, or would refuse the prompt."""
    needed = len(prompt.token_ids) + sampling.max_response_length
    if needed > max_model_len:
        raise UserError(
            f"prompt {prompt.problem_id}: {len(prompt.token_ids)} tokens and --max-response-length "
            f"{sampling.max_response_length} exceed the servers' --max-model-len {max_model_len}; lower "
            "--max-prompt-length, or start them with more"
        )
