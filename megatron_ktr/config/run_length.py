"""The length of a run: a number of steps, either given (``train_steps``) or derived from epochs (``train_epochs``).

    steps = ceil(train_epochs x records / prompts_per_step)

Only records that remain after ``problem_types`` and all checks of the file count. The ranks walk through one endless
sequence, which is the orders of all epochs back to back (``data/dataset.py``). After that many steps every record was
therefore drawn at least floor(train_epochs) times, in every layout. If an epoch does not fill the last step, the step
continues into the next epoch. A prompt that is skipped when drawn is replaced by the next one, so the number of steps
stays the same and the run draws a little more of the sequence. (Records left out by the checks may be spread unevenly
over replicas; one replica then reaches its next epoch a few records before another.) The same holds for groups that
``filter_groups`` rejects and for records that ``retire_above`` passes over: the number of steps stays, and the run
walks through more of the sequence than ``train_epochs``.

The number is known before training starts. The learning-rate schedule ends with it, and ``lag`` begins no rollouts
after it. A resumed run computes it anew: the same records give the same number, another ``train_epochs`` another one.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from megatron_ktr.config import Config
from megatron_ktr.config.checks import check
from megatron_ktr.config.sections import TrainerSection


def steps_of_epochs(epochs: float, *, num_records: int, prompts_per_step: int) -> int:
    """ceil(epochs x records / prompts), computed exactly with the decimal number as it was written: 0.7 x 10 is 7, not
    a little more."""
    return math.ceil(Fraction(repr(float(epochs))) * num_records / prompts_per_step)


def with_steps(config: Config, *, num_records: int) -> Config:
    """``config`` with its length given as ``train_steps``.

    Raises:
        UserError: the steps break a rule, for example a warm-up that is longer than the run.
    """
    trainer = config.trainer
    if trainer.train_epochs is None:
        return config
    steps = steps_of_epochs(trainer.train_epochs, num_records=num_records, prompts_per_step=trainer.prompts_per_step)
    resolved = dataclasses.replace(trainer, train_steps=steps, train_epochs=None)
    config = dataclasses.replace(config, trainer=resolved)
    check(config)
    return config


def length_line(config: Config, *, num_records: int) -> str:
    """A console line that says how many steps ``train_epochs`` are; empty if the length was given in steps."""
    epochs, prompts = config.trainer.train_epochs, config.trainer.prompts_per_step
    if epochs is None:
        return ""
    steps = steps_of_epochs(epochs, num_records=num_records, prompts_per_step=prompts)
    surplus = math.floor(steps * prompts - Fraction(repr(float(epochs))) * num_records)
    rounded = f", rounded up: {surplus} of the last step's prompts are from beyond" if surplus else ""
    return f"{epochs:g} epochs x {num_records} records / {prompts} prompts a step = {steps} steps{rounded}"


def num_steps_of(trainer: TrainerSection) -> int:
    """The length of a run in steps. It must be known: from ``--train-steps``, or because ``with_steps`` has run."""
    assert trainer.train_steps is not None, "epochs are counted before the first step"
    return trainer.train_steps
