"""Checks before the first step that sampler and trainer give the same tokens the same log-probs, or tells what differs.

    1. the engine samples a few tokens after each fixed prompt (``rollout/check/probes.py``), with log-probs
    2. the trainer scores the same tokens
    3. a prompt whose mean |difference| exceeds the limit stops the run, with one line that names the part

The prompts are ordered so that each adds one thing that can go wrong. The first prompt that differs therefore tells
which part is wrong. If that leaves several causes, one more experiment decides: the trainer scores the same tokens at
other temperatures or with other seconds per temporal patch, or the weights are sent again.

``SamplerCheck`` holds only numbers and callables, which ``build_sampler_check`` connects to trainer and engine. The
callables are collective, so ``run`` is called on every rank. All ranks take the same decisions, because these depend
only on numbers that ``worst`` has made equal on all ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_ktr.batch.packing import MediaSpec, pack_groups
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.rollout.check.probes import IMAGE, LONG, PATCH, SIZED, TEXT, TIMING, VIDEO
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from megatron_ktr.policy.policy import Policy

MAX_TOKENS = 16
"""Tokens of one response. Each adds one log-prob to the comparison, and the first ones suffice to find a difference."""
DEFAULT_LIMIT = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
"""The largest mean difference allowed, in nats, by the type of the parameters. Two correct implementations that sum in
another order differ by 1e-6 to 1e-5 in fp32. In 16 bits they differ by about 0.01, and single tokens by ten times that.
The errors that the check looks for cause differences of tenths of nats and more."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """The difference |sampler - trainer| of log-probs, in nats, over the tokens sampled after one prompt."""

    mean: float
    max: float
    num_tokens: int


class Score(Protocol):
    def __call__(
        self,
        groups: Sequence[RolloutGroup],
        *,
        temperature: float | None = None,
        seconds_per_grid: float | None = None,
    ) -> list[list[float]]:
        """The trainer's log-probs of all responses of each group, in order.

        ``temperature`` None means the run's own, ``seconds_per_grid`` None each video's own.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SamplerCheck:
    """The comparison of sampler and trainer. ``sample``, ``score``, ``send_weights`` and ``worst`` are collective."""

    prompts: Mapping[str, Prompt]
    sampling: SamplingSettings
    limit: float
    sample: Callable[[Sequence[Prompt], SamplingSettings], list[RolloutGroup]]
    score: Score
    send_weights: Callable[[], None]
    worst: Callable[[dict[str, Gap]], dict[str, Gap]] = lambda gaps: gaps
    """Returns, for each prompt, the largest gap of all replicas."""

    def run(self) -> dict[str, float]:
        """The gaps as metrics: sampler_check/gap_mean, sampler_check/gap_max, both in nats per token.

        Raises:
            UserError: a prompt's mean gap exceeds the limit; raised on every rank. The message names the part that
                differs.
        """
        groups = self._sampled(self.prompts)
        own = self._gaps(groups)
        gaps = self.worst(own)
        if all(self._agrees(gap) for gap in gaps.values()):
            num_tokens = sum(gap.num_tokens for gap in gaps.values())
            mean = sum(gap.mean * gap.num_tokens for gap in gaps.values()) / num_tokens
            return {"sampler_check/gap_mean": mean, "sampler_check/gap_max": max(gap.max for gap in gaps.values())}
        cause = self._cause(groups, own, gaps)
        with same_on_every_rank():
            raise UserError(
                f"sampler and trainer give the same tokens different log-probs; what differs: {cause}. By prompt: "
                f"{describe(gaps, limit=self.limit)} (--sampler-gap-limit {self.limit:g}; --no-check-sampler goes on "
                "all the same)"
            )

    def _agrees(self, gap: Gap) -> bool:
        return gap.mean <= self.limit  # False for NaN

    def _sampled(self, prompts: Mapping[str, Prompt]) -> dict[str, RolloutGroup]:
        return dict(zip(prompts, self.sample(list(prompts.values()), self.sampling), strict=True))

    def _gaps(
        self,
        groups: Mapping[str, RolloutGroup],
        *,
        temperature: float | None = None,
        seconds_per_grid: float | None = None,
    ) -> dict[str, Gap]:
        """The gaps of this replica, by prompt."""
        scored = self.score(list(groups.values()), temperature=temperature, seconds_per_grid=seconds_per_grid)
        return {name: measure(group, logprobs) for (name, group), logprobs in zip(groups.items(), scored, strict=True)}

    # --- which part ---------------------------------------------------------------------------------------------

    def _cause(self, groups: Mapping[str, RolloutGroup], own: Mapping[str, Gap], gaps: Mapping[str, Gap]) -> str:
        """What differs, in words. ``own`` are this replica's gaps, ``gaps`` the largest of all replicas'."""
        differ = [name for name, gap in gaps.items() if not self._agrees(gap)]
        first = differ[0]
        if first == TEXT:
            return self._other_temperature(groups, own) or self._weights(TEXT) or "the weights, or how text is scored"
        if first == IMAGE and PATCH in differ:
            part = "pixels of images and videos (normalisation, channels), or the vision encoder's weights"
            return self._weights(IMAGE) or part
        found = None
        if first in (VIDEO, TIMING, LONG):
            found = self._other_seconds(groups, own, [name for name in (LONG, TIMING, VIDEO) if name in differ])
        return found or _PARTS[first]

    def _would_agree(self, groups: Mapping[str, RolloutGroup], own: Mapping[str, Gap], **changes: float) -> bool:
        """Whether the trainer, scoring ``groups`` with ``changes``, would agree with the engines that differ now."""
        changed = self._gaps(groups, **changes)
        # Where the engine agrees already, its gap stays, because the changes need not explain it.
        changed = {name: own[name] if self._agrees(own[name]) else gap for name, gap in changed.items()}
        return all(self._agrees(gap) for gap in self.worst(changed).values())

    def _other_temperature(self, groups: Mapping[str, RolloutGroup], own: Mapping[str, Gap]) -> str | None:
        """Names the temperature at which the trainer would agree, if there is one."""
        ours = self.sampling.temperature or 1.0
        for other in sorted({1.0, ours**2, 0.5, 0.6, 0.7, 0.8, 0.9, 1.25, 1.5, 2.0} - {ours}):
            if self._would_agree({TEXT: groups[TEXT]}, own, temperature=other):
                return f"temperature: the sampler's log-probs are those of {other:g}, the run's is {ours:g}"
        return None

    def _other_seconds(
        self, groups: Mapping[str, RolloutGroup], own: Mapping[str, Gap], differ: Sequence[str]
    ) -> str | None:
        """Names the rule for seconds per temporal patch with which the trainer would agree on all videos that differ,
        if there is one."""
        for rule, seconds_of in _OTHER_SECONDS.items():
            others = {name: seconds_of(groups[name].prompt.media[0].seconds_per_grid) for name in differ}
            if all(self._would_agree({name: groups[name]}, own, seconds_per_grid=others[name]) for name in differ):
                return f"seconds per temporal patch: the sampler counts {rule}"
        return None

    def _weights(self, name: str) -> str | None:
        """Sends the weights again. If sampler and trainer then agree, the first update did not arrive."""
        self.send_weights()
        gap = self.worst(self._gaps(self._sampled({name: self.prompts[name]})))[name]
        if not self._agrees(gap):
            return None
        return f"weights: once they are sent a second time the sampler agrees ({gap.mean:.1e} nats)"


_PARTS = {
    IMAGE: "pixels or grid of images, as videos agree",
    PATCH: "pixels of videos (normalisation, order of frames), as images agree",
    VIDEO: "grid of several temporal patches (order, resizing, frames left out), as one patch agrees",
    TIMING: "seconds per temporal patch, as 1 s agrees",
    LONG: "positions after a video that lasts longer than it is wide, as shorter ones agree",
    SIZED: "frames of the run's size: resized, or cut at a limit of the sampler's, as smaller ones agree",
}
"""What differs, by the first prompt that differs, if that alone tells."""

_OTHER_SECONDS: dict[str, Callable[[float], float]] = {
    "1 s for every one": lambda own: 1.0,
    "half of them": lambda own: own / 2,
    "twice as many": lambda own: own * 2,
    "none": lambda own: 1e-6,
}


def measure(group: RolloutGroup, trainer_logprobs: Sequence[float]) -> Gap:
    """Compares the trainer's log-probs with the sampler's. ``trainer_logprobs`` are those of all responses of
    ``group``, one response after the other.

    Raises:
        UserError: the sampler recorded no log-probs.
    """
    sampled: list[float] = []
    for rollout in group.rollouts:
        if rollout.sampler_logprobs is None:
            raise UserError("check_sampler: the engine records no log-probs; choose --no-check-sampler")
        sampled += rollout.sampler_logprobs
    gaps = [abs(ours - theirs) for ours, theirs in zip(trainer_logprobs, sampled, strict=True)]
    # max() ignores a NaN unless it comes first.
    largest = math.nan if any(map(math.isnan, gaps)) else max(gaps)
    return Gap(mean=sum(gaps) / len(gaps), max=largest, num_tokens=len(gaps))


def describe(gaps: Mapping[str, Gap], *, limit: float) -> str:
    """A line of text with every prompt and its mean gap. Prompts that agree come first."""
    agree = [f"{name} ({gap.mean:.1e})" for name, gap in gaps.items() if gap.mean <= limit]
    differ = [f"{name} ({gap.mean:.2g} nats)" for name, gap in gaps.items() if not gap.mean <= limit]
    parts = [f"{', '.join(agree)} agree" if agree else "nothing agrees", f"{', '.join(differ)} differ"]
    return "; ".join(parts)


def check_line(values: Mapping[str, float]) -> str:
    """The console line of a check that passed, from its metrics; empty if no check ran."""
    if "sampler_check/gap_mean" not in values:
        return ""
    mean, largest = values["sampler_check/gap_mean"], values["sampler_check/gap_max"]
    return f"sampler and trainer agree: log-probs differ by {mean:.1e} on average, {largest:.1e} at most"


# --- trainer and engine ---------------------------------------------------------------------------------------------


def trainer_logprobs(
    groups: Sequence[RolloutGroup],
    *,
    policy: Policy,
    media: MediaSpec,
    pad_to_multiple: int = 1,
    temperature: float | None = None,
    seconds_per_grid: float | None = None,
) -> list[list[float]]:
    """Implements ``Score`` with the policy. It is collective over the replica; all its ranks get the result."""
    batches = [
        pack_groups(
            [group],
            view="intact",
            media=media,
            pad_to_multiple=pad_to_multiple,
            seconds_per_grid=seconds_per_grid,
            vision="media" if policy.ranks.is_first_stage else "none",
        )
        for group in groups
    ]
    # An interleaved pipeline schedule needs a multiple of the number of stages as its number of micro-batches.
    fill = [batches[-1]] * (-len(batches) % policy.ranks.sizes.pipeline)
    found = policy.score(batches + fill, temperature=temperature)[: len(batches)]
    known = [statistics.logprob_R.tolist() for statistics in found if statistics is not None]
    return policy.from_last_stage(known)


def worst_of_replicas(gaps: dict[str, Gap], *, ranks: ParallelGroups) -> dict[str, Gap]:
    """The largest gap of all ranks, by prompt; NaN counts as the largest."""
    found = gather_objects(gaps, group=ranks.world)
    return {
        name: max((part[name] for part in found), key=lambda gap: (math.isnan(gap.mean), gap.mean)) for name in gaps
    }
