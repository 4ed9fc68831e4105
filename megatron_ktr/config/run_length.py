"""How long a run is: a number of steps, given (``train_steps``) or made of epochs (``train_epochs``).

    steps = ceil(train_epochs x records / prompts_per_step)

with the records that are kept, after ``problem_types`` and all checks of the file. The ranks walk through one endless
sequence, the epochs' orders back to back (``data/dataset.py``), so after that many steps every record was drawn at
least floor(train_epochs) times, in every layout; where the last step is not filled, it goes on into the next epoch. A
prompt that is skipped on drawing is replaced by the one after it: the run has the same number of steps, and draws a
little more of the sequence. (Records left out by the checks may lie unevenly on several replicas: one of them then
comes to its next epoch a few records before another.)

The number is known before anything is trained. The learning rate's schedule ends with it, ``lag`` begins no rollouts
after it, and a resumed run counts it anew: from the same records the same, from other epochs another.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from megatron_ktr.config import Config
from megatron_ktr.config.checks import check
from megatron_ktr.config.sections import TrainerSection


def steps_of_epochs(epochs: float, *, num_records: int, prompts_per_step: int) -> int:
    """ceil(epochs x records / prompts), of the decimal number as it was written: 0.7 x 10 is 7, not a little more."""
    return math.ceil(Fraction(repr(float(epochs))) * num_records / prompts_per_step)


def with_steps(config: Config, *, num_records: int) -> Config:
    """``config`` with its length as ``train_steps``.

    Raises:
        UserError: the steps break a rule (a warm-up that is longer than the run).
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
    """What ``train_epochs`` comes to, for the console; empty where the run's length was given in steps."""
    epochs, prompts = config.trainer.train_epochs, config.trainer.prompts_per_step
    if epochs is None:
        return ""
    steps = steps_of_epochs(epochs, num_records=num_records, prompts_per_step=prompts)
    surplus = math.floor(steps * prompts - Fraction(repr(float(epochs))) * num_records)
    rounded = f", rounded up: {surplus} of the last step's prompts are from beyond" if surplus else ""
    return f"{epochs:g} epochs x {num_records} records / {prompts} prompts a step = {steps} steps{rounded}"


def num_steps_of(trainer: TrainerSection) -> int:
    """The length of a run whose epochs have been counted (``with_steps`` or ``--train-steps``)."""
    assert trainer.train_steps is not None, "epochs are counted before the first step"
    return trainer.train_steps
