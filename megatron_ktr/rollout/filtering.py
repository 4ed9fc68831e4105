"""Dynamic sampling: which groups of a step are good, and when a step has enough of them (DAPO, arXiv 2503.14476).

A group teaches nothing if all its responses are worth the same: its advantages are zero. Such a group is rejected, and
further prompts are drawn and answered in its place. Let r_1 .. r_G be the responses' values of one *metric* (the whole
reward, or one of its parts). A group is rejected for the first of these reasons that holds:

    equal     max r = min r                                     --filter-groups equal and range
    range     not  low < mean r < high                          --filter-groups range
    spread    max r - min r < min_spread                        --min-reward-spread

The prompts that all replicas draw for a step have one order, that of their draws (``data/together.py``). A step is
decided by that order alone, never by which answer came first:

    window    the draws that were answered so far: first ``wanted`` of them, later more
    kept      the first ``wanted`` good groups of the window. The next step draws what comes after the last of them
    refill    if there are fewer, the window grows by as many draws as the share of good groups so far suggests, at most
              by ``wanted``, at least by what is missing. This happens at most ``max_rounds`` times
    short     if that was not enough, the step goes on with the good groups there are. If they are fewer than the layout
              needs (every replica must have one), the first rejected ones fill up. A group whose rewards are all equal
              adds zero to the gradient of a group-relative objective

Deviations from the published code: verl draws whole batches, cuts off the surplus and stops the run at its bound;
EasyR1 does the same with the range; ms-swift falls back to the unfiltered batch. Here the surplus is drawn again by the
next step, so that no record is lost, and the bound ends the search, not the run. "Spread" is the distance of the
largest from the smallest value, where OpenRLHF has the standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.config.words import FilterGroups
from megatron_ktr.types import Rollout, RolloutGroup

WHOLE_REWARD = "reward"
"""The metric that is the sum of all parts of a response's reward."""
REASONS = ("equal", "range", "spread")
"""Why groups are rejected, in the order in which it is asked."""
ACCURACY = "accuracy"
"""The part of the reward that retirement goes by."""


@dataclass(frozen=True)
class FilterRule:
    """What a good group is, and how long a step looks for them."""

    kind: FilterGroups = "off"
    metric: str = WHOLE_REWARD
    low: float = 0.0
    high: float = 1.0
    min_spread: float = 0.0
    max_rounds: int = 3
    """The most times that a step draws further prompts in place of rejected ones."""

    def reason(self, group: RolloutGroup) -> str:
        """Why the group is rejected, one of ``REASONS``; "" for a good group."""
        if self.kind == "off":
            return ""
        found = [_value(rollout, self.metric) for rollout in group.rollouts]
        values = [value for value in found if value is not None]
        if not values:  # the metric does not apply to this question
            return ""
        if max(values) == min(values):
            return "equal"
        if self.kind == "range" and not self.low < math.fsum(values) / len(values) < self.high:
            return "range"
        return "spread" if max(values) - min(values) < self.min_spread else ""


def _value(rollout: Rollout, metric: str) -> float | None:
    # ``config/filter_rules.py`` and ``replay.Required`` see to it that the run has the part. A reward may say of a
    # response that it does not apply.
    return rollout.reward if metric == WHOLE_REWARD else rollout.rewards.get(metric)


@dataclass(frozen=True)
class Verdict:
    """What is known of one answered group, in a few numbers that replicas tell each other."""

    place: int
    """Its place among the draws of the step, over all replicas."""
    draw_number: int
    reason: str
    """Why it is rejected; "" for a good group."""
    num_tokens: int
    """The tokens of all its responses, those to shuffled frames among them."""
    num_responses: int
    reward_sum: float
    accuracy: float | None
    """The mean accuracy of its responses; None where they have no such reward."""

    @property
    def is_good(self) -> bool:
        return not self.reason

    @classmethod
    def of(cls, group: RolloutGroup, *, place: int, rule: FilterRule) -> Verdict:
        found = [rollout.rewards[ACCURACY] for rollout in group.rollouts if ACCURACY in rollout.rewards]
        return cls(
            place=place,
            draw_number=group.prompt.draw_number,
            reason=rule.reason(group),
            num_tokens=sum(len(rollout.token_ids) for rollout in (*group.rollouts, *group.shuffled)),
            num_responses=len(group.rollouts),
            reward_sum=math.fsum(rollout.reward for rollout in group.rollouts),
            accuracy=math.fsum(found) / len(found) if found else None,
        )


@dataclass(frozen=True)
class Needs:
    """How many groups a step trains on."""

    wanted: int
    """``prompts_per_step``."""
    least: int = 1
    """Every replica needs one group."""
    multiple: int = 1
    """The number must be a multiple of it (interleaved pipeline stages)."""


@dataclass(frozen=True)
class Decision:
    """What a step does after its window was answered."""

    num_more: int
    """By how many draws the window grows. 0: the step is decided, and the other fields are those of its end."""
    kept: tuple[Verdict, ...] = ()
    """The groups that are trained on, in the order of draws."""
    num_consumed: int = 0
    """The draws of the step that are used up, from the first. The next step draws what comes after them."""
    is_short: bool = False
    """Whether the bound was reached before there were enough good groups."""


def decide(
    verdicts: Sequence[Verdict], *, num_window: int, num_rounds: int, needs: Needs, rule: FilterRule
) -> Decision:
    """The next act of a step: draw further, or end. The same on every replica.

    Args:
        verdicts: of the answered draws of the window, in the order of places. Draws that could not be used have none.
        num_window: the draws of the window, those that could not be used among them.
        num_rounds: how often the window has grown already.
    """
    good = [verdict for verdict in verdicts if verdict.is_good]
    if len(good) >= needs.wanted:
        kept = good[: needs.wanted]
        return Decision(0, tuple(kept), num_consumed=kept[-1].place + 1)
    if num_rounds < rule.max_rounds:
        missing = needs.wanted - len(good)
        expected = math.ceil(missing * len(verdicts) / len(good)) if good else needs.wanted
        return Decision(min(expected, needs.wanted))
    number = max(len(good), needs.least)
    number = min(needs.wanted, -(-number // needs.multiple) * needs.multiple)
    rejected = [verdict for verdict in verdicts if not verdict.is_good]
    kept = sorted([*good, *rejected[: number - len(good)]], key=lambda verdict: verdict.place)
    return Decision(0, tuple(kept), num_consumed=num_window, is_short=True)


def values_of(
    decision: Decision, verdicts: Sequence[Verdict], *, num_rounds: int, num_first: int, spares: Sequence[Verdict] = ()
) -> dict[str, float]:
    """The metrics of a step's filter, all of the whole step over all replicas:

    filter/rejected, filter/rejected_<reason>    rejected groups of the draws that were used up
    filter/kept, filter/refilled                 groups that are trained on, and those of them from beyond the first
                                                 ``num_first`` draws
    filter/filled_up                             rejected groups that are trained on because the layout needs them
    filter/surplus                               answered groups that the step did not need; their prompts are drawn
                                                 again by the next step
    filter/rounds, filter/is_short               refill rounds; 1 if they were not enough
    filter/tokens_rejected, filter/tokens_surplus    response tokens that were sampled and are not trained on
    filter/reward_mean                           mean reward of all groups of the draws that were used up, before the
                                                 filter (``reward_mean`` is that of the groups that are trained on)

    Args:
        spares: verdicts of groups beyond the window, which servers answered early.
    """
    used = [verdict for verdict in verdicts if verdict.place < decision.num_consumed]
    surplus = [verdict for verdict in verdicts if verdict.place >= decision.num_consumed] + list(spares)
    rejected = [verdict for verdict in used if not verdict.is_good]
    filled_up = {verdict.place for verdict in decision.kept if not verdict.is_good}
    num_responses = sum(verdict.num_responses for verdict in used)
    values = {
        "filter/rejected": len(rejected),
        **{f"filter/rejected_{reason}": sum(one.reason == reason for one in rejected) for reason in REASONS},
        "filter/kept": len(decision.kept),
        "filter/refilled": sum(verdict.place >= num_first for verdict in decision.kept),
        "filter/filled_up": len(filled_up),
        "filter/surplus": len(surplus),
        "filter/rounds": num_rounds,
        "filter/is_short": decision.is_short,
        "filter/tokens_rejected": sum(one.num_tokens for one in rejected if one.place not in filled_up),
        "filter/tokens_surplus": sum(verdict.num_tokens for verdict in surplus),
        "filter/reward_mean": math.fsum(verdict.reward_sum for verdict in used) / max(num_responses, 1),
    }
    return {name: float(value) for name, value in values.items()}


def spread_evenly(num_of_replica: Sequence[int]) -> list[list[int]]:
    """Which replica trains on which kept group, so that all have the same number, or one more.

    Groups are numbered replica by replica. A group stays where it was sampled if possible; a replica that has too many
    gives its last ones away.

    >>> spread_evenly([3, 0, 1])
    [[0, 1], [2], [3]]
    """
    least, num_larger = divmod(sum(num_of_replica), len(num_of_replica))
    # The larger shares go to the replicas with the most groups, so that the fewest videos are sent.
    by_number = sorted(range(len(num_of_replica)), key=lambda replica: (-num_of_replica[replica], replica))
    share = {replica: least + (rank < num_larger) for rank, replica in enumerate(by_number)}
    parts: list[list[int]] = []
    free: list[int] = []
    start = 0
    for replica, number in enumerate(num_of_replica):
        own = list(range(start, start + number))
        start += number
        parts.append(own[: share[replica]])
        free += own[share[replica] :]
    for replica, part in enumerate(parts):
        missing = share[replica] - len(part)
        part += free[:missing]
        del free[:missing]
        part.sort()
    return parts
