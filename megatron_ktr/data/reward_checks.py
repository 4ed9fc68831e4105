"""Checks before training whether the built-in rewards can judge the answers to a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ktr.data.records import Record
from megatron_ktr.rewards import READS_PROBLEM_TYPE, load_rewards
from megatron_ktr.rewards.accuracy import ACCURACY_BY_TYPE
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.truth import Truth


def reward_checks(names: Sequence[str]) -> list[Callable[[Record], None]]:
    """The checks for the rewards of these names. A check raises ``ValueError`` for a record that the reward cannot
    judge: it does not know the problem type, or no option is the right one.

    Raises:
        UserError: a name is unknown.
    """
    load_rewards(names)
    readers = [name for name in names if name in READS_PROBLEM_TYPE]
    checks: list[Callable[[Record], None]] = [_type_check(name, known=sorted(ACCURACY_BY_TYPE)) for name in readers]
    return [*checks, check_answer_is_an_option] if readers else checks


def check_answer_is_an_option(record: Record) -> None:
    """Raises ``ValueError`` if a multiple-choice record lists options and its ``solution`` names none of them.

    The solution may name an option by its label ("B", "<answer>B</answer>", "(b)"), by its text, or name several
    ("A, C"). No response can be right otherwise, so that all of them would be learnt from as wrong.
    """
    if record["problem_type"] != "multiple choice" or not record["options"]:
        return
    labels = labelled_options(record["options"])
    truth = Truth.of(record["solution"])
    if not named_labels(truth.text, labels):
        text = truth.text if len(truth.text) <= 80 else truth.text[:77] + "..."
        raise ValueError(f"the right answer {text!r} is not among its options {', '.join(labels)}")


def _type_check(name: str, *, known: Sequence[str]) -> Callable[[Record], None]:
    def check(record: Record) -> None:
        if record["problem_type"] not in known:
            raise ValueError(
                f"the reward {name} does not know problem_type {record['problem_type']!r}, only {known}; "
                "choose with --problem-types, or name other --reward-functions"
            )

    return check
