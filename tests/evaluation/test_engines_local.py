"""Engines that run a model here: Hugging Face's generate, the adapter for training; identities; choice by options."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed import platform
from megatron_ktr.errors import Parser, UserError
from megatron_ktr.evaluation.engines import local
from megatron_ktr.evaluation.engines.base import AnswerSampling, EngineFailed, Question
from megatron_ktr.evaluation.engines.build import (
    EngineOptions,
    add_arguments,
    build_engine,
    choose_engine,
    options_of,
    require_sampling,
)
from megatron_ktr.evaluation.engines.identity import model_identity
from megatron_ktr.evaluation.engines.local import LocalModel
from megatron_ktr.evaluation.engines.rollout import RolloutAnswers
from megatron_ktr.files.checksums import write_manifest
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.sampling import SamplingSettings, end_token_ids, penalised
from megatron_ktr.rollout.vllm.sampling import sampling_values
from megatron_ktr.types import Rollout, RolloutGroup
from tests.support.fake_chat import FakeChat
from tests.support.questions import DRAWN, GREEDY, question, video


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "model"
    save_tiny_model(directory, corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    return directory


@pytest.fixture(scope="module")
def hf(model_dir) -> Iterator[RolloutAnswers]:
    platform.start("cpu")
    engine = build_engine(EngineOptions(model=str(model_dir), engine="hf", concurrency=3))
    assert isinstance(engine, RolloutAnswers)
    yield engine
    engine.close()


def questions(sampling: AnswerSampling) -> list[Question]:
    return [
        question("a", "which colour came first", media=(video(4, seed=1),), sampling=sampling),
        question("b", "how many are there", media=(video(6, height=28, seed=2),), sampling=sampling),
        question("c", "which letter is red", sampling=sampling, system="which letter"),
        question("d", "which colour came first", media=(video(4, seed=3),), sampling=sampling),
        question("e", "which colour came last", media=(video(2, seed=4),), sampling=replace(sampling, max_tokens=5)),
    ]


def texts(engine, asked) -> dict[str, str]:
    return {found.key: answer.text for found, answer in engine.answer(iter(asked))}


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers_own_generate(hf, model_dir):
    from megatron_ktr.files.hf_model import hf_model_class

    model = hf_model_class().from_pretrained(model_dir, dtype=torch.float32).eval()
    parts = LocalModel.read(model_dir)
    # Where time exceeds space Hugging Face's positions differ from those of training.
    asked = question("a", media=(video(4, height=112, width=112, seed=1),))
    prompt, _ = parts.prompts.make(asked)
    (medium,) = prompt.media
    tokens = model.generate(
        input_ids=torch.tensor([prompt.token_ids]),
        mm_token_type_ids=torch.tensor([[2 * (token == parts.media.video_token_id) for token in prompt.token_ids]]),
        attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
        pixel_values_videos=parts.media.patchify(medium.frames_FCHW, medium),
        video_grid_thw=torch.tensor([medium.grid_thw]),
        second_per_grid_ts=torch.tensor([medium.seconds_per_grid]),
        max_new_tokens=GREEDY.max_tokens,
        do_sample=False,
    )[0, len(prompt.token_ids) :]
    ((_, answer),) = hf.answer(iter([asked]))
    assert answer.text == parts.prompts.builder.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.text and (answer.num_tokens, answer.num_frames) == (len(tokens), 4)
    assert answer.num_prompt_tokens == len(prompt.token_ids)


def test_drawn_answers_do_not_depend_on_the_batch_but_on_key_and_seed(hf):
    together = texts(hf, questions(DRAWN))
    alone = {asked.key: texts(hf, [asked])[asked.key] for asked in reversed(questions(DRAWN))}
    assert together == alone and len(set(together.values())) == 5
    assert texts(hf, [replace(asked, seed=1) for asked in questions(DRAWN)]) != together
    assert texts(hf, [replace(asked, key=f"{asked.key}/2") for asked in questions(DRAWN)]) != together


def test_logits_are_lowered_by_what_the_response_has_already():
    logits = torch.arange(5.0)[None].repeat(2, 1)
    found = penalised(logits, torch.tensor([[1, 1, 4], [0, 2, 3]]), presence=0.5, frequency=0.25)
    assert found.tolist() == [[0.0, 0.0, 2.0, 3.0, 3.25], [-0.75, 1.0, 1.25, 2.25, 4.0]]
    assert torch.equal(penalised(logits, torch.empty(2, 0, dtype=torch.long), presence=9, frequency=9), logits)


def test_a_high_presence_penalty_lets_no_token_repeat(model_dir):
    platform.start("cpu")
    parts = LocalModel.read(model_dir)
    sampling = SamplingSettings(num_generations=1, max_response_length=20, temperature=0.0)
    engine = HFEngine(model_dir, tokenizer=parts.prompts.builder.tokenizer, media=parts.media, sampling=sampling)
    prompt, _ = parts.prompts.make(questions(GREEDY)[0])
    (plain,), (changed,) = (
        engine.generate([prompt], sampling=chosen)[0].rollouts
        for chosen in (sampling, replace(sampling, presence_penalty=1000.0))
    )
    assert len(set(plain.token_ids)) < len(plain.token_ids), "the greedy response must repeat a token"
    assert len(set(changed.token_ids)) == len(changed.token_ids)
    assert plain.sampler_logprobs is not None and changed.sampler_logprobs is None


def test_vllm_is_told_penalties_and_asked_for_no_logprobs_with_them():
    sampling = SamplingSettings(1, 8, presence_penalty=0.4, frequency_penalty=0.2)
    told = sampling_values(sampling, seed=1, end_token_ids=(2,), mode="raw_logprobs")
    assert (told["presence_penalty"], told["frequency_penalty"]) == (0.4, 0.2) and "logprobs" not in told
    plain = sampling_values(SamplingSettings(1, 8), seed=1, end_token_ids=(2,), mode="raw_logprobs")
    assert plain["logprobs"] == 0 and not any("penalty" in name for name in plain)


def test_a_response_stops_at_a_stop_string_and_keeps_it(hf):
    whole = texts(hf, questions(GREEDY))["a"]
    stop = next(character for character in whole if character.isascii())  # others may be halves of characters
    sampling = replace(GREEDY, stop=(stop,))
    ((_, answer),) = hf.answer(iter(questions(sampling)[:1]))
    # The token that completes the string may have more characters.
    assert answer.is_finished and whole.startswith(answer.text) and stop in answer.text
    assert answer.num_tokens < 12


def test_what_does_not_fit_into_the_context_has_a_problem_or_is_cut_off(model_dir):
    parts = LocalModel.read(model_dir)
    asked = questions(GREEDY)[0]
    length = len(parts.prompts.make(asked)[0].token_ids)
    platform.start("cpu")
    for room in (0, 1, 3):
        engine = build_engine(EngineOptions(model=str(model_dir), engine="hf", max_model_len=length + room))
        ((_, answer),) = engine.answer(iter([asked]))
        engine.close()
        if room:
            assert (answer.num_tokens, answer.is_finished, answer.problem) == (room, False, "")
        else:
            assert answer.text == "" and f"{length} tokens leaves no room" in answer.problem


def test_a_text_with_control_tokens_has_a_problem(hf):
    ((_, answer),) = hf.answer(iter([question("a", "end <|im_end|> it")]))
    assert "control token" in answer.problem


def test_a_batch_that_exceeds_the_memory_is_halved(model_dir, monkeypatch):
    platform.start("cpu")
    sizes = []
    generate = HFEngine.generate

    def small(self, prompts, **options):
        sizes.append(len(prompts))
        if len(prompts) > 1 or prompts[0].problem_id == "c":
            raise MemoryError("no room")
        return generate(self, prompts, **options)

    monkeypatch.setattr(local.HFEngine, "generate", small)
    engine = build_engine(EngineOptions(model=str(model_dir), engine="hf"))
    answers = dict((found.key, answer) for found, answer in engine.answer(iter(questions(GREEDY)[:2])))
    assert sizes == [2, 1, 1] and all(answer.text for answer in answers.values())
    ((_, answer),) = engine.answer(iter(questions(GREEDY)[2:3]))
    engine.close()
    assert isinstance(answer, EngineFailed) and "no room" in str(answer)


def test_the_adapter_for_training_samples_questions_with_equal_settings_together(model_dir):
    calls = []

    def sample(prompts, sampling):
        calls.append(([prompt.problem_id for prompt in prompts], sampling.max_response_length, sampling.seed))
        return [RolloutGroup(prompt, (Rollout((1, 2), text=prompt.problem_id),)) for prompt in prompts]

    engine = RolloutAnswers(sample, prompts=LocalModel.read(model_dir).prompts, capacity=4, identity={"engine": "run"})
    found = {asked.key: answer.text for asked, answer in engine.answer(iter(questions(GREEDY)))}
    assert found == {key: key for key in "abcde"}
    assert calls == [(["a", "b", "c", "d"], 12, 0), (["e"], 5, 0)]


def test_identity_changes_with_any_weight_config_or_tokenizer_and_with_nothing_else(model_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    (copy / "README.md").write_text("hello")
    before = model_identity(copy)
    assert before == model_identity(model_dir)
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = model_identity(copy)
    assert {key for key in before if before[key] != changed[key]} == {"weights"}
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(config | {"top_k": 3}))
    assert model_identity(copy)["config"] != before["config"]
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": "x"}))
    assert model_identity(copy)["tokenizer"] != before["tokenizer"]


def test_weights_that_differ_from_their_checksums_are_refused(model_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    write_manifest(copy)
    model_identity(copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="--model: .* is damaged"):
        model_identity(copy)


def test_a_server_that_takes_no_token_ids_is_asked_by_chat_and_the_console_says_so(model_dir, capsys):
    fake = FakeChat(models=("its name",))
    chosen = EngineOptions(model=str(model_dir), server_url=fake.url)
    engine = build_engine(chosen)
    ((_, answer),) = engine.answer(iter([question("a", media=(video(2),))]))
    engine.close()
    assert answer.text == "which colour came first|2" and engine.identity["model"] == "its name"
    console = capsys.readouterr().out
    assert "does not report its settings" in console and "engine: chat server" in console
    with pytest.raises(UserError, match="does not report its settings.*--engine chat"):
        build_engine(replace(chosen, engine="server"))
    fake.close()


def options(*flags: str) -> EngineOptions:
    parser = Parser(prog="evaluate")
    add_arguments(parser)
    return options_of(parser.parse_args(list(flags)))


def test_flags_are_the_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_of(parser.parse_args(["--model", "m"])) == EngineOptions(model="m")
    found = options("--model", "http://host", "--server-default", "temperature", "top_p", "--max-retries", "2")
    assert found.server_default == ("temperature", "top_p") and found.max_retries == 2


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("--model DIR --engine hf", "hf"),
        ("--model http://host:1", "chat"),
        ("--server-url http://host:1 --served-model gpt", "chat"),
        ("--model DIR --server-url http://host:1", "server"),
        ("--model DIR --server-url http://host:1 --frames-as video", "chat"),
        ("--model NAME --server-url http://host:1", "chat"),
    ],
)
def test_the_engine_follows_from_the_options(model_dir, flags, engine):
    assert choose_engine(options(*flags.replace("DIR", str(model_dir)).split())) == engine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--model: give"),
        ("--model http://host --server-url http://host", "--served-model"),
        ("--model m --engine chat", "needs --server-url"),
        ("--model m --served-model n --server-url http://host", "give one of the two"),
        ("--model http://host --engine hf", "takes no URL"),
        ("--model http://host --engine server", "needs --model DIR"),
        ("--model http://host --dtype bf16", "--dtype does not concern --engine chat"),
        ("--model m --engine hf --tensor-parallel-size 2", "--tensor-parallel-size does not concern --engine hf"),
        ("--model m --engine hf --api-key-env NAME", "--api-key-env does not concern"),
        ("--model m --engine hf --concurrency 0", "--concurrency"),
        ("--model http://host --server-default seed", "--server-default takes"),
        ("--model http://host --request-timeout nan", "--request-timeout"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(flags, message):
    with pytest.raises(UserError, match=message):
        choose_engine(options(*flags.split()))


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}, {"max_tokens": 0}]
)
def test_sampling_out_of_range_is_refused_before_the_engine_starts(change):
    with pytest.raises(UserError):
        require_sampling(EngineOptions(model="m", engine="hf"), replace(GREEDY, **change))
    require_sampling(EngineOptions(model="m", engine="hf"), GREEDY)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_directory_without_a_model_is_a_user_error(tmp_path, make):
    make(tmp_path / "model")
    with pytest.raises(UserError):
        build_engine(EngineOptions(model=str(tmp_path / "model"), engine="hf"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None], ids=["empty", "cut", "no text", "folder"])
def test_a_generation_config_that_cannot_be_read_gives_no_other_end_tokens(model_dir, tmp_path, content):
    shutil.copytree(model_dir, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.unlink()
    tokenizer = LocalModel.read(model_dir).prompts.builder.tokenizer
    assert end_token_ids(tmp_path / "model", tokenizer)  # without the file, those of the config
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read"):
        end_token_ids(tmp_path / "model", tokenizer)
