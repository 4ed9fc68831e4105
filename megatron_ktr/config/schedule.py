"""The length of the learning-rate schedule, in optimizer steps or in samples, and the rules for its options.

    by steps     one optimizer step counts 1                                                    lr_warmup_steps
    by samples   one optimizer step counts its prompts (records) over all replicas              lr_warmup_samples,
                 and micro-batches, however they are packed                                     lr_decay_samples

Samples, as Megatron's options of these names count them, keep a schedule where it is when ``prompts_per_step`` changes.
An update that trains on the same prompts again counts them again. By default the decay ends with the run, if all its
steps are full: one that a filter of groups leaves short counts the groups that it trains on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ktr.config import Config


def schedule_length(config: Config) -> float:
    """What the whole run counts for the schedule; infinite while only its epochs are known."""
    num_steps = config.trainer.train_steps or math.inf
    if config.optimizer.counts_samples:
        # Each mini-batch counts its own part of the prompts.
        return num_steps * config.objective.updates_per_rollout * config.trainer.prompts_per_step
    return num_steps * config.objective.num_updates


def problems(config: Config) -> Iterator[str]:
    """One sentence for each rule that is broken. With ``train_epochs`` the number of steps is not known at first;
    ``config/run_length.py`` checks the rules again later."""
    section, length = config.optimizer, schedule_length(config)
    if not section.counts_samples:
        if section.lr_warmup_steps > length:
            yield f"--lr-warmup-steps {section.lr_warmup_steps} exceeds the {length} optimizer steps of the run"
        return
    if section.lr_warmup_steps:
        yield (
            f"--lr-warmup-steps {section.lr_warmup_steps} is not read where the schedule counts samples: give "
            "--lr-warmup-samples in its place"
        )
    warmup, decay = section.lr_warmup_samples or 0, section.lr_decay_samples
    if warmup > length:
        yield f"--lr-warmup-samples {warmup} exceeds the {length} samples of the run"
    if decay is not None and section.lr_decay_style == "constant":
        yield "--lr-decay-samples is not read by --lr-decay-style constant, which does not decay"
    if decay is not None and decay <= warmup:
        yield f"--lr-decay-samples {decay} must exceed --lr-warmup-samples {warmup}: the decay follows the warm-up"
