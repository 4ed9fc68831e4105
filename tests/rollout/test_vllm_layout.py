"""Which ranks form which colocated engine, what each answers, and our settings in vLLM's words; needs no vLLM."""

from __future__ import annotations

import pytest

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.colocated.layout import share_groups, split_work
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.vllm.sampling import logprobs_mode, records_logprobs, rollout_of, sampling_values

LAYOUTS = [
    (ParallelSizes(), 1, 1),
    (ParallelSizes(tensor=2, pipeline=2), 8, 1),
    (ParallelSizes(tensor=2, pipeline=2), 8, 2),
    (ParallelSizes(tensor=2, pipeline=2), 8, 4),
    (ParallelSizes(tensor=2, context=2), 8, 2),
    (ParallelSizes(tensor=4, pipeline=2), 16, 2),
    (ParallelSizes(pipeline=2), 8, 2),
    (ParallelSizes(), 6, 3),
]


@pytest.mark.parametrize(("sizes", "world_size", "engine_size"), LAYOUTS)
def test_share_groups_divide_the_world_into_whole_replicas_and_whole_engines(sizes, world_size, engine_size) -> None:
    found = share_groups(sizes, world_size=world_size, engine_size=engine_size)
    assert sorted(rank for group in found for rank in group.ranks) == list(range(world_size))
    inner = sizes.tensor * sizes.context
    for group in found:
        # vLLM's engines are consecutive ranks, starting at a multiple of their size.
        engines = [group.ranks[start : start + engine_size] for start in range(0, len(group.ranks), engine_size)]
        assert len(engines) == group.num_engines
        for index, ranks in enumerate(engines):
            assert ranks == tuple(range(ranks[0], ranks[0] + engine_size)) and ranks[0] % engine_size == 0
            assert [group.engine_of(rank) for rank in ranks] == [index] * engine_size
            assert [group.is_first_of_engine(rank) for rank in ranks] == [True] + [False] * (engine_size - 1)
        # Every replica (same place within a stage, on all stages) is in one group, with its reading rank.
        replicas = {rank % (world_size // sizes.pipeline) // inner for rank in group.ranks}
        assert len(group.ranks) == len(replicas) * sizes.model
        assert list(group.reading_ranks) == [replica * inner for replica in sorted(replicas)]


def test_share_groups_of_the_worked_example() -> None:
    sizes = ParallelSizes(tensor=2, pipeline=2)
    by_size = {size: share_groups(sizes, world_size=8, engine_size=size) for size in (1, 2, 4)}
    assert [group.ranks for group in by_size[1]] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [group.num_engines for group in by_size[1]] == [4, 4]
    assert [group.num_engines for group in by_size[2]] == [2, 2]
    assert [group.ranks for group in by_size[4]] == [(0, 1, 2, 3, 4, 5, 6, 7)]
    assert by_size[4][0].reading_ranks == (0, 2)


@pytest.mark.parametrize(
    ("sizes", "world_size", "engine_size"),
    [
        (ParallelSizes(tensor=2), 4, 3),
        (ParallelSizes(tensor=4), 8, 3),
        (ParallelSizes(tensor=2, pipeline=2), 8, 8),  # would span two stages
        (ParallelSizes(tensor=2), 6, 4),
        (ParallelSizes(), 1, 2),
    ],
)
def test_engines_that_do_not_fit_the_replicas_are_refused(sizes, world_size, engine_size) -> None:
    with pytest.raises(UserError, match=f"--rollout-tensor-parallel-size {engine_size} must divide"):
        share_groups(sizes, world_size=world_size, engine_size=engine_size)


@pytest.mark.parametrize("num_engines", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("lengths", [[], [7], [100, 5, 5, 60, 5]])
def test_every_sample_is_answered_once(lengths, num_engines) -> None:
    counts = [(6, 3, 1)[index % 3] for index in range(len(lengths))]
    work = split_work(lengths, num_samples=counts, num_engines=num_engines, max_response_length=10)
    assert len(work) == num_engines
    answered = [(share.prompt, sample) for part in work for share in part for sample in share.samples]
    assert sorted(answered) == [(prompt, sample) for prompt, count in enumerate(counts) for sample in range(count)]


def test_groups_stay_whole_while_there_are_enough_of_them_and_loads_are_even() -> None:
    work = split_work([900, 100, 100, 500, 300, 100], num_samples=[4] * 6, num_engines=2, max_response_length=25)
    assert all(share.samples == range(4) for part in work for share in part)
    # 1000, 600, 400, 200, 200, 200 tokens with their responses: no way is more even than 1400 against 1200.
    assert [[share.prompt for share in part] for part in work] == [[0, 1, 5], [2, 3, 4]]


def test_one_prompt_is_split_over_the_engines() -> None:
    work = split_work([50], num_samples=[8], num_engines=4, max_response_length=10)
    assert [part[0].samples for part in work] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]


def settings(**changes) -> SamplingSettings:
    return SamplingSettings(**{"num_generations": 4, "max_response_length": 9, **changes})


def test_logprobs_are_asked_for_only_where_they_are_exact() -> None:
    trained = settings(top_p=0.95)
    assert logprobs_mode(trained) == "raw_logprobs"
    assert records_logprobs(trained, mode="raw_logprobs")
    assert records_logprobs(settings(temperature=0.0, top_p=0.5), mode="raw_logprobs")
    assert not records_logprobs(settings(temperature=0.7), mode="raw_logprobs")
    assert logprobs_mode(settings(temperature=0.7)) == "processed_logprobs"
    assert records_logprobs(settings(temperature=0.7), mode="processed_logprobs")
    assert not records_logprobs(settings(temperature=0.7, top_p=0.9), mode="processed_logprobs")
    assert not records_logprobs(settings(top_k=5), mode="processed_logprobs")
    values = sampling_values(settings(temperature=0.7), seed=3, end_token_ids=(1, 2), mode="raw_logprobs")
    assert "logprobs" not in values and values["seed"] == 3


def test_end_tokens_are_ours_and_stop_strings_are_not_left_to_vllm() -> None:
    values = sampling_values(settings(stop=("</answer>",)), seed=3, end_token_ids=(1, 2), mode="raw_logprobs")
    assert values["stop_token_ids"] == [1, 2] and values["ignore_eos"]
    assert "stop" not in values and values["detokenize"] is False


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(temperature) -> None:
    with pytest.raises(UserError, match=r"from 0.01 to 2.0, or 0"):
        sampling_values(settings(temperature=temperature), seed=3, end_token_ids=(1,), mode="processed_logprobs")


class Words:
    """A tokenizer of which token n says "n "."""

    @staticmethod
    def decode(token_ids, *, skip_special_tokens: bool) -> str:
        return "".join(f"{token} " for token in token_ids)


def test_a_response_keeps_its_end_token_but_not_in_its_text() -> None:
    options = dict(end_token_ids=(9,), tokenizer=Words())
    ended = rollout_of([4, 5, 9], [-1.0, -2.0, -3.0], finish_reason="stop", **options)
    assert (ended.token_ids, ended.text, ended.is_finished) == ((4, 5, 9), "4 5 ", True)
    stopped = rollout_of([4, 5], [-1.0, -2.0, -3.0], finish_reason="stop", **options)
    assert (stopped.text, stopped.sampler_logprobs, stopped.is_finished) == ("4 5 ", (-1.0, -2.0), True)
    assert not rollout_of([4, 5], None, finish_reason="length", **options).is_finished


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_a_response_that_vllm_gave_up_is_no_rollout(reason) -> None:
    with pytest.raises(RuntimeError, match="ended a request after 1 tokens"):
        rollout_of([4], None, finish_reason=reason, end_token_ids=(9,), tokenizer=Words())
