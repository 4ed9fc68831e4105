"""The directory of a run: it is made, continued, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ktr.config import Config, save_resolved
from megatron_ktr.errors import UserError
from megatron_ktr.report.run_data import read_run
from megatron_ktr.run import directory
from megatron_ktr.run.directory import open_run_directory, step_name
from tests.run.test_checkpoint import data_dir as data_dir  # a fixture
from tests.run.test_checkpoint import run_config
from tests.support.tiny import save_tiny_hf


def fake_checkpoint(run_dir: Path, config: Config, step: int) -> Path:
    path = run_dir / "checkpoints" / step_name(step)
    (path / "hf").mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt", "training.json"):
        (path / name).write_text("{}")
    save_resolved(config, path / "config.yaml")
    shutil.copy(Path(config.model.model) / "config.json", path / "hf")
    return path


def test_resume_takes_the_newest_complete_checkpoint(data_dir, tmp_path):
    config = run_config(data_dir, tmp_path / "run")
    open_run_directory(config)
    fake_checkpoint(tmp_path / "run", config, 1)
    newest = fake_checkpoint(tmp_path / "run", config, 2)
    (fake_checkpoint(tmp_path / "run", config, 3) / ".metadata").unlink()
    (tmp_path / "run/export").mkdir()
    partial = [tmp_path / "run/.export.partial-1", tmp_path / "run/exports/.step_00000001.partial-1"]
    for left in partial:  # a run died while it exported
        left.mkdir(parents=True)
    start = open_run_directory(run_config(data_dir, tmp_path / "run", resume=True, train_steps=9, log_interval=3))
    assert (start.checkpoint, start.step) == (newest, 2)
    assert (tmp_path / "run/export_until_step_00000002").is_dir()
    assert not any(left.exists() for left in partial)


def test_an_export_has_the_name_of_the_step_that_it_was_made_after(data_dir, tmp_path):
    """The run goes on from an older step than that, because the newest checkpoint is damaged."""
    run_dir = tmp_path / "run"
    config = run_config(data_dir, run_dir)
    open_run_directory(config)
    fake_checkpoint(run_dir, config, 2)
    (fake_checkpoint(run_dir, config, 4) / ".metadata").unlink()
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)))
    (run_dir / "export").mkdir()
    assert open_run_directory(run_config(data_dir, run_dir, resume=True)).step == 2
    assert (run_dir / "export_until_step_00000004").is_dir() and not (run_dir / "export").exists()


def test_what_a_start_was_writing_when_it_died_is_not_kept(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    open_run_directory(run_config(data_dir, run_dir))
    for name in ("checkpoints/.step_00000001", "exports/.step_00000001.partial-7", "rollouts"):
        (run_dir / name).mkdir(parents=True)
    open_run_directory(run_config(data_dir, run_dir, auto_resume=True))
    assert (run_dir / "abandoned_start/rollouts").is_dir()
    assert not list(run_dir.rglob(".step_*"))


def test_a_start_that_died_before_it_had_its_config_is_begun_anew(data_dir, tmp_path, monkeypatch):
    """While it wrote config.yaml, or while it moved the files of an earlier start aside."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".config.yaml.7").write_text("trainer:")
    again = run_config(data_dir, run_dir, auto_resume=True)
    open_run_directory(again)
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    for name in ("best.json", "metrics.jsonl"):
        (run_dir / name).touch()
    moves, rename = [], directory.rename_path

    def rename_once(path, target):
        if moves:
            raise UserError("killed")
        moves.append(path)
        rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="killed"):
        patched.setattr(directory, "rename_path", rename_once)
        open_run_directory(again)
    open_run_directory(again)
    (run_dir / "config.yaml").unlink()
    (run_dir / ".config.yaml.7").write_text("trainer:")
    open_run_directory(again)
    assert sorted(path.name for path in run_dir.rglob("*") if path.is_file()) == [
        "best.json",
        *["config.yaml"] * 2,
        "metrics.jsonl",
    ]
    (run_dir / "config.yaml").rename(run_dir / "notes")
    with pytest.raises(UserError, match="is not empty"):
        open_run_directory(again)


def test_what_a_user_has_put_there_is_neither_moved_nor_removed(data_dir, tmp_path):
    """Not even where a file is called ``config.yaml``, or like one that a run was writing."""
    run_dir = tmp_path / "run"
    again = run_config(data_dir, run_dir, auto_resume=True)
    run_dir.mkdir()
    theirs = ("thesis.tex", ".notes.2024", "export_of_mine/a", "abandoned_start_notes")
    for name in theirs:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("precious")
    for content in ("name: thesis", "trainer: {run_dir: here, auto_resume: true}", "[", "- 1", "\x00", ""):
        (run_dir / "config.yaml").write_text(content)
        with pytest.raises(UserError, match="is not empty"):
            open_run_directory(again)
        assert (run_dir / "config.yaml").read_text() == content
    (run_dir / "config.yaml").unlink()
    save_resolved(again, run_dir / "config.yaml", notes=["of the data"])
    (run_dir / "metrics.jsonl").touch()
    open_run_directory(again)
    assert all((run_dir / name).read_text() == "precious" for name in theirs)
    assert sorted(path.name for path in (run_dir / "abandoned_start").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_resuming_twice_at_one_step_overwrites_no_config(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    open_run_directory(run_config(data_dir, run_dir))
    fake_checkpoint(run_dir, run_config(data_dir, run_dir), 2)
    for log_interval in (7, 8, 9):
        open_run_directory(run_config(data_dir, run_dir, resume=True, log_interval=log_interval))
    for suffix, log_interval in (("", 7), ("_2", 8), ("_3", 9)):
        assert f"log_interval: {log_interval}\n" in (run_dir / f"config_from_step_00000003{suffix}.yaml").read_text()


def test_rollouts_after_the_resumed_step_are_moved_aside_and_never_overwritten(data_dir, tmp_path):
    """The new branch may record other steps: a file of the abandoned one would pass for this run's last."""
    run_dir = tmp_path / "run"
    open_run_directory(run_config(data_dir, run_dir))
    fake_checkpoint(run_dir, run_config(data_dir, run_dir), 2)
    (run_dir / "rollouts").mkdir()
    for name in ("step_00000002", "step_00000002_2", "step_00000004", "step_00000004_2"):
        (run_dir / "eval" / name).mkdir(parents=True)

    def record(step: int, text: str) -> None:
        (run_dir / "rollouts" / f"{step_name(step)}.jsonl").write_text(text)

    def recorded() -> dict[str, str]:
        files = (run_dir / "rollouts").rglob("*.jsonl")
        return {str(path.relative_to(run_dir / "rollouts")): path.read_text() for path in files}

    def resume() -> None:
        open_run_directory(run_config(data_dir, run_dir, resume=True))

    record(2, "kept")
    resume()
    assert recorded() == {"step_00000002.jsonl": "kept"} and len(list((run_dir / "rollouts").iterdir())) == 1
    record(3, "first branch")
    record(4, "first branch")
    resume()
    record(3, "second branch")
    resume()
    aside = "abandoned_after_step_00000002"
    assert recorded() == {
        "step_00000002.jsonl": "kept",
        f"{aside}/step_00000003.jsonl": "first branch",
        f"{aside}/step_00000004.jsonl": "first branch",
        f"{aside}_2/step_00000003.jsonl": "second branch",
    }
    of_eval = {str(path.relative_to(run_dir / "eval")) for path in (run_dir / "eval").glob("**/step_*")}
    assert of_eval == {"step_00000002", "step_00000002_2", f"{aside}/step_00000004", f"{aside}/step_00000004_2"}
    (run_dir / "metrics.jsonl").write_text("")
    assert [step for step, _ in read_run(run_dir).rollout_files] == [2], "reports show this branch alone"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(objective="video_ktr"), "--objective was grpo"),
        (dict(lr=1e-4), "--lr was 0.001"),
        (dict(freeze=("vision",)), "--freeze was empty"),
        (dict(use_distributed_optimizer=False), "--use-distributed-optimizer was True"),
        (dict(train_steps=1), "--train-steps 1: the run is at step 2 already"),
    ],
)
def test_resume_refuses_what_would_make_it_another_run(data_dir, tmp_path, change, message):
    config = run_config(data_dir, tmp_path / "run")
    fake_checkpoint(tmp_path / "run", config, 2)
    with pytest.raises(UserError, match=message):
        open_run_directory(run_config(data_dir, tmp_path / "run", resume=True, **change))


def test_resume_without_a_checkpoint_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_run_directory(run_config(data_dir, tmp_path / "run", resume=True))


def test_resume_refuses_another_model(data_dir, tmp_path):
    fake_checkpoint(tmp_path / "run", run_config(data_dir, tmp_path / "run"), 2)
    save_tiny_hf(tmp_path / "other", num_layers=1, vision_depth=1)
    with pytest.raises(UserError, match="differs from the one of the model"):
        open_run_directory(run_config(data_dir, tmp_path / "run", resume=True, model=str(tmp_path / "other")))
