"""Rules between the options of a policy gradient: advantage, ratio, denominators, KL and mini-batches.

An option that no part of the run would read is refused, so that nobody believes it acts. ``notes`` are about what is
allowed and yet without effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config.cli import show_value
from megatron_ktr.config.given import flag, given, is_given
from megatron_ktr.config.loss_parts import ADVANTAGES, build_part
from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.config.sections import ObjectiveSection

if TYPE_CHECKING:
    from megatron_ktr.config import Config

NOT_SUPERVISED = (
    "advantage",
    "advantage_over",
    "loss_constant",
    "masked_denominator",
    "ratio",
    "dual_clip",
    "kl_kind",
    "kl_in_reward",
    "kl_on",
    "measure_full_kl",
    "entropy_bonus",
    "sampled_entropy_penalty",
)
"""Options that the likelihood of given responses does not have."""


def problems(config: Config) -> Iterator[str]:
    section = config.objective
    if section.is_supervised:
        yield from _supervised(section)
    yield from _advantage(config)
    yield from _ratio(section)
    yield from _kl(section)
    if section.loss_constant is not None and section.loss_aggregation != "constant":
        yield f"--loss-constant needs --loss-aggregation constant, got {section.loss_aggregation}"
    if config.trainer.prompts_per_step % section.mini_batches:
        yield (
            f"--mini-batches {section.mini_batches} must divide --prompts-per-step {config.trainer.prompts_per_step}: "
            "mini-batches have equal numbers of prompts"
        )


def notes(config: Config) -> list[str]:
    """Sentences about options that act on nothing in this run, or not as one may expect."""
    section = config.objective
    found = _other_than_preset(config)
    asked = section.ratio != "token" or section.dual_clip is not None
    if asked and not section.is_supervised and section.num_updates == 1:
        option = f"ratio {section.ratio}" if section.ratio != "token" else f"dual_clip {section.dual_clip:g}"
        found.append(
            f"{option}: with one update per rollout every ratio is 1, and the gradient is the one of ratio token; "
            "--mini-batches or --updates-per-rollout above 1 make it act"
        )
    bounds = given(section, ("clip_low", "clip_high"), objective=section.objective)
    if section.ratio == "cispo" and bounds:
        shown = " and ".join(f"{name} {getattr(section, name):g}" for name in bounds)
        found.append(f"{shown}: ratio cispo has no such bound; its cap is ratio_cap {section.ratio_cap:g}")
    if (
        is_given(section, "kl_kind", objective=section.objective)
        and not section.kl_beta
        and not is_given(section, "kl_beta", objective=section.objective)
    ):
        found.append(
            f"kl_kind {section.kl_kind}: objective {section.objective} has no KL (kl_beta 0); --kl-beta above 0 adds it"
        )
    if section.kl_kind == "k1" and section.kl_beta > 0 and not section.kl_in_reward and not section.is_supervised:
        found.append(
            "kl_kind k1: as a term of the loss it has no gradient in expectation; k2, k3_plus and full follow the KL, "
            "and --kl-in-reward is the place of k1"
        )
    return found


def _other_than_preset(config: Config) -> list[str]:
    """Options in which a run differs from its objective's own values. A run file that holds every option, as those do
    that runs write, leaves an objective nothing but its name."""
    entry = objective_entry(config.objective.objective)
    values = {name: value for section in vars(config).values() for name, value in vars(section).items()}
    values["selection"] = config.objective.selection_mode  # none stands for the objective's own
    others = [
        f"{name} {show_value(values[name])} (not {show_value(own)})"
        for name, own in entry.defaults.items()
        if values[name] != own
    ]
    return [f"{entry.name} with other options than its own: {', '.join(others)}"] if others else []


def _supervised(section: ObjectiveSection) -> Iterator[str]:
    for name in given(section, NOT_SUPERVISED, objective=section.objective):
        yield f"{flag(name)} is not read by --objective {section.objective}"
    if section.loss_aggregation == "constant":
        yield f"--loss-aggregation constant is not read by --objective {section.objective}: choose sequence or token"


def _advantage(config: Config) -> Iterator[str]:
    section = config.objective
    is_over_batch = getattr(build_part(ADVANTAGES, section.advantage, section), "needs_batch", False)
    if section.advantage_over != "responses" and not is_over_batch:
        yield (
            f"--advantage-over {section.advantage_over} needs an --advantage over the global batch, such as batch: "
            f"{section.advantage} compares the responses of one prompt"
        )
    if is_over_batch and section.original_compat:
        yield (
            f"--original-compat does not go with --advantage {section.advantage}: lengths that count key tokens are "
            "known too late for it"
        )
    if config.rollout.num_generations < 2 and not section.is_supervised and section.advantage != "batch":
        yield (
            "--num-generations must be at least 2: advantages compare the responses of one prompt (only --advantage "
            "batch does not)"
        )


def _ratio(section: ObjectiveSection) -> Iterator[str]:
    if section.dual_clip is not None and section.ratio != "token":
        yield f"--dual-clip needs --ratio token, got {section.ratio}"
    if is_given(section, "ratio_cap", objective=section.objective) and section.ratio != "cispo":
        yield f"--ratio-cap needs --ratio cispo, got {section.ratio}"


def _kl(section: ObjectiveSection) -> Iterator[str]:
    if section.kl_kind == "full" and not section.kl_beta and not section.is_supervised:
        yield "--kl-kind full needs --kl-beta above 0; --measure-full-kl reports that KL without using it"
    if not section.kl_beta and not section.is_supervised:
        for name in given(section, ("kl_in_reward", "kl_on"), objective=section.objective):
            yield f"{flag(name)} needs --kl-beta above 0: without a weight there is no KL"
    if not section.kl_in_reward or not section.kl_beta:
        return
    if section.kl_kind == "k3_plus":
        yield "--kl-in-reward has no gradient, in which alone k3_plus differs from k3: choose --kl-kind k3"
    if section.kl_on == "all":
        yield "--kl-on is not read with --kl-in-reward, which sums over all tokens of a response"
