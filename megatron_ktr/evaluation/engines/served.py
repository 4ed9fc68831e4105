"""Answers questions with a ``vllm serve`` of our kind: token ids and the model's own inputs travel, so that nothing is
decoded, resized or tokenised a second time (``rollout/server/wire.py``).

It needs the model's directory here, for tokenizer and patches, and a server that was started by
``python -m megatron_ktr.rollout.server.serve`` (or with the options that it sets) from the same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import Question
from megatron_ktr.evaluation.engines.identity import model_identity
from megatron_ktr.evaluation.engines.local import LocalModel
from megatron_ktr.evaluation.engines.prompts import CannotAsk, PromptMaker, answer_of
from megatron_ktr.evaluation.engines.web import WebAnswers
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.server.client import ServerFacts
from megatron_ktr.rollout.server.engine import until_stop
from megatron_ktr.rollout.server.wire import MalformedAnswer, Sample, encode_request, read_answer
from megatron_ktr.rollout.vllm.sampling import LogprobsMode, rollout_of
from megatron_ktr.types import Prompt
from megatron_ktr.web.address import Address, ApiKey
from megatron_ktr.web.chat import served_models
from megatron_ktr.web.client import Loop, NoReply, Patience, Refusal, Web

HOW_TO_START = "start it with python -m megatron_ktr.rollout.server.serve, or use --engine chat"


class NotOfOurKind(UserError):
    """The server lacks the routes for token ids."""


class ServedAnswers(WebAnswers):
    """The engine.

    Raises:
        NotOfOurKind: the server has no route for token ids, or does not report its settings.
        UserError: no server answers, or its settings would make answers wrong.
    """

    def __init__(
        self, address: Address, model: LocalModel, *, key: ApiKey | None, concurrency: int, patience: Patience
    ) -> None:
        loop = Loop()
        web = Web(address, key=key, patience=patience, max_connections=concurrency)
        super().__init__(web, loop, capacity=concurrency)
        try:
            models = loop.start(served_models(web)).result() or []
            facts = loop.start(_facts(web)).result()
            loop.start(_require_route(web)).result()
            _check(facts)
        except BaseException:
            self.close()
            raise
        self._model = model
        self._mode: LogprobsMode = "raw_logprobs" if facts.logprobs_mode == "raw_logprobs" else "processed_logprobs"
        context = min(facts.max_model_len, model.prompts.max_model_len)
        self._prompts = PromptMaker(model.prompts.builder, max_model_len=context)
        self.identity = _identity(model, models)

    async def _ask(self, question: Question) -> Answer:
        try:
            prompt, sampling = self._prompts.make(question)
        except CannotAsk as error:
            return Answer("", problem=str(error))
        body = encode_request(
            prompt,
            step=0,
            sampling=sampling,
            mode=self._mode,
            media=self._model.media,
            end_token_ids=self._model.end_token_ids,
        )
        read = partial(self._read, prompt=prompt, sampling=sampling)
        sample = await self._web.fetch("POST", f"{self._web.address.root}/inference/v1/generate", body, read=read)
        tokenizer = self._model.prompts.builder.tokenizer
        sample = until_stop(sample, sampling.stop, tokenizer=tokenizer)
        rollout = rollout_of(
            sample.token_ids,
            None,
            finish_reason=sample.finish_reason,
            end_token_ids=self._model.end_token_ids,
            tokenizer=tokenizer,
        )
        return answer_of(rollout, prompt, seconds=0.0)

    def _read(self, body: bytes, *, prompt: Prompt, sampling: SamplingSettings) -> Sample:
        try:
            (sample,) = read_answer(
                body,
                prompt=prompt,
                sampling=sampling,
                mode=self._mode,
                vocab_size=self._model.vocab_size,
                end_token_ids=self._model.end_token_ids,
            )
        except MalformedAnswer as error:
            raise ValueError(str(error)) from error
        return sample


async def _facts(web: Web) -> ServerFacts:
    url = f"{web.address.root}/server_info?config_format=json"
    try:
        return await web.fetch("GET", url, None, read=_read_facts, retries=2)
    except Refusal as error:
        raise NotOfOurKind(f"{web.address.root} does not report its settings ({error}): {HOW_TO_START}") from None
    except NoReply as error:
        raise NotOfOurKind(f"{web.address.root} does not report its settings ({error}): {HOW_TO_START}") from None


def _read_facts(body: bytes) -> ServerFacts:
    try:
        return ServerFacts.read(parse_json(body.decode("utf-8")))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no settings of vLLM ({error!r})") from None


async def _require_route(web: Web) -> None:
    """An empty request, which the route refuses as invalid if it is there."""
    try:
        await web.fetch("POST", f"{web.address.root}/inference/v1/generate", b"{}", read=lambda body: body, retries=2)
    except Refusal as error:
        if error.status in (400, 422):
            return
        raise NotOfOurKind(f"{web.address.root} takes no token ids ({error}): {HOW_TO_START}") from None
    except NoReply as error:
        raise NotOfOurKind(f"{web.address.root} takes no token ids ({error}): {HOW_TO_START}") from None


def _check(facts: ServerFacts) -> None:
    if facts.normalises_pixels:
        raise UserError(
            "the server normalises pixels that are normalised already; start it with --no-mm-device-do-normalize"
        )
    if not facts.has_encoder:
        raise UserError("the server has no vision encoder: start it without --limit-mm-per-prompt")


def _identity(model: LocalModel, models: list[dict[str, Any]]) -> Mapping[str, str]:
    """That of the directory, if the server says that it serves this directory; else weights are known by the name that
    the server gives them."""
    served = models[0] if models else {}
    root = str(served.get("root") or served.get("id") or "")
    digests = model_identity(model.directory)
    is_same = False
    with contextlib.suppress(OSError, ValueError):  # what the server says need not be a path
        is_same = bool(root) and Path(root).is_dir() and Path(root).samefile(model.directory)
    if not is_same:
        digests["weights"] = f"served as {root or 'an unnamed model'}"
    return {"engine": "server", **digests}
