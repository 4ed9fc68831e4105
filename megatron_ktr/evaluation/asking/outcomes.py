"""What an output directory says: items, answers, and the verdicts on them, which are worked out whenever it is read.

    settings.json   what was asked of whom                     settings.py
    items.jsonl     every question with its record             here
    answers.jsonl   every answer                               store.py

Neither the files of the benchmarks nor a model are needed for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.data.records import check_record
from megatron_ktr.errors import UserError, is_transient, unreadable
from megatron_ktr.evaluation.asking.scaling import Ask, known_rounds, outcome_of
from megatron_ktr.evaluation.asking.settings import EvaluationSettings, read_settings
from megatron_ktr.evaluation.asking.store import read_answers
from megatron_ktr.evaluation.asking.stored import made_of
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.benchmarks.question_file import benchmark_of_file
from megatron_ktr.evaluation.item import Answer, Condition, Evaluation, Item, Outcome, Verdict
from megatron_ktr.evaluation.protocols import has_format, judge_all
from megatron_ktr.evaluation.registry import BENCHMARKS, load_benchmark
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import parse_json

ITEMS_FILE = "items.jsonl"


class Outcomes:
    """The outcomes of the items of an evaluation, as its answers come in. What is complete is judged once."""

    def __init__(self, settings: EvaluationSettings, items: Sequence[Item]) -> None:
        self.settings = settings
        self.items = tuple(items)
        self._of_benchmark: dict[str, list[Item]] = {name: [] for name in settings.benchmarks}
        for item in items:
            self._of_benchmark[item.benchmark].append(item)
        self._benchmarks = {name: stored_benchmark(name, asked.path) for name, asked in settings.benchmarks.items()}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._complete: dict[tuple[str, str, Condition], Outcome] = {}
        self._verdicts: dict[tuple[str, str, str], Mapping[str, Verdict]] = {}

    def key(self, ask: Ask) -> str:
        """As ``EvaluationSettings.key``, computed once."""
        place = (ask.item.benchmark, ask.item.item_id, ask.condition, ask.round, ask.vote)
        if place not in self._keys:
            self._keys[place] = self.settings.key(ask)
        return self._keys[place]

    def judge(self, item: Item, text: str) -> Mapping[str, Verdict]:
        """The verdicts of every protocol, found once for each response."""
        response = (item.benchmark, item.item_id, text)
        if response not in self._verdicts:
            self._verdicts[response] = judge_all(self._benchmarks[item.benchmark], item, text)
        return self._verdicts[response]

    def known_asks(self, asked: Sequence[tuple[str, Condition]], get: Callable[[str], Answer | None]) -> dict[str, Ask]:
        """By key, all questions of which it is known that they are needed, answered or not. Those about one item stand
        together, and first those with the same frames, so that its media are read once."""
        conditions: dict[str, list[Condition]] = {}
        for name, condition in sorted(asked, key=lambda pair: pair[1].frames):
            conditions.setdefault(name, []).append(condition)
        return {
            self.key(ask): ask
            for item in self.items
            for condition in conditions.get(item.benchmark, ())
            for asks in known_rounds(item, condition, answer_to=self._answer_to(get), judge=self.judge)
            for ask in asks
        }

    def evaluation(self, get: Callable[[str], Answer | None]) -> Evaluation:
        """All that the answers say; ``get`` gives the answer with a key."""
        answer_to = self._answer_to(get)
        found = []
        for name, condition in self.settings.asked:
            for item in self._of_benchmark[name]:
                place = (name, item.item_id, condition)
                if place not in self._complete:
                    outcome = outcome_of(item, condition, answer_to=answer_to, judge=self.judge, has_format=has_format)
                    if outcome is None:
                        continue
                    self._complete[place] = outcome
                found.append(self._complete[place])
        return Evaluation(
            settings=self.settings.as_json(),
            items=self.items,
            conditions=self.settings.conditions,
            outcomes=tuple(found),
            asked=self.settings.asked,
        )

    def _answer_to(self, get: Callable[[str], Answer | None]) -> Callable[[Ask], Answer | None]:
        return lambda ask: get(self.key(ask))


def stored_benchmark(name: str, path: str) -> Benchmark:
    """The benchmark of a stored name. A question file of the user's own need not be there any more."""
    return load_benchmark(name) if name in BENCHMARKS else benchmark_of_file(Path(path), name=name)


def read_evaluation(directory: Path | str) -> Evaluation:
    """All that an output directory holds, complete or not; an evaluation may be writing to it.

    Raises:
        UserError: it is not the output directory of an evaluation, or a file of it cannot be read.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    if settings is None:
        raise UserError(f"{directory} is not the output directory of an evaluation: it has no settings.json")
    items = read_items(directory, settings)
    return Outcomes(settings, items).evaluation(read_answers(directory).get)


def write_items(directory: Path, items: Sequence[Item]) -> None:
    lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False, sort_keys=True) for item in items]
    write_atomically(directory / ITEMS_FILE, "".join(f"{line}\n" for line in lines))


def read_items(directory: Path, settings: EvaluationSettings) -> list[Item]:
    """The items of the benchmarks of an output directory's settings.

    Raises:
        UserError: the file cannot be read, has an item twice, or lacks some.
    """
    path = directory / ITEMS_FILE
    items: dict[tuple[str, str], Item] = {}
    num_lines = 0
    try:
        with open_file(path) as file:
            lines = file.read().decode("utf-8").split("\n")
        for line in lines:
            if line and (item := _item_of(parse_json(line))).benchmark in settings.benchmarks:
                items[item.benchmark, item.item_id] = item
                num_lines += 1
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the items of an evaluation: {error}") from error
    if len(items) < num_lines:
        raise UserError(f"{path} has {num_lines - len(items)} questions twice; was it edited?")
    found = Counter(benchmark for benchmark, _ in items)
    for name, asked in settings.benchmarks.items():
        wanted = asked.limit or asked.num_items
        if found[name] < wanted:
            raise UserError(
                f"{path} has {found[name]} of the {wanted} questions of {name} that were asked; was it edited?"
            )
    return list(items.values())


def has_items(directory: Path) -> bool:
    """Whether the directory's file of items was written by an evaluation, as far as its first line tells.

    Raises:
        UserError: it cannot be read now, which may pass.
    """
    path = directory / ITEMS_FILE
    try:
        with open_file(path) as file:
            _item_of(parse_json(file.readline()))
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise unreadable(path, error) from error
        return False
    return True


def _item_of(value: Any) -> Item:
    """Raises ``ValueError`` or ``TypeError`` for anything that is no item."""
    item = made_of(Item, value)
    number = item.record.get("record_number", 1)
    record = check_record(dict(item.record), number=number if isinstance(number, int) else 1)
    return dataclasses.replace(item, record=record)
