"""Sampling and the Hugging Face rollout engine, against HF's own forward pass and against hand-made distributions."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config import config_from_values
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed import platform
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.accuracy import evaluate
from megatron_ktr.evaluation.asking.controls import apply_control
from megatron_ktr.rollout.build import build_sampler
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.sampling import GumbelSampler, SamplingSettings, StopStrings, cut, sample_seed
from megatron_ktr.rollout.second_prompt import SecondPrompt
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec
from tests.support.parity import Group, Medium, hf_logprobs

SETTINGS = SamplingSettings(num_generations=3, max_response_length=9, seed=5)


def test_gumbel_choice_has_the_softmax_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = GumbelSampler([1], temperature=0.7)
    counts = torch.zeros(4)
    num_draws = 4000
    for _ in range(num_draws):
        counts[sampler.choose(logits)] += 1
    expected = torch.softmax(logits[0] / 0.7, dim=0)
    # Five standard deviations of a binomial share: fails by chance once in two million runs of a free seed.
    tolerance = 5 * (expected * (1 - expected) / num_draws).sqrt()
    assert ((counts / num_draws - expected).abs() < tolerance).all()


def test_recorded_logprob_is_of_the_whole_vocabulary_before_the_cut() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sampler = GumbelSampler([1], temperature=2.0, top_k=1)
    assert sampler.choose(logits).item() == 3
    # 1e-6: one fp32 log-softmax of four numbers.
    assert sampler.logprobs[0].item() == pytest.approx(torch.log_softmax(logits[0] / 2, 0)[3].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"), [(0.6, 0, {3}), (0.7, 0, {2, 3}), (1.0, 2, {2, 3}), (0.01, 0, {3})]
)
def test_top_p_and_top_k_keep_the_smallest_sufficient_set(top_p: float, top_k: int, allowed: set[int]) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])  # probabilities 0.03, 0.09, 0.24, 0.64
    sampler = GumbelSampler([7], temperature=1.0, top_p=top_p, top_k=top_k)
    assert {int(sampler.choose(logits)) for _ in range(300)} == allowed


@pytest.mark.parametrize(("top_p", "top_k"), [(0.95, 50), (0.5, 5), (0.9, 0), (1.0, 7), (0.95, 5000)])
def test_the_cut_is_that_of_transformers_top_k_first_then_top_p_of_the_rest(top_p: float, top_k: int) -> None:
    """The paper's run has 50 and 0.95. Top-p counts the probability that top-k has left, as in vLLM."""
    logits = 2 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k=top_k)(None, expected)
    expected = TopPLogitsWarper(top_p=top_p)(None, expected)
    kept = cut(torch.log_softmax(logits, dim=-1), top_p=top_p, top_k=top_k)
    assert torch.equal(kept.isfinite(), expected.isfinite())


def test_seeds_differ_in_every_part() -> None:
    base = dict(seed=1, step=2, identity="3", sample=4)
    seeds = {sample_seed(**{**base, **change}) for change in ({}, {"seed": 9}, {"step": 9}, {"sample": 9})}
    assert len(seeds | {sample_seed(**{**base, "identity": "9"})}) == 5
    assert sample_seed(seed=1, step=23, identity="4", sample=5) != sample_seed(seed=1, step=2, identity="34", sample=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> HFEngine:
    platform.start("cpu")
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(directory, corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    media = media_spec(Qwen2_5_VLConfig.from_hf(directory), patchify=_patchify)
    return HFEngine(directory, tokenizer=load_tokenizer(directory), media=media, sampling=SETTINGS)


def _patchify(frames_FCHW: torch.Tensor, visual: VisualInput) -> torch.Tensor:
    from megatron_ktr.data.media.preprocess import PreprocessSettings

    return PreprocessSettings().patchify(frames_FCHW, visual)


def prompts_of(media: MediaSpec, tokenizer) -> list[Prompt]:
    """A long video (time exceeds space), an image with a video, and text alone; different lengths."""
    generator = torch.Generator().manual_seed(0)

    def visual(kind: str, num_frames: int, height: int, width: int) -> VisualInput:
        frames = torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)
        grid = (-(-num_frames // 2), height // 14, width // 14)
        return VisualInput(kind, frames, grid, seconds_per_grid=2.5 if kind == "video" else 0.0)

    def prompt(name: str, text: str, *visuals: VisualInput) -> Prompt:
        start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        ids = []
        for item in visuals:
            ids += [start, *[media.token_id(item)] * media.num_visual_tokens(item), end]
        record = {"solution": "<answer>A</answer>", "problem_type": "multiple choice"}
        return Prompt(name, (*ids, *tokenizer(text)["input_ids"]), tuple(visuals), record)

    return [
        prompt("long", "which colour came first", visual("video", 10, 28, 28)),
        prompt("both", "how many are there", visual("image", 1, 28, 56), visual("video", 4, 56, 28)),
        prompt("text", "which letter is red"),
    ]


@torch.no_grad()
def full_forward(model, prompt: Prompt, response, *, media: MediaSpec) -> torch.Tensor:
    """Log-probs of one response by HF's own forward over the whole sequence, without cache or padding."""
    positions, next_position = media.positions(
        prompt.token_ids,
        grid_thw=[m.grid_thw for m in prompt.media],
        kinds=[m.kind for m in prompt.media],
        seconds_per_grid=[m.seconds_per_grid for m in prompt.media],
    )
    group = Group(
        prompt=torch.tensor(prompt.token_ids),
        prompt_positions=positions,
        next_position=next_position,
        media=tuple(Medium(m.kind, m.grid_thw, m.seconds_per_grid) for m in prompt.media),
        patches=tuple(media.patchify(m.frames_FCHW, m) for m in prompt.media),
        responses=(torch.tensor(response),),
        weights=(),
    )
    return hf_logprobs(model, group)[0]


def test_sampler_logprobs_equal_a_full_forward_of_each_response(engine: HFEngine) -> None:
    groups = engine.generate(prompts_of(engine.media, engine.tokenizer), step=1)
    for group in groups:
        for rollout in group.rollouts:
            expected = full_forward(engine.model, group.prompt, rollout.token_ids, media=engine.media)
            got = torch.tensor(rollout.sampler_logprobs)
            # 2e-5: fp32, cached and left-padded attention sums in another order than one full pass.
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_in_bf16_weights_take_two_bytes_and_logprobs_stay_near_those_of_fp32(engine: HFEngine) -> None:
    """The engine of a run with a bf16 policy; what it samples is scored in fp32."""
    values = dict(model=engine.model.config._name_or_path, engine="hf", data_path="none.jsonl", params_dtype="bf16")
    config = config_from_values(values | dict(num_generations=3, max_response_length=40))
    groups = SimpleNamespace(is_source=True)
    sampler = build_sampler(config, ranks=groups, tokenizer=engine.tokenizer, media=engine.media)
    half = sampler.engine
    sent = {name: tensor.bfloat16() for name, tensor in engine._parameters.items()}
    half.load_weights(iter(sent.items()))
    assert all(torch.equal(half._parameters[name], tensor) for name, tensor in sent.items())
    assert {tensor.dtype for tensor in half.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in half.model.named_buffers() if "inv_freq" in name} == {torch.float32}
    gaps = []
    for group in half.generate(prompts_of(engine.media, engine.tokenizer), step=1):
        for rollout in group.rollouts:
            expected = full_forward(engine.model, group.prompt, rollout.token_ids, media=engine.media)
            gaps.append((torch.tensor(rollout.sampler_logprobs) - expected).abs())
    # bf16 keeps 8 bits, and two layers are shallow: some thousandths of a nat. No gap at all would be fp32 arithmetic.
    assert 1e-5 < float(torch.cat(gaps).mean()) < 0.05


def test_published_generation_settings_do_not_reach_the_sampler(engine: HFEngine, tmp_path) -> None:
    """Published directories ask for a repetition penalty; sampling and log-probs must not follow it."""
    directory = tmp_path / "penalised"
    shutil.copytree(engine.model.config._name_or_path, directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 1, "temperature": 0.1}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    other = HFEngine(directory, tokenizer=engine.tokenizer, media=engine.media, sampling=SETTINGS)
    prompts = prompts_of(engine.media, engine.tokenizer)
    assert other.generate(prompts, step=1) == engine.generate(prompts, step=1)


def test_responses_do_not_depend_on_the_batch_around_them(engine: HFEngine) -> None:
    prompts = prompts_of(engine.media, engine.tokenizer)
    together = engine.generate(prompts, step=3)
    for prompt, group in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], step=3)[0]
        assert [r.token_ids for r in alone.rollouts] == [r.token_ids for r in group.rollouts]
    assert len({r.token_ids for group in together for r in group.rollouts}) == 9
    later = engine.generate(prompts, step=4)
    assert [r.token_ids for r in later[0].rollouts] != [r.token_ids for r in together[0].rollouts]


def test_a_second_prompt_is_answered_by_its_count_and_changes_no_other_response(engine: HFEngine) -> None:
    prompts = prompts_of(engine.media, engine.tokenizer)
    asked = [second for prompt in prompts if (second := SecondPrompt(3, 2, seed=5).of(prompt, step=3)) is not None]
    assert [prompt.problem_id for prompt in asked] == ["long", "both"], "text has no order to lose"
    alone = engine.generate(prompts, step=3)
    # Batches of at most 4 responses: prompts with 3, and the last of them with one that has 2, would not fit together.
    small = dataclasses.replace(SETTINGS, max_batch_size=4)
    for sampling in (None, small):
        found = dict(engine.stream([*prompts, *asked], step=3, sampling=sampling, counts=[3, 3, 3, 2, 2]))
        assert tokens_of(found[i] for i in range(3)) == tokens_of(alone)
        second = tokens_of(found[i] for i in (3, 4))
        assert [len(responses) for responses in second] == [2, 2] and second[0] != tokens_of(alone)[0][:2]
        for place, prompt in enumerate(asked):
            ((_, group),) = engine.stream([prompt], step=3, counts=[2])
            assert tokens_of([group]) == [second[place]]


def tokens_of(groups) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group.rollouts] for group in groups]


def test_greedy_responses_are_the_argmax_of_a_full_forward(engine: HFEngine) -> None:
    greedy = SamplingSettings(num_generations=1, max_response_length=6, temperature=0.0)
    for group in engine.generate(prompts_of(engine.media, engine.tokenizer), step=0, sampling=greedy):
        rollout = group.rollouts[0]
        for index, token in enumerate(rollout.token_ids):
            options = torch.stack(
                [
                    full_forward(engine.model, group.prompt, (*rollout.token_ids[:index], other), media=engine.media)[
                        -1
                    ]
                    for other in {token, 0, 5, 100, 200, engine.end_token_ids[0]}
                ]
            )
            # Greedy: none of the others is more probable; 1e-4 leaves room for reordered fp32 sums.
            assert rollout.sampler_logprobs[index] >= options.max().item() - 1e-4


def test_a_record_drawn_again_gets_other_responses_and_each_draw_keeps_its_own(engine: HFEngine) -> None:
    text = prompts_of(engine.media, engine.tokenizer)[2]
    draws = [dataclasses.replace(text, draw_number=number) for number in range(4)]
    groups = engine.generate(draws, step=1)
    assert len({tuple(rollout.token_ids for rollout in group.rollouts) for group in groups}) == 4
    (alone,) = engine.generate(draws[2:3], step=1)
    assert [rollout.token_ids for rollout in alone.rollouts] == [rollout.token_ids for rollout in groups[2].rollouts]


def test_new_weights_change_the_responses_and_incomplete_ones_are_refused(engine: HFEngine) -> None:
    prompts = prompts_of(engine.media, engine.tokenizer)
    before = engine.generate(prompts, step=1)
    original = {name: tensor.clone() for name, tensor in engine._parameters.items()}
    engine.load_weights((name, tensor * 1.5) for name, tensor in original.items())
    after = engine.generate(prompts, step=1)
    assert [r.token_ids for g in before for r in g.rollouts] != [r.token_ids for g in after for r in g.rollouts]
    with pytest.raises(UserError, match="were not sent"):
        engine.load_weights(iter(list(original.items())[:3]))
    with pytest.raises(UserError, match="shape"):
        engine.load_weights(iter([("lm_head.weight", torch.zeros(2, 2))]))
    engine.load_weights(iter(original.items()))
    assert engine.generate(prompts, step=1) == before


# Stop strings


def first_completion(token_ids: list[int], stop: tuple[str, ...], tokenizer) -> int | None:
    """Tokens up to the one that completes a stop string, by decoding every prefix; text that ends within a multi-byte
    character is not there yet."""
    for length in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:length], skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and any(string in text for string in stop):
            return length
    return None


def incremental_completion(token_ids: list[int], stop: tuple[str, ...], tokenizer) -> int | None:
    strings = StopStrings(stop, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True), num_rows=2)
    for length, token_id in enumerate(token_ids, start=1):
        strings.completed_by(0, token_ids[-length])  # another row's text must not matter
        if strings.completed_by(1, token_id):
            return length
    return None


@pytest.mark.parametrize(
    ("text", "stop", "ends_with"),
    [
        ("red blue red", ("blue",), "red blue"),
        ("red blue red", ("d b",), "red blue"),  # begins and ends within tokens
        ("red", ("d",), "red"),
        ("naïve 日本語 end", ("本",), "naïve 日本"),
        ("naïve 日本語 end", ("never", "日本語 e"), "naïve 日本語 e"),
        ("<think>red</think><answer>A</answer> red", ("</answer>",), "<think> red</think><answer> A</answer>"),
        ("red blue", ("green", "red  blue"), None),
    ],
)
def test_a_stop_string_is_completed_by_one_token_whatever_bytes_tokens_hold(
    engine: HFEngine, text: str, stop: tuple[str, ...], ends_with: str | None
) -> None:
    token_ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    length = incremental_completion(token_ids, stop, engine.tokenizer)
    assert length == first_completion(token_ids, stop, engine.tokenizer)
    if ends_with is None:
        assert length is None
    else:
        assert engine.tokenizer.decode(token_ids[:length], skip_special_tokens=True).startswith(ends_with)
        assert not any(s in engine.tokenizer.decode(token_ids[: length - 1], skip_special_tokens=True) for s in stop)


def test_decoding_token_by_token_finds_what_decoding_everything_finds(engine: HFEngine) -> None:
    """Random words, special tokens and multi-byte characters, each a row of byte tokens."""
    generator = torch.Generator().manual_seed(0)
    pieces = [" red", " blue", "<answer>", "<|im_start|>", "é", "日", "🙂", "a", " ", "\n"]
    for _ in range(100):
        chosen = torch.randint(len(pieces), (8,), generator=generator).tolist()
        token_ids = [
            token
            for index in chosen
            for token in engine.tokenizer(pieces[index], add_special_tokens=False)["input_ids"]
        ]
        for stop in (("日",), ("blue", "é"), ("d b",), ("🙂a", " r")):
            assert incremental_completion(token_ids, stop, engine.tokenizer) == first_completion(
                token_ids, stop, engine.tokenizer
            ), (chosen, stop)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(engine: HFEngine) -> None:
    """Nothing before that token changes, in the row itself or in others."""
    prompts = prompts_of(engine.media, engine.tokenizer)
    free = [rollout for group in engine.generate(prompts, step=1) for rollout in group.rollouts]
    stop = (next(rollout.text for rollout in free if len(rollout.text) > 12)[5:8],)
    sampling = dataclasses.replace(SETTINGS, stop=stop)
    stopped = [rollout for group in engine.generate(prompts, step=1, sampling=sampling) for rollout in group.rollouts]
    lengths = [first_completion(list(rollout.token_ids), stop, engine.tokenizer) for rollout in free]
    assert any(lengths) and not all(lengths)
    for before, after, length in zip(free, stopped, lengths, strict=True):
        if length is None:
            assert after == before
        else:
            assert after.token_ids == before.token_ids[:length]
            # 1e-6: the same numbers; rows that have ended still go through the model beside the others.
            assert after.sampler_logprobs == pytest.approx(before.sampler_logprobs[:length], abs=1e-6)
            assert after.is_finished and stop[0] in after.text and before.text.startswith(after.text)


def test_generation_ends_when_every_response_has_ended(engine: HFEngine, monkeypatch) -> None:
    steps = []
    choose = GumbelSampler.choose
    monkeypatch.setattr(GumbelSampler, "choose", lambda self, logits: steps.append(1) or choose(self, logits))
    prompts = prompts_of(engine.media, engine.tokenizer)
    letters = tuple("abcdefghijklmnopqrstuvwxyz<>")
    sampling = dataclasses.replace(SETTINGS, stop=letters, max_response_length=64)
    groups = engine.generate(prompts, step=1, sampling=sampling)
    assert all(rollout.is_finished for group in groups for rollout in group.rollouts)
    assert len(steps) == max(len(rollout.token_ids) for group in groups for rollout in group.rollouts) < 64


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="--stop"):
        dataclasses.replace(SETTINGS, stop=("x", ""))


class _Fixed:
    """An engine that answers A unless the video is black."""

    def generate(self, prompts, *, step):
        def text(prompt: Prompt) -> str:
            is_blank = all(not medium.frames_FCHW.any() for medium in prompt.media)
            return "<answer>B</answer>" if prompt.media and is_blank else "<answer>A</answer>"

        return [RolloutGroup(prompt, (Rollout((1,), text=text(prompt)),)) for prompt in prompts]


def test_evaluation_counts_by_task_and_controls_touch_only_the_video(engine: HFEngine) -> None:
    prompts = prompts_of(engine.media, engine.tokenizer)
    assert evaluate(_Fixed(), prompts).mean == 1.0
    blank = evaluate(_Fixed(), prompts, control="blank")
    assert blank.mean == pytest.approx(1 / 3) and blank.num_questions == 3
    # Sample variance of (0, 0, 1) is 1/3, so the error of the mean is sqrt(1/3/3).
    assert blank.standard_error == pytest.approx(math.sqrt(1 / 9))
    shuffled = apply_control(prompts[0], "shuffled")
    original = prompts[0].media[0].frames_FCHW
    assert not torch.equal(shuffled.media[0].frames_FCHW, original)
    assert sorted(f.sum().item() for f in shuffled.media[0].frames_FCHW) == sorted(f.sum().item() for f in original)
    assert shuffled.token_ids == prompts[0].token_ids
