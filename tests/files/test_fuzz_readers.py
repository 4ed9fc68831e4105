"""Whatever stands in a file that a user or a program gives is read, or costs one line; nothing else happens."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from megatron_ktr.config import load_config
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.prepare.sources import iter_rows
from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.evaluation.asking.store import read_answers
from megatron_ktr.evaluation.commands.score_responses import score_responses
from megatron_ktr.files import bounded
from megatron_ktr.files.chat_template import read_chat_template
from megatron_ktr.files.json_files import read_json, read_json_object
from megatron_ktr.report.html import write_report
from megatron_ktr.rollout.replay import ReplayEngine
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.fuzzing import fuzzed
from tests.support.hostile_text import HOSTILE_BYTES, changed
from tests.support.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTION = {"problem_type": "multiple choice", "solution": "<answer>B</answer>", "options": ["A. red", "B. blue"]}
RESPONSE = {"text": "<think>a</think><answer>B</answer>", "reward": 1.0, "rewards": {"accuracy": 1.0, "format": 0.0}}
RECORD = {"problem": "Which?", "problem_id": 1, **QUESTION, "responses": [RESPONSE, {**RESPONSE, "reward": 0}]}


def _all(values: Iterable[Any]) -> list[Any]:
    return list(values)


def _run_directory(path: Path) -> None:
    folder = path.with_name(f"{path.name} run")
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "config.yaml", "rollouts/step_000001.jsonl"):
        for other in ("metrics.jsonl", "config.yaml", "rollouts/step_000001.jsonl"):
            (folder / other).write_text({"metrics.jsonl": '{"step": 1, "loss": 0.5}\n'}.get(other, ""))
        (folder / name).write_bytes(path.read_bytes())
        try:
            write_report([(None, folder)], out=folder / "report.html")
        except UserError as error:
            last = error
        else:
            last = None
    if last is not None:
        raise last


def _model_file(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        folder = path.with_name(f"{path.name} model")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(path.read_bytes())
        return PreprocessSettings.from_model(folder), Qwen2_5_VLConfig.from_hf(folder)

    return read


def _answers(path: Path) -> object:
    folder = path.with_name(f"{path.name} answers")
    folder.mkdir(exist_ok=True)
    (folder / "answers.jsonl").write_bytes(path.read_bytes())
    return read_answers(folder)


def _rows(suffix: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        return _all(iter_rows(path.rename(path.with_suffix(suffix)), split=None))

    return read


READERS: dict[str, Callable[[Path], object]] = {
    "JSON": read_json,
    "one object": read_json_object,
    "question file": lambda path: _all(iter_raw_records(path)),
    "run file": lambda path: load_config(["--config", str(path)]),
    "replay file": lambda path: ReplayEngine(path, tokenizer=TOKENIZER, vocab_size=199),
    "wording": lambda path: WordingTemplate(path).render({"problem": "a"}),
    "chat template": read_chat_template,
    "responses to score": lambda path: score_responses(path, "strict"),
    "answers": _answers,
    "run directory": _run_directory,
    "config.json": _model_file("config.json"),
    "processor": _model_file("preprocessor_config.json"),
    "video processor": _model_file("video_preprocessor_config.json"),
    "csv": _rows(".csv"),
    "jsonl": _rows(".jsonl"),
    "parquet": _rows(".parquet"),
    "arrow": _rows(".arrow"),
    "text": _rows(".txt"),
}


def told(read: Callable[[Path], object], path: Path) -> str | None:
    """What the user reads; None if the file is read."""
    try:
        read(path)
    except UserError as error:
        line = one_line(error)
        assert line and line.isprintable() and len(line) < 2600
        return line
    return None


@pytest.mark.parametrize("name", READERS)
def test_a_hostile_file_is_read_or_costs_one_line(tmp_path: Path, name: str) -> None:
    outcomes = []
    for number, content in enumerate(HOSTILE_BYTES.values()):
        path = tmp_path / f"file {number}"
        path.write_bytes(content)
        outcomes.append(told(READERS[name], path))
    assert any(outcomes) or name == "answers", "what is no answer is passed over, and asked again"


@fuzzed(80)
@given(value=changed(RECORD))
def test_a_changed_replay_record_is_read_or_costs_one_line(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(value) + "\n")
    told(READERS["replay file"], path)
    rollouts = tmp_path / "run" / "rollouts"
    rollouts.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (rollouts / "step_000001.jsonl").write_text(json.dumps(value) + "\n")
    told(lambda folder: write_report([(None, folder)], out=folder / "report.html"), tmp_path / "run")


@fuzzed(60)
@given(value=changed({"step": 3, "loss": 0.5, "reward_mean": 1.0, "seconds/rollout": 2.0, "reward/accuracy": 0.5}))
def test_changed_metrics_are_drawn_or_cost_one_line(tmp_path: Path, value: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n' + json.dumps(value) + '\n{"step": 9}\n')
    told(lambda folder: write_report([(None, folder)], out=folder / "report.html"), tmp_path)


def test_damaged_tables_are_read_or_cost_one_line(tmp_path: Path) -> None:
    rng = random.Random(3)
    table = pa.Table.from_pylist([{"video": f"{n}.mp4", "options": ["a", "b"], "n": n} for n in range(50)])
    pq.write_table(table, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    outcomes = []
    for name in ("t.parquet", "t.arrow"):
        original = (tmp_path / name).read_bytes()
        for number in range(60):
            data = bytearray(original)
            for _ in range(rng.choice([1, 4, 16])):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path = tmp_path / f"{number}.{name}"
            path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
            outcomes.append(told(lambda path: _all(iter_rows(path, split=None)), path))
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize("name", ["JSON", "run file", "wording", "chat template"])
def test_a_device_or_a_file_without_end_fills_no_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "_most", lambda limit: min(limit, 1 << 16))
    line = told(READERS[name], Path("/dev/zero"))
    assert line is not None and "/dev/zero" in line and "a device" in line
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: a terabyte of NUL
    line = told(READERS[name], path)
    assert line is not None and "sparse" in line and "larger than the" in line


def test_a_line_without_end_is_refused_after_a_bounded_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: a terabyte of NUL in one line
    line = told(READERS["question file"], path)
    assert line is not None and "is longer than the" in line
