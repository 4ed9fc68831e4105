"""Files that somebody else wrote: no code runs from them, and each costs one line that names the file.

Every payload would create a file if it ran. Checksums are made anew after planting one: they are no signature.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import MANIFEST, write_manifest
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.replay import ReplayEngine
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import find_checkpoint
from models.qwen2_5_vl.dist_checkpoint import convert_to_hf
from tests.run.test_checkpoint import NoData
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import save_tiny_hf
from tests.support.tokenizer import tiny_tokenizer


class Payload:
    """Unpickled, it makes the file ``ran``."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.ran),)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "hf"
    save_tiny_hf(out, num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    return out


def torch_file(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def in_metadata(change: Callable[[Any, Path], None], ran: Path) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        metadata = pickle.loads(path.read_bytes())
        change(metadata, ran)
        path.write_bytes(pickle.dumps(metadata))

    return plant


def bytes_in_place_of_a_tensor(metadata: Any, ran: Path) -> None:
    """PyTorch would unpickle the chunk freely, because its description says that it is no tensor."""
    key = next(key for key in metadata.state_dict_metadata if key.startswith("optimizer.state.exp_avg."))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()


def payload_in_planner_data(metadata: Any, ran: Path) -> None:
    metadata.planner_data = Payload(ran)


def chunk_elsewhere(metadata: Any, ran: Path) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../../elsewhere"


def chunk_payload(ran: Path) -> Callable[[Path], None]:
    """Over the largest chunk of the file, a ``torch.save`` of the payload."""

    def plant(path: Path) -> None:
        metadata = pickle.loads((path.parent / ".metadata").read_bytes())
        index, place = max(metadata.storage_data.items(), key=lambda item: item[1].length)
        scratch = path.with_name("scratch")
        torch.save(Payload(ran), scratch)
        content, hostile = bytearray(path.read_bytes()), scratch.read_bytes()
        scratch.unlink()
        content[place.offset : place.offset + len(hostile)] = hostile
        place.length = len(hostile)
        path.write_bytes(content)
        (path.parent / ".metadata").write_bytes(pickle.dumps(metadata))

    return plant


def cases(ran: Path) -> dict[str, tuple[str, Callable[[Path], None], str]]:
    """By name: the file, what to do to it, and what its line must say."""
    payload = Payload(ran)
    forbidden = "refused: its pickle names posix.mkdir"
    return {
        "metadata": (".metadata", lambda path: path.write_bytes(pickle.dumps(payload)) and None, forbidden),
        "metadata, inside": (".metadata", in_metadata(payload_in_planner_data, ran), forbidden),
        "metadata, bytes": (
            ".metadata",
            in_metadata(bytes_in_place_of_a_tensor, ran),
            "refused: .* holds pickled bytes",
        ),
        "metadata, another file": (".metadata", in_metadata(chunk_elsewhere, ran), "does not describe"),
        "metadata, another object": (".metadata", lambda path: path.write_bytes(pickle.dumps([1])) and None, "damaged"),
        "metadata, no pickle": (".metadata", lambda path: path.write_bytes(b"\x80\x05hello") and None, "damaged"),
        "common": ("common.pt", torch_file({"optimizer": payload}), forbidden),
        "common, no file of torch": ("common.pt", lambda path: path.write_bytes(b"x" * 100) and None, "damaged"),
        "common, another object": ("common.pt", torch_file([1]), "expected a dictionary"),
        "random states of old": ("rng.pt", torch_file([payload]), forbidden),
        "random states": ("rng.json", lambda path: path.write_text("[" * 100_000) and None, "damaged"),
        "random states, another length": ("rng.json", shorten_torch_state, "does not hold"),
        "training": ("training.json", lambda path: path.write_text("[" * 100_000) and None, "does not hold"),
        "training, another object": ("training.json", lambda path: path.write_text("[1]") and None, "does not hold"),
        "tensors": ("__0_0.distcp", chunk_payload(ran), forbidden),
    }


def shorten_torch_state(path: Path) -> None:
    states = json.loads(path.read_text())
    states[0]["torch"] = ""
    path.write_text(json.dumps(states))


def test_hostile_checkpoints_cost_a_line_and_run_nothing(one_rank, hf_dir, tmp_path):
    run_dir, ran = tmp_path / "run", tmp_path / "ran"
    config = config_from_values(dict(model=str(hf_dir), run_dir=str(run_dir), resume=True, lr=1e-3))
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=one_rank, platform=current(), num_steps=4)
    checkpoints = Checkpoints(run_dir, policy=policy, source=NoSource(), options=CheckpointOptions.of(config))
    checkpoints.save_and_wait(1)
    clean = run_dir / "checkpoints/step_00000001"
    shutil.copytree(clean, tmp_path / "clean")
    for name, (file, plant, expected) in cases(ran).items():
        shutil.rmtree(clean)
        shutil.copytree(tmp_path / "clean", clean)
        if file == "rng.pt":
            (clean / "rng.json").unlink()
        plant(clean / file)
        (clean / MANIFEST).unlink()
        write_manifest(clean)
        assert find_checkpoint(config) == clean, "its checksums are right"
        with pytest.raises(UserError, match=expected) as error:
            checkpoints.load(clean)
        text = str(error.value)
        assert file in text and "\n" not in text and len(text) < 500, (name, text)
        assert not ran.exists(), name
        if file in (".metadata", "__0_0.distcp") and "bytes" not in name:
            with pytest.raises(UserError) as error:
                convert_to_hf(clean, tmp_path / "out")
            assert file in str(error.value) and "\n" not in str(error.value), (name, str(error.value))
            assert not ran.exists() and not (tmp_path / "out").exists(), name
    # The last one still lies there; its checksums are right, and the command says what is wrong all the same.
    call = [sys.executable, "tools/checkpoint.py", "verify", str(clean)]
    verified = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert verified.returncode == 1 and not ran.exists()
    assert "refused: its pickle names posix.mkdir" in verified.stdout and "Traceback" not in verified.stderr
    with pytest.raises(FileExistsError):  # The payload is one.
        ran.mkdir()
        pickle.loads(pickle.dumps(Payload(ran)))


class NoSource(NoData):
    def load_state_dict(self, state: Any) -> None:
        """Nothing to place."""

    def state_dict(self) -> dict[str, Any]:
        return {"rank": 0, "size": 1}


def test_old_random_states_are_still_read(tmp_path):
    """``rng.pt`` of checkpoints without checksums, and ``rng.json``: what is drawn from the states they give back."""
    import random

    import numpy

    from megatron_ktr.distributed.random_states import random_states_to_json, read_random_states

    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.get_rng_state(),
        "tracker": {"model-parallel-rng": torch.get_rng_state()},
    }
    expected = random.random(), numpy.random.random(), torch.rand(1)
    (tmp_path / "old").mkdir()
    torch.save([state], tmp_path / "old/rng.pt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/rng.json").write_text(random_states_to_json([state]))
    for name in ("old", "new"):
        (read,) = read_random_states(tmp_path / name)
        random.setstate(read["python"])
        numpy.random.set_state(read["numpy"])
        torch.set_rng_state(read["torch"])
        assert (random.random(), numpy.random.random(), torch.rand(1)) == expected, name
        assert torch.equal(read["tracker"]["model-parallel-rng"], state["tracker"]["model-parallel-rng"])


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Payload(Path("never"))),
        b"[" * 100_000,
        b'{"problem": "a", "responses": ' + b"[" * 100_000,
        b'{"problem": "a", "responses": [{"token_ids": [' + b"9" * 5000 + b'], "reward": 1}]}',
        b'{"problem": "a", "responses": [{"text": "b", "reward": 1e999}]}',
        b'{"problem": "a", "responses": [{"text": "b", "reward": ' + b"9" * 400 + b"}]}",
        b'{"problem": "a", "responses": [{"text": "\\ud800", "reward": 1}]}',
        b'["a"]',
        b"{}",
    ],
    ids=[
        "pickle",
        "deep",
        "deep line",
        "long number",
        "infinite",
        "beyond a float",
        "half a character",
        "text",
        "empty",
    ],
)
def test_hostile_replay_files_cost_a_line(tmp_path, content):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        ReplayEngine(path, tokenizer=tiny_tokenizer(), vocab_size=199)
    text = " ".join(str(error.value).split())
    assert str(path) in text and len(text) < 500
    assert not Path("never").exists()
