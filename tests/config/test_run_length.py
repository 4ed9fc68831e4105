"""Runs of a number of epochs: how many steps they are, what those draw, and that they train as runs of those steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.config import config_from_values, load_config
from megatron_ktr.config.run_length import length_line, steps_of_epochs, with_steps
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import open_run_directory
from megatron_ktr.train import train
from megatron_ktr.types import Prompt
from tests.support.replayed import replay_values


@pytest.mark.parametrize(
    ("epochs", "num_records", "prompts", "expected"),
    [
        (1.0, 16000, 8, 2000),  # the paper's run
        (1.0, 16001, 8, 2001),  # one record more: a step more
        (2.0, 10, 4, 5),  # 20 prompts
        (1.0, 3, 4, 1),
        (0.5, 10, 4, 2),  # 5 prompts
        (0.7, 10, 1, 7),  # in floating point 7.000000000000001, which would be 8
        (1.1, 100, 10, 11),  # 11.000000000000002
        (1e-6, 10, 4, 1),
    ],
)
def test_epochs_come_to_so_many_steps(epochs: float, num_records: int, prompts: int, expected: int) -> None:
    assert steps_of_epochs(epochs, num_records=num_records, prompts_per_step=prompts) == expected


class LoaderOfIds:
    """Prompts that are nothing but the ids of their records; those named are unusable."""

    counts: Counter[str] = Counter()

    def __init__(self, unusable: tuple[int, ...]) -> None:
        self.unusable = unusable

    def load(self, record: dict[str, Any]) -> Prompt:
        if record["id"] in self.unusable:
            raise UnusableSample(str(record["id"]), "made to be")
        return Prompt(record["id"], ())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("unusable", [(), (3, 7)])
def test_an_epoch_draws_every_usable_record_in_every_layout(size: int, unusable: tuple[int, ...]) -> None:
    """13 records, 4 a step: 4 steps of 16 prompts. Without skips they are the same prompts whatever the layout."""
    records = [{"id": number} for number in range(13)]
    steps = steps_of_epochs(1.0, num_records=13, prompts_per_step=4)
    replicas = [
        PromptDataset(
            records, loader=LoaderOfIds(unusable), seed=5, rank=rank, size=size, skips=SkipCounter(max_skip_share=1.0)
        )
        for rank in range(size)
    ]
    drawn = Counter(
        prompt.problem_id for _ in range(steps) for replica in replicas for prompt in replica.next(4 // size)
    )
    assert steps == 4 and drawn.total() == 16
    assert set(drawn) == set(range(13)) - set(unusable)
    if not unusable:
        assert sorted(drawn.values()) == [1] * 10 + [2] * 3, "three more than an epoch, from the next one"


def test_records_left_out_beforehand_make_an_epoch_shorter() -> None:
    records = [{"id": number} for number in range(13)]
    dataset = PromptDataset(records, loader=LoaderOfIds(()), left_out={3, 7, 8})
    steps = steps_of_epochs(2.0, num_records=dataset.num_kept, prompts_per_step=4)
    drawn = Counter(prompt.problem_id for _ in range(steps) for prompt in dataset.next(4))
    assert steps == 5 and drawn == {number: 2 for number in range(13) if number not in (3, 7, 8)}


def flags(*more: str) -> list[str]:
    return ["--model", "m", "--engine", "hf", "--data-path", "d.json", *more]


def test_a_run_has_steps_or_epochs(tmp_path: Path) -> None:
    assert load_config(flags()).trainer.train_steps == 1000
    epochs = load_config(flags("--train-epochs", "1.5")).trainer
    assert (epochs.train_steps, epochs.train_epochs) == (None, 1.5)
    with pytest.raises(UserError, match="--train-steps and --train-epochs both say"):
        load_config(flags("--train-epochs", "1", "--train-steps", "1000"))
    (tmp_path / "run.yaml").write_text("trainer: {train_epochs: 1}")
    file = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(UserError, match="--train-epochs none"):
        load_config([*file, *flags("--train-steps", "3")])
    assert load_config([*file, *flags("--train-steps", "3", "--train-epochs", "none")]).trainer.train_steps == 3
    for wrong in ("0", "-1", "nan", "inf", "1e7", "two"):
        with pytest.raises(UserError, match="--train-epochs"):
            load_config(flags("--train-epochs", wrong))


def test_rules_about_the_length_hold_for_epochs_too() -> None:
    config = load_config(flags("--train-epochs", "1", "--prompts-per-step", "8", "--lr-warmup-steps", "3"))
    assert with_steps(config, num_records=17).trainer.train_steps == 3
    with pytest.raises(UserError, match="--lr-warmup-steps 3 exceeds the 2 optimizer steps"):
        with_steps(config, num_records=16)
    line = (
        "1 epochs x 17 records / 8 prompts a step = 3 steps, rounded up: 7 of the last step's prompts are from beyond"
    )
    assert length_line(config, num_records=17) == line
    assert length_line(config, num_records=16) == "1 epochs x 16 records / 8 prompts a step = 2 steps"
    given = load_config(flags("--train-steps", "7"))
    assert with_steps(given, num_records=16) is given and length_line(given, num_records=16) == ""


# The training command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/``, ``rollouts.jsonl`` and ``responses.jsonl``: six text questions, recorded or to be imitated."""
    folder = tmp_path_factory.mktemp("length")
    save_tiny_model(folder / "model", corpus=corpus(), hidden_size=32, ffn_size=64, num_layers=2, vision_hidden_size=32)
    words = corpus()[0].split()
    recorded, imitated = [], []
    for number in range(6):
        record = {"problem_id": str(number), "problem": "red"}
        responses = [{"text": " ".join(words[k : k + 4]), "reward": (number + k) % 3} for k in range(3)]
        recorded.append({**record, "responses": responses})
        imitated.append({**record, "response": words[number]})
    for name, records in (("rollouts", recorded), ("responses", imitated)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def values(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return replay_values(inputs, run_dir, **({"prompts_per_step": 4} | changes))


def run_all(context: Any, *, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train(config_from_values(run))


def metrics(run_dir: Path) -> list[tuple[float, ...]]:
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(step[name] for name in ("step", "loss", "grad_norm", "learning_rate")) for step in steps]


@pytest.mark.slow
def test_a_run_of_epochs_is_the_run_of_so_many_steps(ranks, inputs, tmp_path) -> None:
    """On two replicas, with the schedule of the learning rate; resumed to more epochs as to more steps. Supervised
    runs count their own records."""
    sft = {"objective": "sft", "replay_path": None, "data_path": str(inputs / "responses.jsonl")}
    epochs, steps = {"train_epochs": 1.5}, {"train_steps": 3}
    lengths = {"epochs": epochs, "steps": steps, "sft": {**epochs, **sft}}
    run = {name: values(inputs, tmp_path / name, save_interval=3, **changes) for name, changes in lengths.items()}
    more = [
        {**run["epochs"], "resume": True, "train_epochs": 3.0},
        {**run["steps"], "resume": True, "train_steps": 5},
    ]
    ranks(run_all, world_size=2, runs=[*run.values(), *more])
    assert len(metrics(tmp_path / "steps")) == 5 and len(metrics(tmp_path / "sft")) == 3
    assert metrics(tmp_path / "epochs") == metrics(tmp_path / "steps"), "bit for bit"
    given = load_config(["--config", str(tmp_path / "sft" / "config.yaml")]).trainer
    assert (given.train_steps, given.train_epochs) == (None, 1.5)
    shorter = config_from_values({**run["epochs"], "resume": True})
    with pytest.raises(UserError, match="--train-epochs 1.5, 3 steps: the run is at step 5 already"):
        open_run_directory(shorter, num_steps=3)


def refused(context: Any, *, runs: list[tuple[dict[str, Any], str]]) -> None:
    """On every rank the same error, and no run directory, in which the next try would find files in its way."""
    for run, reason in runs:
        with pytest.raises(UserError, match=reason):
            train(config_from_values(run))
        torch.distributed.barrier()
        assert not Path(run["run_dir"]).exists()


def test_what_data_show_to_be_wrong_is_refused_before_anything_is_made(ranks, inputs, tmp_path) -> None:
    warm = values(inputs, tmp_path / "warm", train_epochs=1.0, lr_warmup_steps=3)
    missing = values(inputs, tmp_path / "missing", replay_path=str(inputs / "none.jsonl"))
    runs = [(warm, "--lr-warmup-steps 3 exceeds the 2 optimizer steps"), (missing, "none.jsonl cannot be read")]
    ranks(refused, world_size=2, runs=runs)
