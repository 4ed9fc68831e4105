"""Tokenises the response that a record gives for imitation: one answer, or a conversation from its first answer on.

    prompt: .. user <assistant>   reply: answer 1 <end>   <user> .. <end> <assistant>   answer 2 <end>
                                  loss:     1       1              0                       1       1

A conversation is a single response. Its user turns are context for the later answers and carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ktr.data.conversation import Message, text_of
from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.template import PromptBuilder, has_marker
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, Rollout, RolloutGroup


def check_reply(record: Mapping[str, Any], *, builder: PromptBuilder) -> None:
    """Raises ``UnusableSample`` if a turn of ``reply_turns`` has a control token, an answer is empty, or a user's turn
    places a medium.

    An end token at the very end of an answer is allowed, because the answer gets one anyway.
    """
    for turn in record["reply_turns"]:
        is_answer = turn["role"] == "assistant"
        builder.refuse_control_tokens(_answer(turn, builder) if is_answer else text_of(turn), record)
        if is_answer and not _answer(turn, builder).strip():
            raise UnusableSample(f"record {record['problem_id']}", "an answer is empty")
        if not is_answer and has_marker(text_of(turn)):
            raise UnusableSample(
                f"record {record['problem_id']}", "a turn after the first answer has a marker <image> or <video>"
            )


def reply_group(prompt: Prompt, *, builder: PromptBuilder) -> RolloutGroup:
    """The prompt with the response that its record gives. Raises as ``build_reply`` does."""
    kinds = [source.kind for source in media_sources(prompt.record)]
    return RolloutGroup(prompt, (build_reply(prompt.record, kinds=kinds, builder=builder),))


def build_reply(record: Mapping[str, Any], *, kinds: Sequence[str], builder: PromptBuilder) -> Rollout:
    """The record's ``reply_turns`` as one response with end tokens. ``kinds`` are the kinds of its media.

    Raises:
        UnusableSample: as in ``check_reply``.
        UserError: the chat template does not let a conversation be split into its turns.
    """
    check_reply(record, builder=builder)
    turns = record["reply_turns"]
    if len(turns) > 1:
        return _conversation(builder.messages(record, kinds)[0], turns, builder)
    answer = _answer(turns[0], builder)
    return Rollout(token_ids=(*_ids(answer, builder), builder.tokenizer.eos_token_id), text=answer)


def _conversation(asked: Sequence[Message], turns: Sequence[Message], builder: PromptBuilder) -> Rollout:
    """``turns`` from the first answer to the last as one response, in the chat format of the prompt of ``asked``.

    Every answer directly follows the opened assistant turn, as it does when the model generates.
    """
    end = builder.tokenizer.eos_token
    history, opened, answer, text = list(asked), "", "", ""
    token_ids: list[int] = []
    is_trained: list[bool] = []
    for turn in turns:
        if turn["role"] != "assistant":
            history.append({"role": turn["role"], "content": text_of(turn)})
            continue
        before, opened = opened, builder.render(history)
        between = _between(before, opened, answer=answer, end=end) if token_ids else ""
        answer = _answer(turn, builder)
        # Context and answer are tokenised separately. This matches generation, where the answer begins after the tokens
        # of the opened turn.
        context, spoken = _ids(between, builder), [*_ids(answer, builder), builder.tokenizer.eos_token_id]
        token_ids += context + spoken
        is_trained += [False] * len(context) + [True] * len(spoken)
        text += (end + between if text else "") + answer
        history.append({"role": "assistant", "content": answer})
    return Rollout(token_ids=tuple(token_ids), text=text, is_trained=tuple(is_trained))


def _between(before: str, opened: str, *, answer: str, end: str) -> str:
    """The text that the chat format writes between ``answer`` with its end token and the next answer.

    ``before`` is the conversation up to the beginning of ``answer``, ``opened`` the one up to the beginning of the next
    answer. Blanks around the answer are ignored: some templates write a blank before it that the opened turn lacks, or
    strip those of the answer.
    """
    shown = opened[len(before) :].lstrip()
    if opened.startswith(before) and shown.startswith(answer.strip()):
        after = shown[len(answer.strip()) :].lstrip()
        if after.startswith(end):
            return after[len(end) :]
    raise UserError(
        "model: its chat template changes earlier turns of a conversation as it goes on, or ends them without the "
        f"tokenizer's end token {end}: conversations with several answers cannot be learnt with it"
    )


def _answer(turn: Message, builder: PromptBuilder) -> str:
    return text_of(turn).removesuffix(builder.tokenizer.eos_token)


def _ids(text: str, builder: PromptBuilder) -> list[int]:
    return builder.tokenizer(text, add_special_tokens=False)["input_ids"]
