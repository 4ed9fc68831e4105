"""Mini-batches of a rollout: the plan holds what its header says, and its updates are those made by hand."""

from __future__ import annotations

import random

import pytest

from megatron_ktr.step.mini_batches import plan_mini_batches


def draws_of(number, num_replicas):
    """Replicas read every n-th draw."""
    return [list(range(replica, number, num_replicas)) for replica in range(num_replicas)]


def test_plan_of_a_hand_made_example():
    """Two replicas drew 0 2 4 6 and 1 3 5 7; the first mini-batch is draws 0 to 3."""
    plan = plan_mini_batches(draws_of(8, 2), [[1.0] * 4] * 2, number=2, has_balance=True)
    assert plan.placement.groups_of == ((0, 1, 2, 3), (4, 5, 6, 7)) and not plan.placement.moves
    assert plan.members == ((0, 4, 1, 5), (2, 6, 3, 7))
    assert plan.split_of(0) == [[0, 1], [2, 3]] and plan.split_of(1) == [[0, 1], [2, 3]]
    # One replica drew everything that comes first (the other's prompts could not be used): each gives the other two.
    plan = plan_mini_batches([[0, 1, 2, 3], [4, 5, 6, 7]], [[1.0] * 4] * 2, number=2, has_balance=False)
    assert plan.placement.groups_of == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert plan.split_of(0) == [[0, 1], [2, 3]] and plan.split_of(1) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("has_balance", [False, True])
@pytest.mark.parametrize("keep_counts", [False, True])
def test_plans_of_random_groups_hold_what_the_header_says(has_balance, keep_counts):
    generator = random.Random(0)
    for _ in range(100):
        num_replicas, number = generator.choice([1, 2, 3, 4]), generator.randint(1, 5)
        sizes = [generator.randint(1, 7) for _ in range(num_replicas)]
        numbers = iter(generator.sample(range(100), sum(sizes)))
        draws = [[next(numbers) for _ in range(size)] for size in sizes]
        costs = [[generator.lognormvariate(0, 1) for _ in range(size)] for size in sizes]
        options = dict(number=number, has_balance=has_balance, keep_counts=keep_counts)
        plan = plan_mini_batches(draws, costs, **options)
        assert sorted(group for part in plan.members for group in part) == list(range(sum(sizes)))
        assert sorted(group for part in plan.placement.groups_of for group in part) == list(range(sum(sizes)))
        parts = [plan.split_of(replica) for replica in range(num_replicas)]
        assert all(part for of_replica in parts for part in of_replica), "a replica without a group would wait for ever"
        assert len(plan.members) == max(1, min(number, sum(sizes) // num_replicas))
        of_mini_batch = [len(part) for part in plan.members]
        assert max(of_mini_batch) - min(of_mini_batch) <= 1
        if keep_counts or not has_balance:
            for index in range(len(plan.members)):
                counts = [len(of_replica[index]) for of_replica in parts]
                assert max(counts) - min(counts) <= 1
        assert plan_mini_batches(draws, costs, **options) == plan


def test_which_mini_batch_a_draw_is_in_does_not_depend_on_replicas_or_costs():
    generator = random.Random(3)

    def members(num_replicas, *, draws):
        costs = [[generator.lognormvariate(0, 1) for _ in of_replica] for of_replica in draws]
        plan = plan_mini_batches(draws, costs, number=3, has_balance=True)
        flat = [draw for of_replica in draws for draw in of_replica]
        return [sorted(flat[group] for group in part) for part in plan.members]

    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(members(n, draws=draws_of(12, n)) == expected for n in (1, 2, 4))


def test_groups_without_draw_numbers_go_by_their_place():
    """Recorded groups all have draw number 0: the first of every replica comes first."""
    plan = plan_mini_batches([[0, 0], [0, 0]], [[1.0, 1.0]] * 2, number=2, has_balance=False)
    assert plan.members == ((0, 2), (1, 3))


def test_accounting_counts_what_mini_batches_cost():
    """One more pass over the language model and the head, and the encoder again for all groups but the first part's."""
    from megatron_ktr.accounting.flops import count_step
    from megatron_ktr.accounting.rates import settings_of
    from megatron_ktr.accounting.work import GroupWork
    from megatron_ktr.config import config_from_values
    from megatron_ktr.config.part_options import StepOptions
    from megatron_ktr.objectives import build_objective
    from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

    def step(**values):
        config = config_from_values({"objective": "grpo", "kl_beta": 0.0, **values})
        objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
        settings = settings_of(StepOptions.of(config), objective, key_share=0.25)
        work = [GroupWork(100, (50, 60), video_grids=((4, 8, 8),))]
        return settings, count_step(PUBLISHED_CONFIGS["7B"], work, settings=settings)

    (once, one), (split, four) = step(), step(mini_batches=4)
    assert (once.mini_batches, once.has_selection) == (1, False)
    assert (split.mini_batches, split.has_selection, split.num_updates) == (4, True, 1)
    vision = one.of("policy_forward", parts=["vision"])
    assert four.total - one.total == pytest.approx(one.of("policy_forward") - vision / 4)
    assert once.key_share == 0.25 and step(sampled_entropy_penalty=0.06)[0].key_share == 1.0
