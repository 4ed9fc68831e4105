"""Damaged checkpoints: found whatever the place, named, set aside, and never used while an older one is intact."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import EXIT_TRANSIENT, EXIT_USER, TransientError, UserError, is_transient, run_cli
from megatron_ktr.files.checksums import MANIFEST, file_digest, find_damage, require_intact, write_manifest
from megatron_ktr.files.intact_checkpoint import checkpoint_damage, newest_intact
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.checkpoint_actions import CheckpointActions
from megatron_ktr.run.directory import find_checkpoint, list_checkpoints
from models.qwen2_5_vl.dist_checkpoint import convert_to_hf, convert_to_megatron
from tests.run.test_checkpoint import NoData, step_on_noise
from tests.support.commands import run_tool
from tests.support.failing_files import failing
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import save_tiny_hf


@dataclass(frozen=True)
class Saved:
    """A run with two checkpoints of two ranks, its export, and a converted checkpoint."""

    config: Config
    run_dir: Path
    converted: Path

    @property
    def checkpoints(self) -> list[Path]:
        return [path for _, path in list_checkpoints(self.run_dir)]


def save_twice(context, *, hf_dir: Path, config: Config) -> None:
    policy = Policy(
        hf_dir, options=PolicyOptions.of(config), ranks=context.init(ParallelSizes()), platform=current(), num_steps=4
    )
    run_dir = Path(config.trainer.run_dir)
    checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions.of(config))
    for step in (1, 2):
        step_on_noise(policy, step)
        checkpoints.save_and_wait(step)
    policy.save_hf(run_dir / "export")


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("damage")
    save_tiny_hf(folder / "hf", num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    config = config_from_values(dict(model=str(folder / "hf"), run_dir=str(folder / "run"), resume=True, lr=1e-3))
    ranks(save_twice, world_size=2, hf_dir=folder / "hf", config=config)
    convert_to_megatron(folder / "hf", folder / "converted")
    return Saved(config, folder / "run", folder / "converted")


def damage_at_random(directory: Path, rng: random.Random) -> tuple[set[str], Callable[[], None]]:
    """Damages one file, or swaps two; their names, and what puts everything back."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = rng.choice(files)
    content = path.read_bytes()
    kind = rng.choice(["flip a bit", "flip 40 bytes", "cut", "empty", "delete", "swap", "append"])
    place = rng.randrange(len(content))
    touched = {path: content}
    if kind == "flip a bit":
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    elif kind == "flip 40 bytes":
        flipped = bytes(byte ^ 0xFF for byte in content[place : place + 40])
        path.write_bytes(content[:place] + flipped + content[place + 40 :])
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(content + b"\0")
    else:
        other = rng.choice([one for one in files if one.read_bytes() != content])
        touched[other] = other.read_bytes()
        path.write_bytes(touched[other])
        other.write_bytes(content)

    def restore() -> None:
        for one, before in touched.items():
            one.write_bytes(before)

    return {one.relative_to(directory).as_posix() for one in touched}, restore


def test_200_random_damages_are_all_named_and_the_older_checkpoint_is_taken(saved):
    older, newest = saved.checkpoints
    rng, hit = random.Random(0), set()
    for number in range(200):
        names, restore = damage_at_random(newest, rng)
        verdict = newest_intact(saved.checkpoints, verify=checkpoint_damage)
        assert verdict.intact == older, (number, names)
        ((path, damage),) = verdict.damaged
        # Of two swapped files one is named; where one of these is the list of checksums, it is that.
        assert path == newest and damage.file in names, (number, names, damage)
        hit |= names
        restore()
    assert newest_intact(saved.checkpoints, verify=checkpoint_damage).intact == newest, "put back"
    everything = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert hit == everything and len(everything) >= 9, "every file was damaged at least once"


def test_converted_checkpoints_and_exports_are_verified_before_they_are_used(saved, tmp_path):
    rng = random.Random(1)
    uses = {
        saved.converted: lambda: convert_to_hf(saved.converted, tmp_path / "hf"),
        saved.run_dir / "export": lambda: convert_to_megatron(saved.run_dir / "export", tmp_path / "megatron"),
    }
    for directory, use in uses.items():
        assert require_intact(directory, option="--model") and find_damage(directory) == []
        for number in range(40):
            names, restore = damage_at_random(directory, rng)
            if (directory / MANIFEST).exists():  # Without it a directory may be anybody's.
                with pytest.raises(UserError) as error:
                    use()
                text = str(error.value)
                assert any(f"{directory} is damaged: {name}: " in text for name in names), (number, names, text)
                assert "\n" not in text
            restore()
        use()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}, "nothing was left by those that failed"


def test_checksums_are_those_of_the_files_and_of_nothing_else(saved):
    """Large files were hashed in memory, on their way out: both must come to the same."""
    for directory in (*saved.checkpoints, saved.converted, saved.run_dir / "export"):
        stored = json.loads((directory / MANIFEST).read_text())["files"]
        found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        assert stored.keys() == found.keys() - {MANIFEST}
        for name, entry in stored.items():
            digest = file_digest(found[name])
            assert (entry["bytes"], entry["digest"]) == (digest.num_bytes, digest.value), name


def test_a_digest_is_of_what_was_to_be_written_not_of_what_the_disk_made_of_it(tmp_path):
    class Disk:
        """Loses a bit on the way."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            return self.file.write(bytes([data[0] ^ 1]) + bytes(data[1:]))

    from megatron_ktr.files.checksums import HashingFile

    with open(tmp_path / "a.distcp", "wb") as opened:
        file = HashingFile(Disk(opened))
        file.write(b"weights")
    write_manifest(tmp_path, known={"a.distcp": file.digest})
    assert [str(damage) for damage in find_damage(tmp_path)] == ["a.distcp: other content than was written"]


def test_damaged_checkpoints_are_set_aside_and_said_and_nothing_is_deleted(saved, tmp_path, caplog):
    shutil.copytree(saved.run_dir, tmp_path / "run")
    config = config_from_values(dict(model="m", run_dir=str(tmp_path / "run"), auto_resume=True))
    newest = tmp_path / "run/checkpoints/step_00000002"
    (newest / "training.json").unlink()
    assert find_checkpoint(config) == newest.with_name("step_00000001")
    assert "step_00000002 is damaged (training.json: missing): set aside as damaged_step_00000002" in caplog.text
    assert (
        len(list(newest.with_name("damaged_step_00000002").iterdir())) == len(list(saved.checkpoints[1].iterdir())) - 1
    )
    caplog.clear()
    assert find_checkpoint(config) == newest.with_name("step_00000001") and not caplog.text, "once"
    # The next damage goes beside it, and where nothing is intact, nothing is touched.
    shutil.copytree(newest.with_name("damaged_step_00000002"), newest)
    assert find_checkpoint(config) is not None and newest.with_name("damaged_step_00000002_2").is_dir()
    (newest.with_name("step_00000001") / "__0_0.distcp").write_bytes(b"")
    before = sorted(path.name for path in newest.parent.iterdir())
    with pytest.raises(UserError, match=r"no checkpoint .* is intact \(step_00000001: __0_0.distcp: 0 bytes"):
        find_checkpoint(config)
    assert sorted(path.name for path in newest.parent.iterdir()) == before


def test_a_checkpoint_of_a_version_without_checksums_is_used_and_said(saved, tmp_path, caplog):
    shutil.copytree(saved.checkpoints[0], tmp_path / "checkpoints/step_00000001")
    checkpoint = tmp_path / "checkpoints/step_00000001"
    (checkpoint / MANIFEST).unlink()
    config = config_from_values(dict(model="m", run_dir=str(tmp_path), resume=True))
    with pytest.raises(UserError, match=f"{MANIFEST}: missing"):
        find_checkpoint(config)
    training = json.loads((checkpoint / "training.json").read_text())
    del training["version"]
    (checkpoint / "training.json").write_text(json.dumps(training))
    assert find_checkpoint(config) == checkpoint and f"has no checksums ({MANIFEST})" in caplog.text


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory with what changes when it is written."""
    found = {path.relative_to(directory).as_posix(): path.stat() for path in sorted(directory.rglob("*"))}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(saved, tmp_path, capsys, code):
    """A file server that is away, or a disk that fails once, must not cost a run its newest checkpoint, and least of
    all make it begin anew. The launcher starts the ranks again where that may pass."""
    shutil.copytree(saved.run_dir, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000002"
    config = config_from_values(dict(model="m", run_dir=str(tmp_path / "run"), auto_resume=True))

    def code_of_start(unreadable: Path) -> tuple[int, str]:
        before = tree(tmp_path)
        with failing(unreadable, code), pytest.raises(SystemExit) as ended:
            run_cli(lambda: find_checkpoint(config) and None)
        assert tree(tmp_path) == before, unreadable
        return int(str(ended.value)), capsys.readouterr().err

    expected = EXIT_USER if code == errno.EACCES else EXIT_TRANSIENT
    for unreadable in (newest / "__0_0.distcp", newest / "hf/config.json", newest / MANIFEST, newest.parent):
        ended, said = code_of_start(unreadable)
        assert ended == expected and f"{unreadable} cannot be read: {os.strerror(code)}" in said, (unreadable, said)
        assert said.count("\n") == 1 and "damaged" not in said
        advises = code != errno.EACCES and unreadable != newest.parent
        assert (f"move {newest} away" in said) == advises, "a disk that fails for good is for a person to decide"
    # Whether it is one of a version without checksums is not known then.
    (newest / MANIFEST).unlink()
    ended, said = code_of_start(newest / "training.json")
    assert ended == expected and "training.json cannot be read" in said


def test_an_error_that_may_pass_is_not_taken_for_something_else(saved, tmp_path):
    """By other readers: each raises it as such, so that a launcher starts the ranks again, and changes nothing."""
    from megatron_ktr.data.store.sealed import open_sealed
    from megatron_ktr.evaluation.asking.outcomes import ITEMS_FILE, has_items
    from megatron_ktr.files.hf_files import SafetensorsReader, copy_side_files
    from megatron_ktr.files.hf_model import reading_model
    from megatron_ktr.files.torch_dist_files import TorchDistReader
    from megatron_ktr.run.status.wandb_writer import run_id
    from megatron_ktr.web.address import ApiKey

    shutil.copytree(saved.run_dir / "export", tmp_path / "export")
    for name in ("sealed", ITEMS_FILE):
        (tmp_path / name).write_text("{}" * 20)
    assert run_id(tmp_path) == run_id(tmp_path)

    def read_as_transformers_does() -> None:
        with reading_model(tmp_path / "export"):
            try:
                (tmp_path / "export/config.json").read_text()
            except OSError:
                raise ValueError("not a model") from None

    (tmp_path / "token").write_text("a-token-of-some-length")
    readers: dict[str, tuple[Path, Callable[[], Any]]] = {
        "store of records": (tmp_path / "sealed", lambda: open_sealed(tmp_path / "sealed")),
        "answers": (tmp_path / ITEMS_FILE, lambda: has_items(tmp_path)),
        "wandb": (tmp_path / "wandb.json", lambda: run_id(tmp_path)),
        "weights": (tmp_path / "export/model.safetensors", lambda: SafetensorsReader(tmp_path / "export")),
        "model": (tmp_path / "export/config.json", read_as_transformers_does),
        "side files": (tmp_path / "export", lambda: copy_side_files(tmp_path / "export", tmp_path)),
        "checksums": (tmp_path / "export", lambda: write_manifest(tmp_path / "export")),
        "token": (tmp_path / "token", lambda: ApiKey.from_file(tmp_path / "token", option="server_token_file")),
        "converted": (saved.converted / "metadata.json", lambda: TorchDistReader(saved.converted)),
    }
    before = tree(tmp_path)
    for name, (path, read) in readers.items():
        with failing(path, errno.ESTALE), pytest.raises((UserError, OSError)) as failed:
            read()
        assert is_transient(failed.value), (name, failed.value)
        assert "damaged" not in str(failed.value) and "not a M" not in str(failed.value), (name, failed.value)
        assert tree(tmp_path) == before, name


def test_an_error_that_may_pass_is_found_behind_those_of_a_library(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from megatron_ktr.data.template import load_tokenizer

    def fails(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except OSError:
            error = ValueError("no tokenizer")
            raise error from error  # a ring

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(TransientError, match=f"model: {tmp_path} cannot be read: Stale file handle"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError) as failed:
        fails()
    assert not is_transient(failed.value), "what came before a mistake is not behind it"


def test_what_cannot_be_done_is_said_where_the_checkpoints_cannot_be_listed_either(one_rank, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    actions = CheckpointActions(tmp_path / "checkpoints", ranks=one_rank)
    with failing(tmp_path / "checkpoints", errno.EIO), pytest.raises(UserError) as failed:
        actions.on_rank_zero("save step 3 to", lambda: os.listdir(tmp_path / "checkpoints"))
    assert "cannot save step 3 to" in str(failed.value) and "older checkpoints stay" in str(failed.value)
    assert is_transient(failed.value)


# All ranks together


def verify_together(context, *, run_dir: Path) -> dict[str, Any]:
    """What every rank says, of an intact checkpoint, of one with damage in several files, and where ranks disagree."""
    from megatron_ktr.distributed import shared_verification
    from megatron_ktr.distributed.shared_verification import SharedVerification

    shared = SharedVerification(context.init(ParallelSizes()))
    original = shared_verification.find_damage
    checkpoint = run_dir / "checkpoints/step_00000002"

    def outcome() -> Any:
        try:
            return [str(damage) for damage in shared.verify(checkpoint)]
        except UserError as error:
            return str(error)

    def blind(directory: Path, *, names: Any = None) -> Any:
        return [] if not names else [type(original(directory.parent, names=["x"])[0])(sorted(names)[0], "missing")]

    def failing(directory: Path, *, names: Any = None) -> Any:
        raise UserError("the file server is away")

    found = {"intact": outcome()}
    for name, replacement in (("blind", blind), ("away", failing)):
        shared_verification.find_damage = replacement if context.rank == 1 else original
        found[name] = outcome()
    shared_verification.find_damage = original
    import torch

    torch.distributed.barrier()
    if context.rank == 0:
        for name in ("__0_0.distcp", "__1_0.distcp"):
            content = (checkpoint / name).read_bytes()
            (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    torch.distributed.barrier()
    found["damaged"] = outcome()
    return found


def test_ranks_verify_a_share_each_and_agree(ranks, saved, tmp_path):
    shutil.copytree(saved.run_dir, tmp_path / "run")
    first, second, third = ranks(verify_together, world_size=3, run_dir=tmp_path / "run")
    assert first == second == third
    assert first["intact"] == []
    assert "file system that all ranks share" in first["blind"], "a directory that one rank does not see"
    assert first["away"] == "the file server is away"
    assert sorted(first["damaged"]) == [f"__{n}_0.distcp: other content than was written" for n in (0, 1)]


# The command


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    call = [sys.executable, "tools/checkpoint.py", *map(str, arguments)]
    return subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def test_checkpoint_command_lists_and_verifies(saved, tmp_path):
    shutil.copytree(saved.run_dir, tmp_path / "run")
    listed = command("list", tmp_path / "run")
    assert listed.returncode == 0 and listed.stdout.count("complete (training, step") == 2, listed.stderr
    content = bytearray((tmp_path / "run/checkpoints/step_00000002/__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "run/checkpoints/step_00000002/__0_0.distcp").write_bytes(content)
    verified = run_tool("checkpoint", "verify", tmp_path / "run", "--json")
    report = json.loads(verified.stdout.splitlines()[-1])
    assert verified.returncode == 1 and not report["ok"]
    assert [one["status"] for one in report["directories"]] == ["intact", "damaged", "intact"]
    assert report["directories"][1]["damage"] == [{"file": "__0_0.distcp", "reason": "other content than was written"}]
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000002")
    assert run_tool("checkpoint", "verify", tmp_path / "run").returncode == 0
    for arguments in (["verify", tmp_path / "nothing"], ["verify", tmp_path], ["verify"], ["mend", tmp_path]):
        wrong = run_tool("checkpoint", *arguments)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    assert "verify RUN" in command("--help").stdout
