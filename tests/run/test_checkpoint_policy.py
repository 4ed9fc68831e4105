"""Which checkpoints stay: verified ones count, a damaged one costs no good one its place, a failed save is survived."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import config_from_values, save_resolved
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions
from megatron_ktr.distributed.agreement import raise_on_every_rank
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import TransientError, UserError, is_transient
from megatron_ktr.files import background_check, checksums
from megatron_ktr.files.intact_checkpoint import checkpoint_damage
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import CHECKPOINTS, list_checkpoints, step_name
from megatron_ktr.run.exports import ExportHook, ExportTimes
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.kept import BestCheckpoint, BestStep, open_best, steps_to_remove
from megatron_ktr.run.lease import acquire
from megatron_ktr.run.step_report import StepReport
from tests.run.test_checkpoint import NoData
from tests.support.failing_files import failing
from tests.support.tiny import save_tiny_hf


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "hf"
    save_tiny_hf(out, num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    return out


@pytest.fixture
def policy(one_rank, hf_dir) -> Policy:
    config = config_from_values(dict(model=str(hf_dir), run_dir="unused"))
    return Policy(hf_dir, options=PolicyOptions.of(config), ranks=one_rank, platform=current(), num_steps=4)


def opened(policy: Policy, run_dir: Path, *, best: BestCheckpoint | None = None, **options: Any) -> Checkpoints:
    run_dir.mkdir(exist_ok=True)
    return Checkpoints(
        run_dir,
        policy=policy,
        source=NoData(),
        options=CheckpointOptions(resolved="", save_interval=1, **options),
        best=best,
        incidents=Incidents(run_dir),
    )


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


def incidents(run_dir: Path) -> list[tuple[str, int]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(one["kind"], one["step"]) for one in map(json.loads, lines)]


def damaging(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk loses a bit of the checkpoint of ``step`` after it was published."""
    original = background_check.BackgroundCheck.__init__

    def damaged(self: Any, checkpoint: Path, **options: Any) -> None:
        if checkpoint.name.endswith(f"{step:08d}"):
            file = checkpoint / "__0_0.distcp"
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        original(self, checkpoint, **options)

    monkeypatch.setattr(background_check.BackgroundCheck, "__init__", damaged)


@pytest.mark.parametrize(
    "verified, options, gone",
    [
        ({1, 2, 3, 4}, dict(number=2), [1, 2]),
        ({1, 2, 3, 4}, dict(number=0), []),
        ({3}, dict(number=2), []),
        ({1, 2}, dict(number=1), [1]),
        (set(), dict(number=1), []),
        ({1, 2, 3, 4}, dict(number=1, keep_every=2), [1, 3]),
        ({1, 2, 3, 4}, dict(number=1, best={1}), [2, 3]),
    ],
)
def test_only_older_ones_than_enough_verified_ones_may_go(verified, options, gone):
    assert steps_to_remove([1, 2, 3, 4], verified=verified, **options) == gone


def test_a_damaged_checkpoint_costs_no_good_one_its_place(policy, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    damaging(monkeypatch, 3)
    checkpoints = opened(policy, run_dir, keep_checkpoints=1)
    for step in (1, 2, 3):
        checkpoints.save_and_wait(step)
        checkpoints.close()
    assert steps(run_dir) == [2, 3], "3 is damaged, so 2 is the newest verified one"
    assert incidents(run_dir) == [("damaged_checkpoint", 3)]
    assert checkpoints.counts() == {"damaged_checkpoints": 1.0}
    assert checkpoint_damage(list_checkpoints(run_dir)[0][1]) == []
    missing = checkpoints.missing(3)
    assert "step_00000003 is damaged" in str(missing) and is_transient(missing), "saved anew it may be intact"
    checkpoints.save_and_wait(4)
    checkpoints.close()
    assert steps(run_dir) == [4] and checkpoints.missing(4) is None
    said = [f"saved and verified {run_dir}/checkpoints/step_0000000{step}" for step in (1, 2, 4)]
    assert capsys.readouterr().out.splitlines() == said


def test_a_damaged_candidate_does_not_replace_the_best(policy, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    damaging(monkeypatch, 2)
    best = BestCheckpoint("eval/a/accuracy")
    checkpoints = opened(policy, run_dir, best=best, keep_checkpoints=1)
    for step, value in {1: 0.5, 2: 0.9, 3: 0.4, 4: 0.3}.items():
        checkpoints.after_step(step)
        best.take(step, {best.metric: value})
        checkpoints.after_evaluation(step)
        checkpoints.close()
    assert steps(run_dir) == [1, 4]
    assert json.loads((run_dir / "best.json").read_text())["step"] == 1


def evaluated(checkpoints: Checkpoints, values: dict[int, float], run_dir: Path) -> None:
    best = checkpoints.best
    assert best is not None
    for step, value in values.items():
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, best.metric: value}) + "\n")
        checkpoints.after_step(step)
        best.take(step, {best.metric: value})
        checkpoints.after_evaluation(step)
        checkpoints.close()


def test_a_resumed_run_takes_no_damaged_checkpoint_for_its_best(policy, one_rank, tmp_path, monkeypatch, caplog):
    """Neither one that was found to be damaged, nor one that nobody had read again when the run left."""
    run_dir, metric = tmp_path / "run", "eval/a/accuracy"
    damaging(monkeypatch, 2)
    checkpoints = opened(policy, run_dir, best=BestCheckpoint(metric), keep_checkpoints=1)
    evaluated(checkpoints, {1: 0.5, 2: 0.9, 3: 0.4}, run_dir)
    assert steps(run_dir) == [1, 3]
    shutil.copytree(run_dir / "checkpoints/step_00000001", run_dir / "checkpoints/step_00000002")
    # What cannot be read now may still be the best one: no other one takes its place, or it could be removed later.
    named = (run_dir / "best.json").read_text()
    with failing(run_dir / "checkpoints/step_00000002/common.pt", errno.EIO), pytest.raises(TransientError):
        open_best(run_dir, metric=metric, start_step=3, ranks=one_rank)
    assert (run_dir / "best.json").read_text() == named
    (run_dir / "checkpoints/step_00000002/common.pt").write_bytes(b"")
    again = open_best(run_dir, metric=metric, start_step=3, ranks=one_rank)
    assert again is not None and again.kept == BestStep(1, 0.5) and "step_00000002 is damaged" in caplog.text
    evaluated(opened(policy, run_dir, best=again, keep_checkpoints=1), {4: 0.3}, run_dir)
    assert steps(run_dir) == [1, 4] and json.loads((run_dir / "best.json").read_text())["step"] == 1


def test_a_best_step_that_could_not_be_saved_hides_no_later_one(policy, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    best = BestCheckpoint("eval/a/accuracy")
    checkpoints = opened(policy, run_dir, best=best, keep_checkpoints=1, save_failure="continue")
    evaluated(checkpoints, {1: 0.5}, run_dir)
    with monkeypatch.context() as broken:
        broken.setattr("megatron_ktr.distributed.checkpoint_writer.save_tensor", _fail)
        evaluated(checkpoints, {2: 0.9}, run_dir)
    assert steps(run_dir) == [1]
    evaluated(checkpoints, {3: 0.6, 4: 0.1}, run_dir)
    assert steps(run_dir) == [3, 4] and json.loads((run_dir / "best.json").read_text())["step"] == 3


def test_best_json_that_could_not_be_written_is_written_later(policy, tmp_path, monkeypatch):
    """Until then, the checkpoint that it names stays."""
    run_dir = tmp_path / "run"
    best = BestCheckpoint("eval/a/accuracy")
    checkpoints = opened(policy, run_dir, best=best, keep_checkpoints=1, save_failure="continue")
    evaluated(checkpoints, {1: 0.5, 2: 0.1}, run_dir)
    with monkeypatch.context() as broken:
        broken.setattr("megatron_ktr.run.kept.write_atomically", _fail)
        evaluated(checkpoints, {3: 0.9, 4: 0.1}, run_dir)
    assert steps(run_dir) == [1, 3, 4] and json.loads((run_dir / "best.json").read_text())["step"] == 1
    evaluated(checkpoints, {5: 0.1}, run_dir)
    assert json.loads((run_dir / "best.json").read_text())["step"] == 3
    assert steps(run_dir) == [3, 5]


def test_a_run_that_leaves_saves_a_step_again_whose_checkpoint_is_damaged(policy, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as broken:
        damaging(broken, 1)
        checkpoints = opened(policy, run_dir, keep_checkpoints=1)
        checkpoints.save_and_wait(1)
        checkpoints.close()
    assert checkpoint_damage(list_checkpoints(run_dir)[0][1])
    checkpoints.save_and_wait(1)
    assert checkpoint_damage(list_checkpoints(run_dir)[0][1]) == []


def _fail(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_that_cannot_be_read_again_is_not_verified(policy, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    checkpoints = opened(policy, run_dir, keep_checkpoints=1)
    checkpoints.save_and_wait(1)
    checkpoints.close()

    digest = checksums.file_digest

    def away(path: Path) -> Any:
        if threading.current_thread().name == "checkpoint check":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(checksums, "file_digest", away)
    checkpoints.save_and_wait(2)
    checkpoints.close()
    assert steps(run_dir) == [1, 2] and incidents(run_dir) == [("unverified_checkpoint", 2)]
    missing = checkpoints.missing(2)
    assert is_transient(missing) and "step_00000002 could not be verified" in str(missing), "it may be lost for good"
    saved = (run_dir / CHECKPOINTS / step_name(2)).stat().st_ino
    monkeypatch.undo()
    checkpoints.save_and_wait(2)
    checkpoints.close()
    assert (run_dir / CHECKPOINTS / step_name(2)).stat().st_ino != saved and checkpoints.missing(2) is None
    assert steps(run_dir) == [2], "what is saved again is verified"


def test_every_nth_stays_and_a_resumed_run_counts_what_it_loaded(policy, tmp_path):
    run_dir = tmp_path / "run"
    checkpoints = opened(policy, run_dir, keep_checkpoints=1, keep_every=2)
    for step in (1, 2, 3):
        checkpoints.save_and_wait(step)
        checkpoints.close()
    assert steps(run_dir) == [2, 3]
    # The run ends without waiting for what it saved last; its next part counts only what it has loaded.
    checkpoints.save_and_wait(5)
    checkpoints.close(is_verifying=False)
    assert steps(run_dir) == [2, 3, 5]
    again = opened(policy, run_dir, keep_checkpoints=2, keep_every=2)
    again._verified.add(5)  # as ``load`` does; there is no data to load here
    again.save_and_wait(7)
    again.close()
    assert steps(run_dir) == [2, 5, 7]


@pytest.mark.parametrize("call", ["save_tensor", "save_config"])
def test_a_failed_save_is_survived_counted_and_tried_again(policy, tmp_path, monkeypatch, call):
    run_dir = tmp_path / "run"
    checkpoints = opened(policy, run_dir, keep_checkpoints=1, save_failure="continue")
    checkpoints.after_step(1)
    checkpoints.close()

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"megatron_ktr.distributed.checkpoint_writer.{call}", fail)
        checkpoints.after_step(2)
        checkpoints.close()
        assert steps(run_dir) == [1] and incidents(run_dir) == [("save_failure", 2)]
        assert checkpoints.counts() == {"save_failures": 1.0}
        assert "cannot save step 2" in str(checkpoints.missing(2)) and not is_transient(checkpoints.missing(2))
        # A run that is asked to leave must not say that it has saved.
        with pytest.raises(UserError, match="disk full; the last complete checkpoint is .*step_00000001"):
            checkpoints.save_and_wait(3)
    assert not list((run_dir / "checkpoints").glob(".step_*")), "what was written is no loss, and takes room"
    checkpoints.after_step(4)
    checkpoints.close()
    assert steps(run_dir) == [4] and checkpoints.missing(4) is None


def test_what_may_pass_is_told_from_what_somebody_must_mend(policy, tmp_path, monkeypatch):
    """By every writer that can end a run: a launcher starts the ranks again in the first case."""
    config = config_from_values(dict(model="m", run_dir="unused"))
    best = BestCheckpoint("eval/a/accuracy", kept=BestStep(1, 0.5))
    (tmp_path / "run").mkdir()
    writers: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: opened(policy, tmp_path / "run").save_and_wait(1),
        "export": lambda: policy.save_hf(tmp_path / "run/export"),
        "best.json": lambda: best.write(tmp_path / "run"),
        "lease": lambda: acquire(tmp_path / "run"),
        "config": lambda: save_resolved(config, tmp_path / "run/config.yaml"),
    }
    for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):

        def fail(descriptor: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        for name, write in writers.items():
            with pytest.raises((UserError, OSError)) as failed:
                write()
            assert is_transient(failed.value) == (code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)), (name, code)
            assert code != errno.EDQUOT or "quota" in str(failed.value), f"{name}: a quota is no full disk"
            with pytest.raises((UserError, OSError)) as told:
                raise_on_every_rank(failed.value, group=None)
            assert is_transient(told.value) == is_transient(failed.value), "what the other ranks hear"


def test_exports_during_a_run_load_and_a_failed_one_is_survived(policy, tmp_path, monkeypatch, caplog):
    from transformers import Qwen2_5_VLForConditionalGeneration

    def hook(on_failure: str) -> ExportHook:
        return ExportHook(
            tmp_path,
            policy=policy,
            times=ExportTimes(2, num_steps=6),
            on_failure=on_failure,
            incidents=Incidents(tmp_path),
        )

    def report(step: int) -> StepReport:
        return StepReport(step, {}, (), lambda: ())

    going_on = hook("continue")
    for step in (1, 2, 6):
        assert going_on.after_step(report(step)) is None
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step_00000002"], "6 is the end's own"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "exports/step_00000002")
    ours = dict(policy.export())
    assert (model.lm_head.weight == ours["lm_head.weight"]).all()

    # Step 2 is there already, so it cannot be written again.
    twice = report(2)
    going_on.after_step(twice)
    assert twice.values == {"export_failures": 1.0} and incidents(tmp_path) == [("export_failure", 2)]
    with pytest.raises(UserError, match="already exists"):
        hook("stop").after_step(report(2))
    shutil.rmtree(tmp_path / "exports")
