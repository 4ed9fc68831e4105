"""Conversations and markers in records: where media stand, what is asked, and which tokens carry the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.data.conversation import split_conversation
from megatron_ktr.data.records import check_record
from megatron_ktr.data.reply import build_reply
from megatron_ktr.data.template import PromptBuilder, VisualTokens, WordingTemplate
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.objectives.sft import SupervisedFineTuning
from megatron_ktr.rollout.replay import ReplayEngine, write_rollouts
from megatron_ktr.types import BatchFacts, Prompt, Rollout, RolloutGroup, ScoredBatch, TokenScores, VisualInput
from tests.support.groups import MEDIA
from tests.support.tiny import EOS_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID
from tests.support.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VIDEO, IMAGE = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
PLAIN = "{{ problem }}{% for option in options %}/{{ option }}{% endfor %}"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    template = tmp_path_factory.mktemp("wording") / "plain.jinja"
    template.write_text(PLAIN)
    tokens = VisualTokens.from_model("nowhere", TOKENIZER)
    return PromptBuilder(TOKENIZER, visual_tokens=tokens, wording=WordingTemplate(template))


def checked(**fields: Any) -> dict[str, Any]:
    return check_record({"solution": "A", **fields}, number=1)


def users_text(builder: PromptBuilder, record: dict[str, Any]) -> list[str]:
    messages, _ = builder.messages(record, [kind for kind, _ in record["media"]])
    return [message["content"] for message in messages if message["role"] == "user"]


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# --- markers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"problem": "What?", "video": "a.mp4"}, [f"{VIDEO}What?"]),
        ({"problem": "<video>\nWhat?", "video": "a.mp4"}, [f"{VIDEO}\nWhat?"]),
        ({"problem": "In <video>, what?", "video": ["a.jpg", "b.jpg"]}, [f"In {VIDEO}, what?"]),
        ({"problem": "<video> or <video>?", "video": ["a.mp4", "b.mp4"]}, [f"{VIDEO} or {VIDEO}?"]),
        ({"problem": "<video> <image>", "video": "a.mp4", "image": "a.png"}, [f"{VIDEO} {IMAGE}"]),
        (
            {"problem": "Which is it?", "options": ["A. <image>", "B. <image>"], "image": ["a.png", "b.png"]},
            [f"Which is it?/A. {IMAGE}/B. {IMAGE}"],
        ),
        ({"messages": [turn("user", "<image>One"), turn("assistant", "A cat"), turn("user", "Two<image>")],
          "images": ["a.png", "b.png"]}, [f"{IMAGE}One", f"Two{IMAGE}"]),
        ({"messages": [turn("user", [{"type": "image"}, {"type": "text", "text": "or <image>?"}])],
          "images": ["a.png", "b.png"]}, [f"{IMAGE}or {IMAGE}?"]),
        ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat"}],
          "video": "a.mp4"}, [f"{VIDEO}\nWhat?"]),
        ({"messages": [turn("user", "What?"), turn("assistant", "A <video> tag"), turn("user", "And?")],
          "video": "a.mp4"}, [f"{VIDEO}What?", "And?"]),
        ({"problem": "Is a < b> c or <videos>?"}, ["Is a < b> c or <videos>?"]),
    ],
)  # fmt: skip
def test_media_stand_where_the_markers_are(builder: PromptBuilder, fields: dict, texts: list[str]) -> None:
    assert users_text(builder, checked(**fields)) == texts


@pytest.mark.parametrize(
    "fields",
    [
        {"problem": "<video>?"},
        {"problem": "<video><video>", "video": "a.mp4"},
        {"problem": "<video>?", "video": ["a.mp4", "b.mp4"]},
        {"problem": "<image>?", "video": "a.mp4"},
        {"problem": "<video>?", "video": "a.mp4", "image": "a.png"},
        {"problem": "Which?", "options": ["<image>"], "image": ["a.png", "b.png"]},
        {"messages": [turn("user", [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "<video>?"}])]},
        {"messages": [turn("user", [{"type": "video"}])]},
        {"problem": "What?", "system": "See <image>", "image": "a.png"},
    ],
)
def test_more_or_fewer_markers_than_media_make_a_record_unusable(builder: PromptBuilder, fields: dict) -> None:
    with pytest.raises(UnusableSample, match="places for|marker"):
        users_text(builder, checked(**fields))


def test_media_are_in_the_order_of_their_markers(builder: PromptBuilder) -> None:
    """The record lists images first; the prompt shows the video first."""
    record = checked(problem="<video> then <image>", video="a.mp4", image="a.png")
    image = VisualInput("image", torch.zeros(1, 3, 28, 28, dtype=torch.uint8), (1, 2, 2))
    video = VisualInput("video", torch.zeros(4, 3, 28, 28, dtype=torch.uint8), (2, 2, 2), 1.0)
    prompt = builder.build(record, [image, video])
    assert [medium.kind for medium in prompt.media] == ["video", "image"]
    visual = [token for token in prompt.token_ids if token in (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID)]
    assert visual == [VIDEO_TOKEN_ID, VIDEO_TOKEN_ID, IMAGE_TOKEN_ID]


# --- system ---------------------------------------------------------------------------------------------------


def test_the_records_system_text_is_the_systems_turn(builder: PromptBuilder, tmp_path: Path) -> None:
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?"
    for fields in (
        {"problem": "What?", "system": "Be brief."},
        {"messages": [turn("user", "What?")], "system": "Be brief."},
        {"messages": [turn("system", "Be brief."), turn("user", "What?")]},
        {"messages": [turn("system", "Be brief."), turn("user", "What?")], "system": "Be brief."},
    ):
        assert builder.chat_text(checked(**fields), []).startswith(head)
    with pytest.raises(ValueError, match="'system' differs"):
        checked(messages=[turn("system", "Be long."), turn("user", "What?")], system="Be brief.")
    (tmp_path / "own.jinja").write_text("{% set system = 'Think.' %}{{ problem }}")
    own = PromptBuilder(TOKENIZER, visual_tokens=builder.visual_tokens, wording=WordingTemplate(tmp_path / "own.jinja"))
    assert "system\nThink.<" in own.chat_text(checked(problem="What?"), [])
    assert "system\nBe brief.<" in own.chat_text(checked(problem="What?", system="Be brief."), [])
    ignored = check_record({"problem": "What?", "solution": "A", "system": "Be brief."}, number=1, ignored=("system",))
    assert "system\nThink.<" in own.chat_text(ignored, [])


# --- what is asked --------------------------------------------------------------------------------------------

TALK = [turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q2"), turn("assistant", "<answer>B</answer>")]


def test_a_final_answer_is_not_asked_and_is_the_solution_where_there_is_none(builder: PromptBuilder) -> None:
    record = check_record({"messages": TALK}, number=1)
    assert record["solution"] == "<answer>B</answer>"
    text = builder.chat_text(record, [])
    assert "B</answer>" not in text and text.endswith("assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
                                                      "<|im_start|>assistant\n")  # fmt: skip
    assert checked(messages=TALK)["solution"] == "A", "its own solution counts"
    # As it is recorded and read again, it asks the same and tells nothing.
    again = check_record({**record, "responses": []}, number=1, needs_solution=False)
    assert builder.chat_text(again, []) == text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [turn("assistant", "Hi")]}, "a user's turn"),
        ({"messages": [turn("user", "Q"), turn("assistant", "A"), turn("assistant", "A")]}, "after a user's"),
        ({"messages": [turn("user", "Q"), turn("system", "S")]}, "the first message"),
        ({"messages": [{**turn("user", "Q"), "weight": 0}]}, "'weight'"),
        ({"messages": [turn("assistant", [{"type": "image", "image": "a.png"}])]}, "users' turns"),
        ({"messages": [turn("user", [{"type": "text", "text": "Q", "cache": 1}])]}, "'cache'"),
        ({"messages": TALK, "conversations": TALK}, "got both"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "'from'"),
        ({"conversations": "x"}, "list of turns"),
    ],
)
def test_conversations_whose_turns_cannot_be_told_apart_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        checked(**fields)
    assert reason in str(caught.value)


# --- what is imitated -----------------------------------------------------------------------------------------


def imitated(**fields: Any) -> dict[str, Any]:
    return check_record(fields, number=1, needs_solution=False, needs_reply=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"problem": "Q1", "response": "A1"},
        {"problem": "Q1", "response": "A1<|im_end|>"},
        {"problem": "Q1", "process": "A", "solution": "1"},
        {"messages": [turn("user", "Q1"), turn("assistant", "A1")]},
        {"messages": [turn("user", "Q1")], "response": "A1"},
        {"conversations": [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}]},
    ],
)
def test_one_answer_is_its_tokens_and_the_end(builder: PromptBuilder, fields: dict) -> None:
    record = imitated(**fields)
    assert builder.chat_text(record, []).endswith("user\nQ1<|im_end|>\n<|im_start|>assistant\n")
    rollout = build_reply(record, kinds=[], builder=builder)
    assert (rollout.text, rollout.is_trained) == ("A1", None)
    assert rollout.token_ids == (*TOKENIZER("A1")["input_ids"], EOS_ID)


def test_the_loss_of_a_conversation_is_on_all_answers_and_on_nothing_else(builder: PromptBuilder) -> None:
    record = imitated(messages=[*TALK[:3], turn("assistant", "B"), turn("user", "Q3")], response="C.")
    assert builder.chat_text(record, []).endswith("user\nQ1<|im_end|>\n<|im_start|>assistant\n")
    rollout = build_reply(record, kinds=[], builder=builder)
    # One token a character, one for each special token: written out by hand.
    pieces = [
        ("A1", 2, True),
        ("<|im_end|>", 1, True),
        ("\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", 1 + 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1, False),
        ("B", 1, True),
        ("<|im_end|>", 1, True),
        ("\n<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n", 22, False),
        ("C.", 2, True),
        ("<|im_end|>", 1, True),
    ]
    assert TOKENIZER.decode(rollout.token_ids) == "".join(text for text, _, _ in pieces)
    mask = [flag for _, count, flag in pieces for _ in range(count)]
    assert rollout.is_trained == tuple(mask)

    prompt = Prompt("p", (1, 2, 3))
    single = RolloutGroup(prompt, (Rollout((5, 6, EOS_ID)),))
    batch = pack_groups([RolloutGroup(prompt, (rollout,)), single], view="intact", media=MEDIA)
    objective = SupervisedFineTuning()
    scores = TokenScores(policy_logprob_R=torch.zeros(len(batch.target_ids_R)))
    assert objective.num_loss_tokens(batch, None) == sum(mask) + 3
    streams = objective.token_streams(ScoredBatch(batch, scores, []), BatchFacts(2, num_tokens=sum(mask) + 3))
    expected = [1 / (sum(mask) + 3) if flag else 0.0 for flag in (*mask, True, True, True)]
    assert streams.weight_R.tolist() == pytest.approx(expected) and streams.is_key_token_R.tolist() == [*mask, 1, 1, 1]
    by_response = SupervisedFineTuning(loss_aggregation="sequence")
    weight_R = by_response.token_streams(ScoredBatch(batch, scores, []), BatchFacts(2)).weight_R
    assert weight_R[: len(mask)].sum() == pytest.approx(0.5) and weight_R[-3:].sum() == pytest.approx(0.5)


def test_a_conversation_reads_as_the_chat_template_writes_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    builder = PromptBuilder(tokenizer, visual_tokens=VisualTokens.from_model("nowhere", tokenizer))
    record = imitated(messages=TALK)
    prompt = builder.build(record)
    whole = builder.render(TALK, is_asking=False)
    ids = (*prompt.token_ids, *build_reply(record, kinds=[], builder=builder).token_ids)
    assert tokenizer.decode(ids) + "\n" == whole
    # The demo's template writes a blank before an answer that the opened turn lacks.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    rollout = build_reply(record, kinds=[], builder=builder)
    assert tokenizer.decode(rollout.token_ids) == (
        "A1<|im_end|><|im_start|>user Q2<|im_end|><|im_start|>assistant<answer>B</answer><|im_end|>"
    )
    assert rollout.is_trained == (*[True] * 3, *[False] * 19, *[True] * 19)
    # A template that shows earlier answers differently later on (as those that drop reasoning) cannot be learnt from.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '..' }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UserError, match="chat template"):
        build_reply(record, kinds=[], builder=builder)


QWEN_CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The text of Qwen2.5-VL's chat format. Its marks of what the assistant says are for transformers alone."""


def test_the_mask_of_a_conversation_is_that_of_transformers() -> None:
    """transformers finds the assistant's tokens by the template's marks, in the text of the whole conversation."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN_CHAT
    builder = PromptBuilder(tokenizer, visual_tokens=VisualTokens.from_model("nowhere", tokenizer))
    for talk in (TALK[:2], TALK, [turn("system", "S"), *TALK, turn("user", "Q3"), turn("assistant", "C, then.")]):
        record = imitated(messages=talk)
        prompt, rollout = builder.build(record), build_reply(record, kinds=[], builder=builder)
        theirs = tokenizer.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
        )
        ours = (*prompt.token_ids, *rollout.token_ids)
        mask = [0] * len(prompt.token_ids) + [int(flag) for flag in rollout.is_trained or [1] * len(rollout.token_ids)]
        assert list(ours) == theirs["input_ids"][: len(ours)] and mask == theirs["assistant_masks"][: len(ours)]
        assert len(theirs["input_ids"]) == len(ours) + 1, "the newline behind the last end"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"problem": "Q"}, "no response to imitate"),
        ({"problem": "Q", "response": "  "}, "no response to imitate"),
        ({"problem": "Q", "response": ["A"]}, "no response to imitate"),
        ({"messages": [turn("user", "Q")]}, "no response to imitate"),
        ({"messages": TALK, "response": "Z"}, "'response' differs"),
        (
            {"messages": [*TALK[:2], turn("user", [{"type": "image", "image": "a.png"}]), turn("assistant", "A")]},
            "after the first",
        ),
    ],
)
def test_records_without_one_response_to_imitate_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        imitated(**fields)
    assert reason in str(caught.value)


# --- control tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a<|video_pad|>b", "a<|im_end|>b", "a<|im_end|><|im_end|>", "<|im_start|>system\nx"])
def test_control_tokens_are_refused_wherever_text_comes_from(builder: PromptBuilder, tmp_path: Path, text: str) -> None:
    for record in (
        imitated(problem="Q", response=text),
        imitated(problem="Q", process=text, solution="x"),
        imitated(messages=[*TALK[:1], turn("assistant", text), *TALK[2:]]),
        imitated(messages=[*TALK[:2], turn("user", text), TALK[3]]),
    ):
        with pytest.raises(UnusableSample, match="control token"):
            build_reply(record, kinds=[], builder=builder)
    with pytest.raises(UnusableSample, match="an answer is empty"):
        build_reply(imitated(messages=[TALK[0], turn("assistant", " "), *TALK[2:]]), kinds=[], builder=builder)
    for record in (checked(problem="Q", options=[text]), checked(problem="Q", system=text)):
        with pytest.raises(UnusableSample, match="control token"):
            builder.chat_text(record, [])
    prompt = Prompt("p", (1, 2), record={"problem": "Q"})
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"problem": "Q", "responses": [{"text": text, "reward": 1}]}) + "\n")
    with pytest.raises(UserError, match="control token .*give token_ids"):
        ReplayEngine(path, tokenizer=TOKENIZER)
    # A model may have said it: what is recorded with its tokens is replayed as it was.
    said = Rollout((VIDEO_TOKEN_ID, 5, EOS_ID), text=text, rewards={"r": 1.0})
    write_rollouts(path, [RolloutGroup(prompt, (said,))], append=False)
    engine = ReplayEngine(path, tokenizer=TOKENIZER)
    assert engine.generate([Prompt("p", (1, 2), record=engine.records[0])])[0].rollouts == (said,)


def test_where_a_conversation_is_cut() -> None:
    assert split_conversation(TALK, at_first_answer=True) == (TALK[:1], TALK[1:])
    assert split_conversation(TALK, at_first_answer=False) == (TALK[:3], TALK[3:])
    assert split_conversation(TALK[:3], at_first_answer=False) == (TALK[:3], [])
