"""Scores stored responses anew, without a model (``tools/evaluate.py --score-responses FILE.jsonl``).

    {"question": {"problem_type": "multiple choice", "solution": "<answer>B</answer>", "options": [...], ...},
     "model_output": "<think>...</think><answer>B</answer>", ...}

One such object a line; further fields are not read. ``official`` is Video-R1's evaluation (``judges/video_r1.py``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.data.raw_records import MAX_RECORD_CHARS
from megatron_ktr.data.reward_checks import check_truth
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.benchmark import Judge
from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges import video_r1
from megatron_ktr.evaluation.protocols import JUDGES, PROTOCOL_NAMES, has_format
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import parse_json, to_json
from megatron_ktr.rewards.accuracy import known_types

OPTION = "--score-responses"
_JUDGES: Mapping[str, Judge] = {"official": video_r1.judge, **JUDGES}


def score_responses(path: Path, protocol: str) -> dict[str, int | float]:
    """``num`` of responses, their mean ``accuracy``, and the share that has the ``format`` of reasoning and answer.

    The file is read line by line, so that its size does not matter.

    Raises:
        UserError: the file cannot be read, has no responses, or a line is no such record; the message has its number.
    """
    scores: list[float] = []
    num_formatted = 0
    for verdict, is_formatted in iter_verdicts(path, protocol):
        scores.append(verdict.score)
        num_formatted += is_formatted
    if not scores:
        raise UserError(f"{OPTION}: {path} has no responses")
    return {
        "num": len(scores),
        "accuracy": math.fsum(scores) / len(scores),
        "format": num_formatted / len(scores),
    }


def iter_verdicts(path: Path, protocol: str) -> Iterator[tuple[Verdict, bool]]:
    """For each response its verdict, and whether it has the format. Raises as ``score_responses`` does."""
    if protocol not in _JUDGES:
        raise UserError(f"--protocol {protocol}: expected one of {', '.join(PROTOCOL_NAMES)}")
    for number, line in _lines(path):
        try:
            item, response = _read(line, number=number)
        except ValueError as error:
            raise UserError(f"{OPTION}: {path}, line {number}: {error}") from error
        yield _JUDGES[protocol](item, response), has_format(response)


def run(options: argparse.Namespace) -> int:
    """The command: reads ``score_responses``, ``protocol`` and ``json`` of the options, and prints the result; with
    ``json`` as one object on the last line."""
    found = score_responses(options.score_responses, options.protocol)
    if options.json:
        print(to_json(found))
    else:
        print(
            f"{found['num']} responses under the protocol {options.protocol}: "
            f"accuracy {found['accuracy']:.4f}, format {found['format']:.4f}"
        )
    return 0


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of all lines that are not blank."""
    number = 0
    try:
        with open_file(path) as file:
            while line := file.readline(MAX_RECORD_CHARS + 1):
                number += 1
                if len(line) > MAX_RECORD_CHARS:
                    raise UserError(f"{OPTION}: {path}, line {number} is longer than {MAX_RECORD_CHARS} bytes")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{OPTION}: {path} cannot be read: {error.strerror or error}") from error


def _read(line: bytes, *, number: int) -> tuple[Item, str]:
    """The item and the response of a line. Raises ``ValueError`` if it has none."""
    value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with 'question' and 'model_output', got {type(value).__name__}")
    question, response = value.get("question"), value.get("model_output")
    if not isinstance(question, dict):
        raise ValueError(f"expected an object in 'question', got {type(question).__name__}")
    if not isinstance(response, str):
        raise ValueError(f"expected text in 'model_output', got {type(response).__name__}")
    record = _record(question)
    check_truth(record)
    return Item("responses", str(number), record), response


def _record(question: Mapping[str, Any]) -> dict[str, Any]:
    """What judges read of a question."""
    problem_type, solution, options = (question.get(name) for name in ("problem_type", "solution", "options"))
    if not isinstance(problem_type, str) or problem_type not in known_types():
        raise ValueError(f"expected problem_type to be one of {known_types()}, got {problem_type!r:.80}")
    is_whole = isinstance(solution, int) and not isinstance(solution, bool)
    if not isinstance(solution, str) and not is_whole and not (isinstance(solution, float) and math.isfinite(solution)):
        raise ValueError(f"expected the right answer as text or a finite number in 'solution', got {solution!r:.80}")
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"expected 'options' to be a list of text, got {type(options).__name__}")
    return {"problem_type": problem_type, "solution": solution, "options": options}
