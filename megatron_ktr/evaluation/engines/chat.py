"""Answers questions with any server that has OpenAI's chat API: ``POST /v1/chat/completions``.

The server's own tokenizer and chat template read the question, and its processor reads the frames; a model of ours is
served more exactly by ``served.py``. Sampling settings are sent explicitly, so that no generation config replaces them:

    every server    model, messages, temperature, top_p, max_tokens (max_completion_tokens where the server asks for
                    it), seed if anything is drawn, penalties other than 0
    vllm, sglang    also top_k, min_p 0 and repetition_penalty 1, which others refuse as unknown

Stop strings are looked for here and sent to vLLM alone, because others leave the string out of the text and do not say
whether it ended the response.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import AnswerSampling, EngineFailed, Question
from megatron_ktr.evaluation.engines.chat_messages import FrameFormat, FramesAs, chat_messages, frames_per_second
from megatron_ktr.evaluation.engines.prompts import num_frames
from megatron_ktr.evaluation.engines.web import WebAnswers
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.rollout.sampling import sample_seed
from megatron_ktr.rollout.vllm.sampling import TEMPERATURES
from megatron_ktr.types import VisualInput
from megatron_ktr.web.address import Address, ApiKey
from megatron_ktr.web.chat import MAKERS, Reply, choose_model, read_reply, served_models
from megatron_ktr.web.client import Loop, Patience, Refusal, Web

ServerKind = Literal["auto", "vllm", "sglang", "openai"]
SENT = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
"""Settings that ``ChatSettings.server_defaults`` may leave to the server."""
_MOST_ADAPTATIONS = 3


@dataclass(frozen=True)
class ChatSettings:
    """How a chat server is asked."""

    model: str | None = None
    """The served name; None: the only one that the server has."""
    kind: ServerKind = "auto"
    frames_as: FramesAs = "images"
    frame_format: FrameFormat = "jpeg"
    server_defaults: tuple[str, ...] = ()
    """Settings of ``SENT`` that the server does not take. They are not sent, and the server uses its own."""
    concurrency: int = 32
    patience: Patience = Patience()


class ChatAnswers(WebAnswers):
    """The engine. It asks the server for its models first.

    Raises:
        UserError: no server answers, it refuses the key, or it does not have the model.
    """

    def __init__(self, address: Address, settings: ChatSettings, *, key: ApiKey | None) -> None:
        loop = Loop()
        web = Web(address, key=key, patience=settings.patience, max_connections=settings.concurrency)
        super().__init__(web, loop, capacity=settings.concurrency)
        try:
            models = loop.start(served_models(web)).result()
            self._model, served = choose_model(models, wanted=settings.model, where=address.api)
            self._kind = _kind(served, settings.kind)
            if settings.frames_as == "video" and self._kind != "vllm":
                raise UserError("--frames-as video: only vLLM reads frames as a video; use --frames-as images")
        except BaseException:
            self.close()
            raise
        self._settings = settings
        self._token_field = "max_tokens"
        self._sends_seed = True
        self._takes_video: bool | None = None
        self._checking_video = asyncio.Lock()
        self.identity = {
            "engine": "chat",
            "model": self._model,
            "root": str(served.get("root") or ""),
            "server": self._kind,
            "frames": f"{settings.frames_as}, {settings.frame_format}",
        }
        if settings.server_defaults:
            self.identity["server_defaults"] = " ".join(sorted(settings.server_defaults))

    async def _ask(self, question: Question) -> Answer:
        self._check(question.sampling)
        settings = self._settings
        try:
            messages = await asyncio.to_thread(
                chat_messages,
                question.record,
                question.media,
                frames_as=settings.frames_as,
                frame_format=settings.frame_format,
            )
        except UnusableSample as error:
            return Answer("", problem=error.reason)
        fields: dict[str, Any] = {"model": self._model, "messages": messages, "stream": False}
        if settings.frames_as == "video" and any(medium.kind == "video" for medium in question.media):
            fields |= _video_fields(question.media)
            await self._require_whole_videos()
        reply = await self._completed(fields, question)
        text, is_cut_off = cut_at(reply.text, question.sampling.stop)
        return Answer(
            text=text,
            num_tokens=reply.num_tokens,
            num_prompt_tokens=reply.num_prompt_tokens,
            num_frames=num_frames(question.media),
            is_finished=is_cut_off or reply.is_finished,
        )

    async def _completed(self, fields: Mapping[str, Any], question: Question) -> Reply:
        """The reply. A field that the server refuses, and for which there is another way, is sent in that way."""
        for _ in range(_MOST_ADAPTATIONS):
            token_field, sends_seed = self._token_field, self._sends_seed
            body = {**fields, **self._sampling(question), token_field: question.sampling.max_tokens}
            try:
                return await self._post(body)
            except Refusal as error:
                if error.status not in (400, 422):
                    raise
                said = f"{error.param} {error.said}"
                if token_field == "max_tokens" and "max_completion_tokens" in said and "max_tokens" in said:
                    self._token_field = "max_completion_tokens"
                elif sends_seed and "seed" in body and re.search(r"\bseed\b", said):
                    if self._sends_seed:
                        print(f"{self._web.address.api} takes no seed: answers are not repeatable", file=sys.stderr)
                    self._sends_seed = False
                else:
                    self._explain(error, body)
                    raise
        raise EngineFailed("refused: the server wants other fields at every attempt")

    async def _post(self, body: Mapping[str, Any]) -> Reply:
        content = json.dumps(body, separators=(",", ":")).encode()
        url = f"{self._web.address.api}/chat/completions"
        return await self._web.fetch(
            "POST", url, content, read=lambda found: read_reply(found, clean=self._web.cleaned)
        )

    def _sampling(self, question: Question) -> dict[str, Any]:
        sampling = question.sampling
        values: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.presence_penalty or sampling.frequency_penalty:
            values["presence_penalty"] = sampling.presence_penalty
            values["frequency_penalty"] = sampling.frequency_penalty
        if self._kind != "openai":
            values |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if self._kind == "vllm" and sampling.stop:
            values |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
        if sampling.temperature and self._sends_seed:
            seed = sample_seed(seed=question.seed, step=0, identity=question.identity, sample=0)
            values["seed"] = seed % 2**31
        return {name: value for name, value in values.items() if name not in self._settings.server_defaults}

    def _check(self, sampling: AnswerSampling) -> None:
        """Raises ``UserError`` for settings that the server would silently change."""
        left = self._settings.server_defaults
        if self._kind == "openai" and sampling.top_k and "top_k" not in left:
            raise UserError(
                f"top-k {sampling.top_k}: OpenAI's API has no top-k (--server-default top_k leaves it to the server, "
                "--server-kind vllm sends it)"
            )
        low = TEMPERATURES[0]
        if self._kind == "vllm" and 0 < sampling.temperature < low and "temperature" not in left:
            raise UserError(f"temperature {sampling.temperature:g}: vLLM silently raises temperatures below {low}")

    def _explain(self, error: Refusal, body: Mapping[str, Any]) -> None:
        """Raises ``UserError`` if the server refuses a setting, which no question can change."""
        named = [name for name in SENT if name in body and name == error.param.rpartition(".")[2]]
        if named and not self._has_answered:
            raise UserError(
                f"{self._web.address.api} does not take {named[0]} {body[named[0]]}: {error.message} "
                f"(--server-default {named[0]} leaves it to the server)"
            ) from None

    async def _require_whole_videos(self) -> None:
        """Makes sure, once, that the server obeys ``media_io_kwargs``: without them vLLM shows its model the first 32
        frames of a video, at one frame a second. Of four frames, two must give fewer tokens than all.

        Raises:
            UserError: it does not.
        """
        async with self._checking_video:
            if self._takes_video:
                return
            frames = torch.zeros((4, 3, 112, 112), dtype=torch.uint8)
            record = {"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]}
            medium = VisualInput("video", frames, (2, 8, 8), seconds_per_grid=1.0)
            messages = chat_messages(record, [medium], frames_as="video", frame_format="png")
            advice = "start it with --trust-request-mm-kwargs, or use --frames-as images"
            counts = []
            for number in (2, -1):
                body = {"model": self._model, "messages": messages, "max_tokens": 1, "temperature": 0}
                body["media_io_kwargs"] = {"video": {"num_frames": number, "fps": 2.0}}
                try:
                    counts.append((await self._post(body)).num_prompt_tokens)
                except Refusal as error:
                    raise UserError(f"--frames-as video: the server refuses it: {error.message}; {advice}") from None
            if not counts[0] < counts[1]:
                raise UserError(f"--frames-as video: the server would drop frames without a word; {advice}")
            self._takes_video = True


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(``text`` up to the end of the first stop string, whether it has one)."""
    ends = [found + len(string) for string in stop if (found := text.find(string)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _video_fields(media: Sequence[VisualInput]) -> dict[str, Any]:
    rates = {frames_per_second(medium) for medium in media if medium.kind == "video"}
    if len(rates) > 1:
        raise UserError("--frames-as video: videos of one question have several rates; use --frames-as images")
    return {"media_io_kwargs": {"video": {"num_frames": -1, "fps": rates.pop()}}}


def _kind(served: Mapping[str, Any], kind: ServerKind) -> str:
    return MAKERS.get(str(served.get("owned_by")), "openai") if kind == "auto" else kind
