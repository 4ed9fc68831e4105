"""A resumed run has the records and the wording of the one that saved; their place on disk may change."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.records import read_records, record_digest
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.source import DatasetSource
from megatron_ktr.data.template import WordingTemplate
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.replay import ReplayEngine
from tests.support.tokenizer import tiny_tokenizer

RECORDS: list[dict[str, Any]] = [
    {
        "problem_id": number,
        "problem": f"What is in {number}?",
        "problem_type": "OCR" if number % 2 else "free-form",
        "path": f"./clips/{number}.mp4",
        "solution": "red",
        "responses": [{"text": "red", "reward": 1.0}],
    }
    for number in range(4)
]


def dataset_of(folder: Path, records: list[dict[str, Any]], *, wording: str = "w", **options: Any) -> PromptDataset:
    path = folder / f"{random.Random(repr(records)).random()}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    loader = SimpleNamespace(counts=Counter(), wording_digest=wording)
    return PromptDataset(read_records(path, **options), loader=loader)


def changed(number: int, **fields: Any) -> list[dict[str, Any]]:
    return [record | fields if index == number else record for index, record in enumerate(RECORDS)]


@pytest.mark.parametrize(
    "records",
    [
        changed(2, problem="What is in 2 ?"),
        changed(3, solution="blue"),
        changed(1, path="./clips/9.mp4"),
        changed(0, responses=[{"text": "blue", "reward": 1.0}]),
        changed(0, responses=[{"text": "red", "reward": 0.0}]),
        changed(0, fps=2),
        RECORDS[::-1],
    ],
    ids=["question", "solution", "video", "response", "reward", "another field", "order"],
)
def test_other_records_of_the_same_number_are_refused(tmp_path, records):
    state = json.loads(json.dumps(dataset_of(tmp_path, RECORDS).state_dict()))
    dataset_of(tmp_path, RECORDS).load_state_dict(state)
    with pytest.raises(UserError, match="the 4 records are not those of the saved run"):
        dataset_of(tmp_path, records).load_state_dict(state)


def test_moved_media_another_layout_of_the_file_and_records_left_out_are_the_same_run(tmp_path):
    whole = dataset_of(tmp_path, RECORDS, problem_types=["OCR"])
    state = whole.state_dict()
    moved = [record | {"path": "/scratch" + record["path"][1:]} for record in RECORDS]
    dataset_of(tmp_path, moved, problem_types=["OCR"]).load_state_dict(state)
    # What --problem-types leaves out is not drawn, whatever it says.
    dataset_of(tmp_path, changed(2, problem="another"), problem_types=["OCR"]).load_state_dict(state)
    with pytest.raises(UserError, match="not those of the saved run"):
        dataset_of(tmp_path, changed(3, problem="another"), problem_types=["OCR"]).load_state_dict(state)
    assert record_digest({"a": 1, "b": 2}) == record_digest({"b": 2, "a": 1})
    parts = {"messages": [{"role": "user", "content": [{"type": "video", "video": "a/b.mp4"}]}]}
    other = {"messages": [{"role": "user", "content": [{"type": "video", "video": "c\\b.mp4"}]}]}
    assert record_digest(parts) == record_digest(other)


def test_records_are_compared_in_another_layout_too_and_not_with_old_checkpoints(tmp_path, caplog):
    state = dataset_of(tmp_path, RECORDS).state_dict()
    resharded = reshard_states([state], rank=0, size=2)
    with pytest.raises(UserError, match="not those of the saved run"):
        half = dataset_of(tmp_path, changed(0, problem="another"))
        half.size = 2
        half.load_state_dict(resharded)
    old = {name: value for name, value in state.items() if not name.endswith("_digest")}
    source = DatasetSource(dataset_of(tmp_path, changed(0, problem="another")))
    source.require_same(old)  # once for the run, before its directory is changed
    source.load_state_dict(old)  # by every replica
    assert caplog.text.count("does not say which records") == 1


def test_another_wording_is_refused(tmp_path):
    state = dataset_of(tmp_path, RECORDS, wording="one").state_dict()
    with pytest.raises(UserError, match="--prompt-template is not the text of the saved run"):
        dataset_of(tmp_path, RECORDS, wording="another").load_state_dict(state)
    assert WordingTemplate().text.strip()


def test_recorded_responses_keep_their_digest_and_it_is_not_recorded_again(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(RECORDS[0]))
    engine = ReplayEngine(path, tokenizer=tiny_tokenizer(), vocab_size=199)
    assert engine.records[0]["record_digest"] == record_digest(RECORDS[0])
