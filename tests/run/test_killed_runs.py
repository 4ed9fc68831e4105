"""A run that is killed at a bad moment, and started again, is the run that was never killed: to the last bit.

What SIGKILL leaves is what is in the files at that moment, so the moments are photographed: the run directory is copied
while one uninterrupted run is in the middle of something, and each copy is then resumed. The run samples one step ahead
from a mixture, with a data worker, and rejects groups. Kills at random moments are in ``tests/faults``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ktr.config.data_sources import DataSource
from megatron_ktr.run import checkpoint, kept
from megatron_ktr.run.metrics import MetricsWriter
from megatron_ktr.train import train
from tests.run.test_online_training import LOGGED, RUN_STEPS, _reproducible, rollout_lines, settings
from tests.run.test_online_training import inputs as inputs  # a fixture

KILLED_AT = 3
"""The step whose checkpoint is being written, or whose predecessor's is being removed, when the run is killed."""
HALF = "__0_0.distcp"


def cut(path: Path) -> None:
    """As it is in the middle of writing."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def tear_last_line(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')


def lose_half(run_dir: Path) -> None:
    """As it is in the middle of a removal."""
    (doomed,) = run_dir.glob("checkpoints/.step_*.removed")
    (doomed / HALF).unlink()


MOMENTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tensors half written": ("manifest", lambda run_dir: cut(run_dir / f"checkpoints/.step_0000000{KILLED_AT}" / HALF)),
    "before the manifest": ("manifest", lambda run_dir: None),
    "manifest half written": (
        "rename",
        lambda run_dir: cut(run_dir / f"checkpoints/.step_0000000{KILLED_AT}/checksums.json"),
    ),
    "before the rename": ("rename", lambda run_dir: None),
    "after the rename": ("published", lambda run_dir: None),
    "in a removal": ("removal", lose_half),
    "in the record of a step": ("record", tear_last_line),
}
"""By what was happening: the photograph, and what is done to it."""


def photographed(run_dir: Path, out: Path, *, run: Callable[[], Any]) -> None:
    """Calls ``run``, and copies its directory at each of the moments, as ``out/<photograph>``."""
    write_manifest, sync, rmtree, write = checkpoint.write_manifest, checkpoint.sync, shutil.rmtree, MetricsWriter.write

    def take(name: str) -> None:
        if not (out / name).exists():
            shutil.copytree(run_dir, out / name)

    def at_manifest(directory: Path, **options: Any) -> None:
        is_it = directory.name == f".step_{KILLED_AT:08d}"
        if is_it:
            take("manifest")
        write_manifest(directory, **options)
        if is_it:
            take("rename")

    def at_sync(path: Path) -> None:
        if (path / f"step_{KILLED_AT:08d}").exists():
            take("published")
        sync(path)

    def at_removal(path: Path, **options: Any) -> None:
        if path.name.endswith(".removed"):
            take("removal")
        rmtree(path, **options)

    def at_record(self: MetricsWriter, step: int, values: Any) -> None:
        if step == KILLED_AT:
            take("record")
        write(self, step, values)

    with (
        mock.patch.object(checkpoint, "write_manifest", at_manifest),
        mock.patch.object(checkpoint, "sync", at_sync),
        mock.patch.object(kept.shutil, "rmtree", at_removal),
        mock.patch.object(MetricsWriter, "write", at_record),
    ):
        run()


def run_and_resume_all(context, *, inputs: Path, out: Path) -> None:
    records = str(inputs / "data" / "train.json")
    media_root = str(inputs / "data")
    changes = {
        **LOGGED,
        "train_steps": RUN_STEPS,
        "save_interval": 1,
        "keep_checkpoints": 1,
        "lag": 1,
        "data_workers": 1,
        "data_path": (
            DataSource(records, weight=3.0, name="many", media_root=media_root),
            DataSource(records, weight=1.0, name="few", media_root=media_root, reward_functions=("format", UNEVEN)),
        ),
        "filter_groups": "equal",
        "min_reward_spread": 0.5,
        "filter_max_rounds": 2,
        "auto_resume": True,
    }
    whole = out / "whole"
    photographed(whole, out / "photographs", run=lambda: train(settings(inputs, whole, **changes)))
    for number, (photograph, harm) in enumerate(MOMENTS.values()):
        run_dir = out / str(number)
        shutil.copytree(out / "photographs" / photograph, run_dir)
        harm(run_dir)
        assert train(settings(inputs, run_dir, **changes)) == 0


UNEVEN = "tests.run.test_online_training:uneven_reward"


@pytest.fixture(scope="module")
def runs(ranks, inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    ranks(run_and_resume_all, world_size=1, inputs=inputs, out=out)
    return out


def test_the_uninterrupted_run_has_what_makes_resuming_hard(runs):
    steps = _reproducible(runs / "whole")
    assert [step["step"] for step in steps] == list(range(1, RUN_STEPS + 1))
    assert any(step["filter/rejected"] for step in steps), "groups are rejected"
    assert steps[-1]["source/few"] > 0 and all(step["has_stepped"] for step in steps[1:])
    assert steps[-1]["sampler_trainer_logprob_gap"] > 1e-3, "one step ahead"
    found = {path.name for path in (runs / "photographs").iterdir()}
    assert found == {photograph for photograph, _ in MOMENTS.values()}


@pytest.mark.parametrize("number", range(len(MOMENTS)), ids=MOMENTS)
def test_a_run_killed_there_and_started_again_is_the_uninterrupted_one(runs, number):
    whole, resumed = runs / "whole", runs / str(number)
    assert _reproducible(resumed) == _reproducible(whole)
    every = range(1, RUN_STEPS + 1)
    assert rollout_lines(resumed, steps=every, world_size=1) == rollout_lines(whole, steps=every, world_size=1)
    for file in ("export/model.safetensors", f"checkpoints/step_{RUN_STEPS:08d}/{HALF}"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    names = {path.name for path in (resumed / "checkpoints").iterdir()}
    assert names == {f"step_{RUN_STEPS:08d}"}, "nothing half done is left, and keep_checkpoints is 1"
    assert not (resumed / "lease.json").exists()
