"""T-GRPO's bonus: the numbers of its rule by hand, its options, and what shuffled responses may move."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config import config_from_values, load_config
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.objectives.bonuses.temporal import TemporalBonus
from megatron_ktr.types import BatchFacts, Rollout, RolloutGroup, ScoredBatch, TokenScores, TokenStreams
from tests.support.groups import MEDIA, group_of, video


def group_with(accuracies: list[float], shuffled: list[float], *, formats: list[float] | None = None) -> RolloutGroup:
    group = group_of(5, video(4), 6, responses=[(7,)] * len(accuracies))
    formats = formats or [1.0] * len(accuracies)
    return dataclasses.replace(
        group,
        rollouts=tuple(
            Rollout((7, 8), rewards={"accuracy": accuracy, "format": form})
            for accuracy, form in zip(accuracies, formats, strict=True)
        ),
        shuffled=tuple(Rollout((9,), rewards={"accuracy": accuracy, "format": 1.0}) for accuracy in shuffled),
    )


def streams_of(group: RolloutGroup, *, objective: str = "t_grpo", **values: float) -> TokenStreams:
    config = config_from_values(dict(objective=objective, kl_beta=0.0, length_bonus=0.0, **values))
    built = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    batch = pack_groups([group], view="intact", media=MEDIA)
    scores = TokenScores(policy_logprob_R=torch.zeros(batch.target_ids_R.numel()))
    facts = BatchFacts(num_responses=batch.num_responses)
    return built.token_streams(ScoredBatch(batch, scores, [group]), facts)


ONE_OF_FOUR = [1.0, 0.0, 0.0, 0.0]
FRACTIONS = [0.9, 0.05, 0.6, 0.0]


@pytest.mark.parametrize(
    ("accuracies", "shuffled", "rewards", "advantages"),
    [
        (ONE_OF_FOUR, [1.0, 1.0], [2.0, 1.0, 1.0, 1.0], [1.49970, -0.49990, -0.49990, -0.49990]),  # .25 < .8
        (ONE_OF_FOUR, [0.0, 0.0], [2.3, 1.0, 1.0, 1.0], [1.49977, -0.49992, -0.49992, -0.49992]),  # .25 >= 0
        (FRACTIONS, [0.5, 0.5], [1.9, 1.05, 1.6, 1.0], None),  # .3875 < .40
        (FRACTIONS, [0.4, 0.5], [2.2, 1.05, 1.9, 1.0], None),  # .3875 >= .36; only accuracies above .1 are paid
        ([0.0] * 4, [0.0, 0.0], [1.0] * 4, [0.0] * 4),  # the rule holds, and there is nobody to pay
        ([1.0] * 4, [1.0, 1.0], [2.3] * 4, [0.0] * 4),  # everybody is paid alike
        ([0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 2.3, 2.3, 2.3], None),  # .6 = .8 * .75: a tie
    ],
)
def test_the_rule_and_the_advantages_of_the_worked_example(accuracies, shuffled, rewards, advantages) -> None:
    group = group_with(accuracies, shuffled)
    bonuses = TemporalBonus().values(group, [2] * len(accuracies))
    found = [rollout.reward + bonus for rollout, bonus in zip(group.rollouts, bonuses, strict=True)]
    assert found == pytest.approx(rewards, abs=1e-12)
    streams = streams_of(group)
    if advantages is not None:
        # 1e-5: the example has five digits behind the point.
        assert streams.advantage_R[::2].tolist() == pytest.approx(advantages, abs=1e-5)
    means = streams.metrics.means()
    assert means["reward/temporal_bonus"] == pytest.approx(sum(bonuses) / len(bonuses))
    assert means["temporal_rule"] == float(rewards != [r.reward for r in group.rollouts] or not sum(accuracies))


def test_with_two_valued_rewards_the_objective_is_grpo_to_a_ten_thousandth() -> None:
    """The division by the standard deviation takes the bonus out again, as the docs say."""
    group = group_with(ONE_OF_FOUR, [0.0, 0.0])
    difference_R = streams_of(group).advantage_R - streams_of(group, objective="grpo").advantage_R
    assert 0 < float(difference_R.abs().max()) < 1e-4
    # Where format varies too, it does not.
    varied = dataclasses.replace(group, rollouts=group_with(ONE_OF_FOUR, [], formats=[0.0, 1.0, 0.0, 1.0]).rollouts)
    difference_R = streams_of(varied).advantage_R - streams_of(varied, objective="grpo").advantage_R
    assert float(difference_R.abs().max()) > 0.1


def test_shuffled_responses_move_nothing_but_the_outcome_of_the_rule() -> None:
    groups = [group_with(FRACTIONS, shuffled) for shuffled in ([0.4, 0.5], [0.0] * 7)]
    groups += [
        dataclasses.replace(groups[0], shuffled=(dataclasses.replace(groups[0].shuffled[0], token_ids=(3,) * 9),))
    ]
    first, *others = map(streams_of, groups)
    for other in others:
        assert torch.equal(other.advantage_R, first.advantage_R) and torch.equal(other.weight_R, first.weight_R)
        assert other.metrics == first.metrics
    lost = streams_of(group_with(FRACTIONS, [1.0] * 2))
    assert not torch.equal(lost.advantage_R, first.advantage_R)


def test_a_group_without_shuffled_responses_earns_nothing_and_is_not_counted() -> None:
    streams = streams_of(group_with([1.0, 0.0], []))
    means = streams.metrics.means()
    assert means["reward/temporal_bonus"] == 0.0 and "temporal_rule" not in means


def test_the_bonus_needs_the_accuracy_of_shuffled_responses() -> None:
    group = group_with([1.0, 0.0], [1.0])
    for broken in (
        dataclasses.replace(group, shuffled=(Rollout((9,), rewards={"format": 1.0}),)),
        dataclasses.replace(group, rollouts=(Rollout((9,), rewards={"format": 1.0}),)),
    ):
        with pytest.raises(UserError, match="temporal_bonus needs the reward part 'accuracy'"):
            TemporalBonus().values(broken, [2, 2])


def test_options_make_the_bonus_and_any_policy_gradient_can_have_it() -> None:
    def bonuses(**values: object) -> tuple[object, ...]:
        config = config_from_values(values)
        return build_objective(config.objective, reward=config.reward, rollout=config.rollout).bonuses

    length = LengthBonus()
    assert bonuses(objective="t_grpo") == (TemporalBonus(0.3, 0.8), length)
    assert bonuses(objective="t_grpo", temporal_bonus=0.1, temporal_margin=1.0) == (TemporalBonus(0.1, 1.0), length)
    assert bonuses(objective="t_grpo", temporal_bonus=0.0) == bonuses(objective="grpo") == (length,)
    assert bonuses(objective="video_ktr", temporal_bonus=0.2) == (TemporalBonus(0.2, 0.8), length)
    numbers = {
        (given, responses): config_from_values(
            dict(objective=name, num_generations=given, temporal_responses=responses)
        ).rollout.num_shuffled
        for name, given, responses in (("t_grpo", 8, None), ("t_grpo", 5, None), ("t_grpo", 3, 7), ("grpo", 2, 1))
    }
    assert numbers == {(8, None): 4, (5, None): 2, (3, 7): 7, (2, 1): 0}


BASE = ["--model", "m", "--replay-path", "r.jsonl"]
ONLINE = ["--model", "m", "--engine", "hf", "--data-path", "d.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*BASE, "--objective", "sft", "--data-path", "d", "--temporal-bonus", "0.3"], "samples no responses that"),
        (
            [*ONLINE, "--objective", "t_grpo", "--reward-functions", "format", "--length-bonus", "0"],
            "--temporal-bonus goes to correct responses: add accuracy to --reward-functions, or set --temporal-bonus 0",
        ),
        (
            [*BASE, "--objective", "t_grpo", "--temporal-bonus", "0", "--temporal-responses", "3"],
            "--temporal-responses is not read with --temporal-bonus 0",
        ),
        ([*BASE, "--temporal-bonus", "-1"], "--temporal-bonus"),
        ([*BASE, "--objective", "t_grpo", "--temporal-responses", "0"], "--temporal-responses"),
        ([*BASE, "--temporal-margin", "nan"], "--temporal-margin"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(argv: list[str], message: str) -> None:
    argv = [word for word in argv if "sft" not in argv or word not in ("--replay-path", "r.jsonl")]
    with pytest.raises(UserError, match=message):
        load_config(argv)


def test_a_comparison_changes_the_objective_alone() -> None:
    for name in ("t_grpo", "grpo", "video_ktr"):
        load_config([*BASE, "--objective", name, "--temporal-responses", "3", "--temporal-margin", "0.9"])
