"""``tools/checkpoint.py export``: what it makes of a training checkpoint is the run's own export, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.platform import current
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import step_name
from tests.run.test_checkpoint import NoData, step_on_noise
from tests.support.commands import run_tool

RUNS: dict[str, tuple[ParallelSizes, dict[str, Any]]] = {
    "replicas": (ParallelSizes(), {}),
    "tensor": (ParallelSizes(tensor=2), {}),
    "pipeline": (ParallelSizes(pipeline=2), {}),
    "adapters": (ParallelSizes(), dict(lora_rank=2)),
}


def save_runs(context: Any, *, model: Path, folder: Path) -> None:
    for name, (sizes, values) in RUNS.items():
        run_dir = folder / name
        config = config_from_values(dict(model=str(model), run_dir=str(run_dir), lr=1e-3, **values))
        options = PolicyOptions.of(config)
        policy = Policy(model, options=options, ranks=context.init(sizes), platform=current(), num_steps=4)
        checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions.of(config))
        for step in (1, 2) if name != "adapters" else (1,):
            step_on_noise(policy, step)
            checkpoints.save_and_wait(step)
            policy.save_hf(run_dir / "exports" / step_name(step))
        checkpoints.close()


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """A run of each kind, with its checkpoints and the exports that it made of the same steps."""
    folder = tmp_path_factory.mktemp("exports")
    save_tiny_model(folder / "model", corpus=corpus(), hidden_size=32, ffn_size=64, num_layers=2, vision_hidden_size=32)
    ranks(save_runs, world_size=2, model=folder / "model", folder=folder)
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("name", ["replicas", "tensor", "pipeline"])
def test_the_export_of_a_checkpoint_is_the_runs_own_byte_for_byte(folder, tmp_path, name):
    from transformers import Qwen2_5_VLForConditionalGeneration

    run, exports = folder / name, {}
    for step, place in ((2, (run,)), (1, (run, "--step", 1)), (1, (run / "checkpoints" / step_name(1),))):
        out = tmp_path / str(len(exports))
        done = run_tool("checkpoint", "export", *place, "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert Path(report["checkpoint"]).name == step_name(step) and report["out"] == str(out)
        exports[out] = contents(out)
        assert exports[out] == contents(run / "exports" / step_name(step))
    newest, older, same = exports.values()
    assert older == same != newest, "steps that train"
    _, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "0", output_loading_info=True)
    assert not any(found.values()), found


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(folder, tmp_path):
    damaged, there = tmp_path / "damaged", tmp_path / "there"
    shutil.copytree(folder / "replicas", damaged)
    path = damaged / "checkpoints" / step_name(2) / "__1_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    there.mkdir()
    (there / "mine").write_text("kept")
    before = sorted(tmp_path.iterdir())
    run, out = folder / "replicas", tmp_path / "out"
    for arguments, words in {
        (damaged, "--out", out): "__1_0.distcp: other content than was written",
        (folder / "adapters", "--out", out): "holds adapters alone (--lora-rank)",
        (run, "--out", there): f"{there} already exists",
        (run, "--out", out, "--step", 3): "--step 3: no such checkpoint in",
        (folder / "model", "--out", out): "no checkpoint in it to export",
        (folder / "model" / "config.json", "--out", out): "no such directory",
    }.items():
        refused = run_tool("checkpoint", "export", *arguments)
        (line,) = refused.stderr.splitlines()
        assert refused.returncode == 2 and line.startswith("error: ") and words in line, line
        assert not refused.stdout and sorted(tmp_path.iterdir()) == before, "nothing is left, also no scratch"
    assert (there / "mine").read_text() == "kept"
    # The older checkpoint of the damaged run is intact.
    assert run_tool("checkpoint", "export", damaged, "--step", 1, "--out", out).returncode == 0
    assert contents(out) == contents(run / "exports" / step_name(1))
