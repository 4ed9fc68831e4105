"""Checks before training whether the built-in rewards can judge the answers to a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ktr.data.records import Record
from megatron_ktr.rewards import grounding, reads_problem_type, reads_solution
from megatron_ktr.rewards.accuracy import known_types
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.truth import Truth


def reward_checks(names: Sequence[str]) -> list[Callable[[Record], None]]:
    """The checks for the rewards of these names. A check raises ``ValueError`` for a record that the reward cannot
    judge: it does not know the problem type, or no answer could be right.

    Raises:
        UserError: the name of a built-in reward is unknown.
    """
    checks: list[Callable[[Record], None]] = [_type_check(name) for name in names if reads_problem_type(name)]
    return [*checks, check_truth, check_frame_of_boxes] if any(map(reads_solution, names)) else checks


def check_problem_type(record: Record, *, who: str) -> None:
    """Raises ``ValueError`` if ``who`` cannot judge questions of the record's type on this machine."""
    kind, known = record["problem_type"], known_types()
    if kind == "math" and kind not in known:
        raise ValueError(f"{who} needs math-verify for problem_type 'math': pip install 'megatron-ktr[math]'")
    if kind not in known:
        raise ValueError(f"{who} does not know problem_type {kind!r:.80}, only {known}")


def check_truth(record: Record) -> None:
    """Raises ``ValueError`` if the right answer is of a form in which no response could be right: it names none of the
    options, or is no span or box (``rewards/grounding.py``)."""
    check_answer_is_an_option(record)
    readers = {grounding.TEMPORAL: grounding.read_span, grounding.SPATIAL: grounding.read_box}
    read = readers.get(record["problem_type"])
    if read is not None and read(Truth.of(record["solution"]).text) is None:
        form = "'from 3.2 to 8.5 seconds'" if read is grounding.read_span else '{"boxes": [x1, y1, x2, y2]}'
        raise ValueError(f"expected a right answer such as {form}, got {_short(Truth.of(record['solution']).text)}")


def check_frame_of_boxes(record: Record) -> None:
    """Raises ``ValueError`` if a question about boxes does not say in which frame they are given. The model must be
    told, because it knows the picture in another size than the file has."""
    if record["problem_type"] != grounding.SPATIAL:
        return
    size = record.get("box_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError(
            f"expected box_size: [width, height], the picture in whose pixels its boxes are, got {_short(size)}"
        )


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
        raise ValueError(f"the right answer {_short(truth.text)} is not among its options {', '.join(labels)}")


def _type_check(name: str) -> Callable[[Record], None]:
    def check(record: Record) -> None:
        try:
            check_problem_type(record, who=f"the reward {name}")
        except ValueError as error:
            raise ValueError(f"{error}; choose with --problem-types, or name other --reward-functions") from error

    return check


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) > 80:
        value = value[:77] + "..."
    return repr(value)[:200]
