"""A run that is finished says so when it is resumed, and only then."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import config_from_values, save_resolved
from megatron_ktr.config.run_length import with_steps
from megatron_ktr.errors import UserError, is_transient
from megatron_ktr.files.checksums import find_damage, write_manifest
from megatron_ktr.run.finished import finished_line, write_finished
from tests.support.failing_files import failing

DONE = dict(train_steps=4, auto_resume=True)


def line(run_dir: Path, *, lacking_sets: Callable[[int], Sequence[str]] = lambda step: (), **values: Any) -> str | None:
    config = config_from_values(dict(model="m", run_dir=str(run_dir), **(DONE | values)))
    return finished_line(config, verify=find_damage, agree=lambda action: action(), lacking_sets=lacking_sets)


def finish(run_dir: Path, *, weights: bytes = b"of step 4", step: int = 4) -> Path:
    export = run_dir / "export"
    export.mkdir(parents=True, exist_ok=True)
    (export / "model.safetensors").write_bytes(weights)
    write_manifest(export)
    save_resolved(config_from_values(dict(model="m", run_dir=str(run_dir), **DONE)), run_dir / "config.yaml")
    write_finished(run_dir, step=step)
    return export


def test_a_finished_run_is_finished_until_it_is_asked_for_more(tmp_path, caplog):
    export = finish(tmp_path / "run")
    said = f"the run is finished: all 4 steps are done, and its export is in {export}"
    assert line(tmp_path / "run") == line(tmp_path / "run", auto_resume=False, resume=True) == said
    assert line(tmp_path / "run", log_interval=7) == said, "what a resumed run may change"
    assert line(tmp_path / "run", auto_resume=False) is None, "refused, as the directory is not empty"
    assert line(tmp_path / "run", train_steps=5) is None
    assert line(tmp_path / "run", lr=0.5) is None, "another run, which is refused later"
    best: dict[str, Any] = dict(keep_best="eval/a/accuracy", eval_interval=2, eval_data=("a.json",))
    assert (
        line(tmp_path / "run", **best)
        == f"{said}; --keep-best eval/a/accuracy changes nothing any more, there is no best.json"
    )
    (tmp_path / "run/best.json").write_text('{"metric": "eval/a/accuracy", "step": 2}')
    assert line(tmp_path / "run", **best) == said
    (tmp_path / "run/best.json").write_text('{"metric": "eval_loss", "step": 2}')
    assert str(line(tmp_path / "run", **best)).endswith("any more, best.json names the best by eval_loss")
    assert not caplog.text


def test_a_run_that_lacks_an_evaluation_of_its_last_step_is_not_finished(tmp_path):
    run_dir, asked = tmp_path / "run", []
    finish(run_dir)

    def lacking(*names: str) -> Callable[[int], Sequence[str]]:
        return lambda step: asked.append(step) or names

    evaluated = dict(eval_data=("questions.jsonl",), eval_interval=4)
    assert line(run_dir, lacking_sets=lacking(), **evaluated) is not None and asked == [4]
    assert line(run_dir, lacking_sets=lacking("a")) is not None, "nothing is asked"
    at_start = evaluated | dict(eval_interval=0, eval_at_start=True)
    assert line(run_dir, lacking_sets=lacking("a"), **at_start) is not None, "of the start alone, which is past"
    (run_dir / "checkpoints/step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="was not evaluated on a, b after step 4, of which it has no checkpoint"):
        line(run_dir, lacking_sets=lacking("a", "b"), **evaluated)
    (run_dir / "checkpoints/step_00000004").mkdir()
    assert line(run_dir, lacking_sets=lacking("a", "b"), **evaluated) is None, "it can be made up for"


def test_an_error_that_may_pass_does_not_make_a_finished_run_export_anew(tmp_path):
    export = finish(tmp_path / "run")
    evaluated = dict(eval_data=("questions.jsonl",), eval_interval=4)
    assert line(tmp_path / "run", **evaluated) is not None
    names = ("finished.json", "config.yaml", "export/checksums.json", "export/model.safetensors")
    for path in (*(tmp_path / "run" / name for name in names), tmp_path / "run/checkpoints"):
        with failing(path, errno.EIO), pytest.raises(UserError) as failed:
            line(tmp_path / "run", **evaluated)
        assert is_transient(failed.value) and str(path) in str(failed.value), path
    assert export.is_dir()


def test_a_run_whose_last_checkpoint_was_taken_away_goes_on_from_an_older_one(tmp_path):
    run_dir = tmp_path / "run"
    finish(run_dir)
    for step in (2, 4):
        (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    assert line(run_dir, save_interval=2) is not None
    (run_dir / "checkpoints" / "step_00000004").rmdir()
    assert line(run_dir, save_interval=2) is None
    assert line(run_dir) is not None, "none of the last step was due: step 2 is of a run that was asked to leave"
    (run_dir / "checkpoints" / "step_00000002").rmdir()
    assert line(run_dir, save_interval=2) is not None, "nothing to go on from"


def test_epochs_are_done_only_while_the_data_are_as_many(tmp_path):
    finish(tmp_path / "run")
    values = dict(model="m", run_dir=str(tmp_path / "run"), replay_path=str(tmp_path / "rollouts.jsonl"))
    epochs = config_from_values(values | dict(train_epochs=2.0, auto_resume=True))
    prompts = epochs.trainer.prompts_per_step

    def line_with(num_records: int) -> str | None:
        config = with_steps(epochs, num_records=num_records)
        return finished_line(config, verify=find_damage, agree=lambda action: action())

    assert finished_line(epochs, verify=find_damage, agree=lambda action: action()) is None, "data are not read yet"
    assert line_with(2 * prompts) is not None
    assert line_with(3 * prompts) is None


def test_only_the_export_of_the_last_step_counts_and_only_whole(tmp_path, caplog):
    run_dir = tmp_path / "run"
    export = finish(run_dir)
    (export / "model.safetensors").write_bytes(b"of step 5")  # a bit has changed
    assert line(run_dir) is None
    assert f"{export} is damaged (model.safetensors: other content than was written)" in caplog.text
    write_manifest(export)  # an export, but not the one that the run has made
    assert line(run_dir) is None
    finish(run_dir)
    assert line(run_dir) is not None
    for hostile in ("", "[]", "{}", '{"step": "4"}', '{"step": true}', "\x00", "[" * 100_000):
        (run_dir / "finished.json").write_text(hostile)
        assert line(run_dir) is None, hostile[:20]
    finish(run_dir)
    shutil.rmtree(export)
    assert line(run_dir) is None
    for content in ('{"step": 4}', '{"step": 4, "checksums": null}'):
        (run_dir / "finished.json").write_text(content)
        assert line(run_dir) is None, "there is no export"
    export.write_text("a file")
    assert line(run_dir) is None
