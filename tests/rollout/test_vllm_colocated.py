"""The colocated vLLM engine in one process, against the trainer and the Hugging Face engine.

``test_vllm_colocated_ranks.py`` has the engines of several ranks, and training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.errors import UserError
from megatron_ktr.rollout.sampling import SamplingSettings
from tests.support.colocated import LENGTH, MAX_TOLERANCE, MEAN_TOLERANCE, Side, check, lone_engine, write_inputs

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    return write_inputs(tmp_path_factory.mktemp("colocated"))


@pytest.fixture(scope="module")
def lone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Any]]:
    with lone_engine(inputs, tmp_path_factory.mktemp("unused")) as side_and_engine:
        yield side_and_engine


def test_logprobs_of_video_responses_are_the_trainers_before_and_after_new_weights(lone) -> None:
    side, engine = lone
    before = engine.generate(side.prompts)
    assert [group.prompt.problem_id for group in before] == [prompt.problem_id for prompt in side.prompts]
    assert all(len(medium.frames_FCHW) == 8 for prompt in side.prompts[:2] for medium in prompt.media)
    check(side.difference(before))
    side.change_weights(1.1)
    # Without the update it would be seen, also where the prompts' keys and values are already in the cache.
    assert side.difference(engine.generate(side.prompts)).mean() > 100 * MEAN_TOLERANCE
    engine.load_weights(side.policy.export())
    after = engine.generate(side.prompts)
    check(side.difference(after))
    assert [group.rollouts for group in after] != [group.rollouts for group in before]


def test_seeds_make_the_responses(lone) -> None:
    side, engine = lone
    first = engine.generate(side.prompts, step=4)
    engine.load_weights(side.policy.export())
    # The same step later, from empty caches as in a resumed run; and beside other prompts, in another order.
    assert engine.generate(side.prompts, step=4) == first
    assert len({rollout.token_ids for rollout in first[0].rollouts}) == 3
    assert engine.generate(side.prompts, step=5) != first
    draws = [dataclasses.replace(side.prompts[0], draw_number=number) for number in range(3)]
    texts = {rollout.token_ids for group in engine.generate(draws, step=4) for rollout in group.rollouts}
    assert len(texts) == 9, "the same record, drawn three times in a step"


def test_a_second_prompt_has_its_own_count_and_frames_and_changes_no_other_response(lone) -> None:
    from megatron_ktr.rollout.second_prompt import SecondPrompt

    side, engine = lone
    second = SecondPrompt(3, 2, seed=0).of(side.prompts[0], step=4)
    assert second is not None
    alone = engine.generate(side.prompts, step=4)
    found = dict(engine.stream([*side.prompts, second], step=4, counts=[3, 3, 3, 2]))
    assert [found[place].rollouts for place in range(3)] == [group.rollouts for group in alone]
    assert len(found[3].rollouts) == 2
    check(side.difference([found[3]]))  # of the shuffled frames, which the trainer sees in the same order
    plain = dataclasses.replace(found[3], prompt=side.prompts[0])
    assert side.difference([plain]).mean() > 10 * MEAN_TOLERANCE, "the intact frames give other log-probs"
    ((_, again),) = engine.stream([second], step=4, counts=[2])
    assert again.rollouts == found[3].rollouts, "whatever else is asked"


def test_greedy_tokens_and_logprobs_are_the_hf_engines(lone) -> None:
    from megatron_ktr.rollout.hf import HFEngine

    side, engine = lone
    greedy = SamplingSettings(num_generations=2, max_response_length=LENGTH, temperature=0.0)
    hf = HFEngine(side.config.model.model, tokenizer=side.tokenizer, media=side.media, sampling=greedy)
    hf.load_weights(side.policy.export())
    engine.load_weights(side.policy.export())
    ours, theirs = engine.generate(side.prompts, sampling=greedy), hf.generate(side.prompts)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.rollouts, other.rollouts, strict=True):
            assert (a.token_ids, a.text, a.is_finished) == (b.token_ids, b.text, b.is_finished)
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=MAX_TOLERANCE)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(lone) -> None:
    side, engine = lone
    plain = engine.generate(side.prompts)
    text = next(rollout.text for group in plain for rollout in group.rollouts if len(rollout.text.split()) > 3)
    stop = " ".join(text.split()[1:3])[:-1]  # ends within a word
    stopped = engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, stop=(stop,)))
    found = 0
    for before, after in zip(plain, stopped, strict=True):
        for old, new in zip(before.rollouts, after.rollouts, strict=True):
            length = len(new.token_ids)
            assert new.token_ids == old.token_ids[:length] and len(new.sampler_logprobs) == length
            if stop not in old.text:
                assert length == len(old.token_ids)
                continue
            found += 1
            assert stop in new.text and new.is_finished
            assert stop not in side.tokenizer.decode(new.token_ids[:-1], skip_special_tokens=True)
    assert found
    check(side.difference(stopped))


def test_top_k_cuts_the_sampling_and_not_the_logprobs(lone) -> None:
    """One token left to sample from: that of greedy decoding; log-probs after the cut would all be 0."""
    side, engine = lone
    one, greedy = (
        engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, **changes))
        for changes in ({"top_k": 1}, {"temperature": 0.0})
    )
    for cut, wanted in zip(one, greedy, strict=True):
        assert {rollout.token_ids for rollout in cut.rollouts} == {wanted.rollouts[0].token_ids}
    check(side.difference(one))
    assert max(max(rollout.sampler_logprobs) for group in one for rollout in group.rollouts) < -0.01
    assert engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, top_k=10**6, top_p=0.95))


def test_logprobs_are_left_out_where_the_engine_has_none_that_are_exact(lone) -> None:
    side, engine = lone
    warm = dataclasses.replace(engine.sampling, temperature=0.7, num_generations=1)
    (group,) = engine.generate(side.prompts[:1], sampling=warm)
    assert group.rollouts[0].sampler_logprobs is None and len(group.rollouts) == 1


def test_groups_are_yielded_while_others_are_still_generated(lone) -> None:
    side, engine = lone
    vllm_engine = engine._llm.llm_engine
    seen = [(index, vllm_engine.get_num_unfinished_requests()) for index, _ in engine.stream(side.prompts)]
    assert sorted(index for index, _ in seen) == [0, 1, 2]
    assert [waiting >= 3 for _, waiting in seen] == [True, True, False], "each the requests of another group"


def test_a_stream_that_nobody_exhausts_leaves_no_requests_behind(lone) -> None:
    side, engine = lone
    stream = engine.stream(side.prompts)
    next(stream)
    stream.close()
    assert engine._llm.llm_engine.get_num_unfinished_requests() == 0


def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(lone) -> None:
    side, engine = lone
    long = dataclasses.replace(side.prompts[2], problem_id="long", token_ids=side.prompts[2].token_ids * 100)
    with pytest.raises(UserError, match="prompt long has 200 tokens"):
        engine.generate([side.prompts[0], long], sampling=dataclasses.replace(engine.sampling, max_response_length=100))
    # The request before it is not left behind.
    assert [group.prompt.problem_id for group in engine.generate(side.prompts[2:])] == ["text"]


def test_weights_that_are_missing_are_an_error(lone) -> None:
    side, engine = lone
    left_out = [(name, tensor) for name, tensor in side.policy.export() if name != "model.norm.weight"]
    with pytest.raises(UserError, match="1 weights were not sent, among them model.norm.weight"):
        engine.load_weights(iter(left_out))
    with pytest.raises(UserError, match="vLLM does not take these weights"):
        engine.load_weights(iter([("model.layers.0.nonsense", torch.zeros(1))]))
    engine.load_weights(side.policy.export())
    check(side.difference(engine.generate(side.prompts)))


def test_more_positions_than_the_model_has_are_refused(lone) -> None:
    side, _ = lone
    with pytest.raises(UserError, match="--max-prompt-length"):
        side.engine(max_prompt_length=5000)


# Sleep and wake: there is no GPU here, so a stand-in records the calls


class RecordingLLM:
    """Notes the calls that move memory, and answers one request with one token."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.llm_engine = self.renderer = self
        self._ids: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {','.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method}: {len(list(kwargs['weights_iterator']))} tensors")

    def reset_mm_cache(self) -> None:
        self.calls.append("reset media")

    def reset_encoder_cache(self) -> None:
        self.calls.append("reset encoder")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset prefix")
        return True

    def render_cmpl(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompts

    def add_request(self, request_id: str, request: dict[str, Any], params: Any) -> None:
        self._ids.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._ids)

    def step(self) -> list[Any]:
        self.calls.append("step")
        done, self._ids = self._ids, []
        return [_Output(request_id=request_id) for request_id in done]


@dataclass
class _Completion:
    token_ids: tuple[int, ...] = (5,)
    logprobs: Any = None
    finish_reason: str = "length"


@dataclass
class _Output:
    request_id: str
    finished: bool = True

    @property
    def outputs(self) -> list[_Completion]:
        return [_Completion()]


def test_what_a_sleeping_engine_drops_comes_back(lone) -> None:
    """vLLM's level 2 drops all that was made while the model was loaded. Parameters come new and buffers are saved: the
    model must have no other tensor on the device, but the key-value cache."""
    _, engine = lone
    runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    known = {id(tensor) for tensors in (runner.model.parameters(), runner.model.buffers()) for tensor in tensors}
    lost = []
    for path, module in runner.model.named_modules():
        # Its own attributes, and those of the plain objects it holds.
        held = [v for v in vars(module).values() if hasattr(v, "__dict__") and not isinstance(v, torch.nn.Module)]
        for values in (vars(module), *map(vars, held)):
            tensors = ((name, value) for name, value in values.items() if isinstance(value, torch.Tensor))
            lost += [f"{path}.{name}" for name, value in tensors if id(value) not in known]
    assert {name.rpartition(".")[2] for name in lost} == {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}, lost


def test_on_a_gpu_the_engine_sleeps_except_while_it_loads_and_generates(lone, monkeypatch) -> None:
    from megatron_ktr.rollout.colocated import engine as vllm_colocated

    side, engine = lone
    calls: list[str] = []

    class Gpu:
        name = "another"

        def empty_cache(self) -> None:
            calls.append("trainer's cache emptied")

    options: dict[str, Any] = {}

    def start(model_dir: Path, **given: Any) -> RecordingLLM:
        options.update(given)
        return RecordingLLM(calls)

    monkeypatch.setattr(vllm_colocated, "current", Gpu)
    sleeper = vllm_colocated.ColocatedEngine(
        side.config.model.model,
        ranks=side.policy.ranks,
        tokenizer=side.tokenizer,
        media=side.media,
        sampling=engine.sampling,
        settings=dataclasses.replace(engine.settings, memory_share=0.4),
        start=start,
    )
    assert calls == ["sleep 2"] and options["gpu_memory_utilization"] == 0.4
    with pytest.raises(RuntimeError, match="load_weights first"):
        sleeper.generate(side.prompts)
    tensors = list(side.policy.export())
    for _ in range(2):
        calls.clear()
        sleeper.load_weights(iter(tensors))
        assert len(sleeper.generate(side.prompts)) == 3
        assert calls == [
            "trainer's cache emptied",
            "wake weights",
            f"reload_weights: {len(tensors)} tensors",
            "reset media",
            "reset encoder",
            "reset prefix",
            "trainer's cache emptied",
            "wake kv_cache",
            "step",
            "sleep 2",
        ]
