"""Draws that all replicas make together, and the retirement of easy records, with hand-worked numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.retirement import Retirement, RetirementRule
from megatron_ktr.errors import UserError
from tests.support.together import NowPool, replicas


def draw(datasets: list[PromptDataset], number: int) -> list[str]:
    """Problem ids in the order of places, checked to be each on one replica."""
    draws = [dataset.together for dataset in datasets if dataset.together is not None]
    found = [one for of_replica in draws for one in of_replica.next(number, num_step=number)]
    assert len({place for place, _ in found}) == len(found)
    return [prompt.problem_id for _, prompt in sorted(found, key=lambda one: one[0])]


def settle(datasets: list[PromptDataset], number: int, easy: str = "") -> None:
    """Uses up ``number`` draws; records whose id is in ``easy`` were answered right, all others wrong."""
    accuracies = {}
    for dataset in datasets:
        assert dataset.together is not None
        accuracies |= {
            element.draw_number: float(str(element.record["problem_id"]) in easy.split())
            for element in dataset.together._elements[:number]
        }
    for dataset in datasets:
        assert dataset.together is not None
        dataset.together.settle(number, accuracies=accuracies)


def test_running_accuracy_by_hand() -> None:
    """decay 0.75: 1.0, then 0.75 x 1 + 0.25 x 0 = 0.75, then 0.75 x 0.75 + 0.25 x 1 = 0.8125."""
    known = Retirement(RetirementRule(above=0.8, num_epochs=2, decay=0.75), [3])
    known.note(0, 1, epoch=0, accuracy=1.0)
    assert [known.is_retired(0, 1, epoch=epoch) for epoch in range(4)] == [True, True, True, False]
    known.note(0, 1, epoch=3, accuracy=0.0)
    assert not known.is_retired(0, 1, epoch=4), "0.75 is not above 0.8"
    known.note(0, 1, epoch=4, accuracy=1.0)
    assert [known.is_retired(0, 1, epoch=epoch) for epoch in (5, 6, 7)] == [True, True, False]
    assert [known.num_retired([epoch]) for epoch in (4, 6, 7)] == [1, 1, 0]
    known.note(0, 0, epoch=0, accuracy=0.8)
    assert not known.is_retired(0, 0, epoch=1), "the bound itself is not above it"
    again = Retirement(known.rule, [3])
    again.load_state_dict(json.loads(json.dumps(known.state_dict())))
    assert again.state_dict() == known.state_dict()
    for damage in ([], [{"accuracy": "x", "returns": ""}], Retirement(known.rule, [4]).state_dict()):
        with pytest.raises(ValueError, match="retirement"):
            again.load_state_dict(damage)


def test_a_retired_record_is_passed_over_for_its_epochs_and_comes_back() -> None:
    """Records a0 a1 a3 a4 a5 a6 (a2 cannot be used) in the order of the file. a0 and a3 are answered right."""
    (one,) = data = replicas(1, shuffle=False)
    epochs = []
    for number in (6, 4, 6, 4):
        epochs.append(draw(data, number))
        settle(data, number, easy="a0 a3")
    assert epochs == [
        ["a0", "a1", "a3", "a4", "a5", "a6"],
        ["a1", "a4", "a5", "a6"],
        ["a0", "a1", "a3", "a4", "a5", "a6"],
        ["a1", "a4", "a5", "a6"],
    ]
    assert one.together is not None and one.together.values == {
        "retirement/retired": 2.0,
        "retirement/passed_over": 4.0,
    }


def test_retirement_by_weights_passes_over_more_than_a_period() -> None:
    """1 : 1 has a period of two places. When both files are retired, 14 places in a row are passed over."""
    data = replicas(1, numbers=(7, 7), left_out=(), draws=1)
    names = " ".join(f"{file}{index}" for file in "ab" for index in range(7))
    for _ in range(4):
        assert sorted(draw(data, 14)) == sorted(names.split())
        settle(data, 14, easy=names)
    assert data[0].together is not None and data[0].together.values["retirement/passed_over"] == 3 * 14


def test_everything_retired_ends_no_run() -> None:
    (one,) = data = replicas(1, numbers=(3,), left_out=(), rule=RetirementRule(0.5, num_epochs=3))
    for _ in range(3):
        assert sorted(draw(data, 3)) == ["a0", "a1", "a2"]
        settle(data, 3, easy="a0 a1 a2")
    assert one.epoch == 9, "answered in epochs 0, 4 and 8, to their last record"


EASY = "a1 a4 b0 b2 b3"


def run(size: int, *, unusable: tuple[int, ...] = ()) -> list[tuple[list[str], Any]]:
    """Six steps of a mixture: 8 draws, of which sometimes fewer are used up, with retirement on the way."""
    data = replicas(size, numbers=(7, 5), unusable=unusable)
    steps = []
    for number in (8, 5, 8, 3, 7, 8):
        found = draw(data, 8)
        settle(data, number, easy=EASY)
        state = {
            name: value
            for name, value in reshard_states([one.state_dict() for one in data], rank=0, size=1).items()
            if name not in ("turn", "rank", "size")
        }
        steps.append((found, state))
    return steps


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_replicas_draws_and_retires_the_same(size: int) -> None:
    for (found, state), (expected, expected_state) in zip(run(size, unusable=(3,)), run(1, unusable=(3,)), strict=True):
        assert found == expected and state == expected_state


@pytest.mark.parametrize("new_size", [1, 2, 4])
def test_draws_and_retirement_resume_exactly_in_any_number_of_replicas(new_size: int) -> None:
    """The save stands after a step that drew more than it used up, and counted only what it used up."""
    data = replicas(2, numbers=(7, 5))
    for number in (8, 5):
        draw(data, 8)
        settle(data, number, easy=EASY)
    draw(data, 4)  # a step that has begun changes nothing in the state
    states = [json.loads(json.dumps(one.state_dict())) for one in data]
    resumed = replicas(new_size, numbers=(7, 5))
    for rank, one in enumerate(resumed):
        one.load_state_dict(reshard_states(states, rank=rank, size=new_size))
    steps = run(1)[2:]
    for (expected, expected_state), number in zip(steps, (8, 3, 7, 8), strict=True):
        assert draw(resumed, 8) == expected
        settle(resumed, number, easy=EASY)
        merged = reshard_states([one.state_dict() for one in resumed], rank=0, size=1)
        for name in ("cursor", "retirement", "passed_over", "source_epochs", "skips", "counts", "num_given"):
            assert merged[name] == expected_state[name], name
    with pytest.raises(UserError, match="resume: retirement"):
        resumed[0].load_state_dict({**reshard_states(states, rank=0, size=new_size), "retirement": []})


def test_what_a_step_drew_too_much_is_not_loaded_again() -> None:
    data = replicas(2, rule=None, left_out=())
    loaders: list[Any] = [one.loader for one in data]
    first = draw(data, 6)
    settle(data, 2)
    assert sum(one.num_loads for one in loaders) == 6
    assert sum(one.counts["decoder/made"] for one in loaders) == 2, "counted when it is used up"
    assert draw(data, 5)[:4] == first[2:]
    assert sum(one.num_loads for one in loaders) == 7


def test_workers_read_ahead_and_nothing_twice_or_otherwise() -> None:
    """Steps that leave draws over, two replicas: workers read what the replica draws next, each record once an
    epoch."""
    alone, data = replicas(2, rule=None, numbers=(30,)), replicas(2, rule=None, numbers=(30,))
    pools = [NowPool(), NowPool()]
    for one, pool in zip(data, pools, strict=True):
        one.read_ahead(pool, prefetch_steps=1)  # type: ignore[arg-type]
    for number in (8, 5, 6):
        assert draw(data, 8) == draw(alone, 8)
        settle(data, number)
        settle(alone, number)
    given = [*pools[0].given, *pools[1].given]
    assert len(given) == len(set(given)) and 8 + 5 + 8 < len(given) <= 29
    assert [one.state_dict() for one in data] == [one.state_dict() for one in alone]


def test_only_unusable_samples_end_the_run() -> None:
    data = replicas(1, numbers=(4,), left_out=(), unusable=(0, 1, 2, 3))
    with pytest.raises(UserError, match="no usable prompt among the last 24 samples"):
        draw(data, 100)
