"""Offline conversion: Hugging Face <-> Megatron distributed checkpoints, streamed, exact, in any layout."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.files import hf_files, torch_dist_files
from megatron_ktr.files.torch_dist_files import TorchDistReader
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights
from models.qwen2_5_vl.dist_checkpoint import convert_to_hf, convert_to_megatron
from models.qwen2_5_vl.dist_weights import load_megatron_weights, save_megatron_weights
from models.qwen2_5_vl.model import build_model
from models.qwen2_5_vl.weight_map import weight_specs
from tests.models.test_conversion import differing_tensors
from tests.support.paths import REPOSITORY
from tests.support.tiny import save_tiny_hf, tiny_hf_config

OPTIONS = {
    "untied": dict(num_layers=4, vision_depth=2, vision_ffn_size=42, vocab_size=199),
    "tied": dict(num_layers=4, vision_depth=2, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory) -> dict[str, Path]:
    directories = {name: tmp_path_factory.mktemp(name) for name in OPTIONS}
    for name, directory in directories.items():
        save_tiny_hf(directory, **OPTIONS[name])
        (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directories


@pytest.fixture(scope="module")
def megatron_dirs(hf_dirs, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("megatron")
    for name, directory in hf_dirs.items():
        convert_to_megatron(directory, out / name)
    return {name: out / name for name in hf_dirs}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip_is_bit_exact_and_keeps_side_files(hf_dirs, megatron_dirs, tmp_path, name):
    convert_to_hf(megatron_dirs[name], tmp_path / "back", max_shard_bytes=300_000)
    assert differing_tensors(weights(tmp_path / "back"), weights(hf_dirs[name])) == []
    for file in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / file).read_bytes() == (hf_dirs[name] / file).read_bytes()


def test_round_trip_keeps_bfloat16(tmp_path):
    save_tiny_hf(tmp_path / "hf", num_layers=1, vision_depth=2, dtype=torch.bfloat16)
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = weights(tmp_path / "back")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert differing_tensors(back, weights(tmp_path / "hf")) == []


def load_and_export(context, *, hf_dir: str, megatron_dir: str, sizes: ParallelSizes) -> dict[str, torch.Tensor]:
    groups = context.init(sizes)
    model = build_model(Qwen2_5_VLConfig.from_hf(hf_dir), ranks=groups)
    load_megatron_weights(model, megatron_dir)
    return {name: t.clone() for name, t in export_hf_tensors(model, ranks=groups)}


LAYOUTS = [
    pytest.param("untied", ParallelSizes(tensor=2, pipeline=2), id="tp2 pp2"),
    pytest.param("untied", ParallelSizes(tensor=4), id="tp4 pads the vision mlp"),
    pytest.param("untied", ParallelSizes(pipeline=2, virtual_pipeline=2), id="pp2 two chunks"),
    pytest.param("tied", ParallelSizes(tensor=2, pipeline=2), id="tied tp2 pp2"),
]


@pytest.mark.parametrize("name, sizes", LAYOUTS)
def test_converted_checkpoint_loads_into_any_layout(ranks, hf_dirs, megatron_dirs, name, sizes):
    results = ranks(load_and_export, hf_dir=str(hf_dirs[name]), megatron_dir=str(megatron_dirs[name]), sizes=sizes)
    expected = weights(hf_dirs[name])
    for exported in results:
        assert differing_tensors(exported, expected) == []


def save_live_model(context, *, hf_dir: str, out_dir: str, sizes: ParallelSizes) -> None:
    groups = context.init(sizes)
    model = build_model(Qwen2_5_VLConfig.from_hf(hf_dir), ranks=groups)
    load_hf_weights(model, hf_dir, ranks=groups)
    save_megatron_weights(model, out_dir)


@pytest.mark.parametrize("name, sizes", LAYOUTS)
def test_checkpoint_of_a_live_model_converts_bit_exactly(ranks, hf_dirs, megatron_dirs, tmp_path, name, sizes):
    saved = tmp_path / "saved"
    saved.mkdir()
    ranks(save_live_model, hf_dir=str(hf_dirs[name]), out_dir=str(saved), sizes=sizes)
    live, converted = TorchDistReader(saved), TorchDistReader(megatron_dirs[name])
    assert set(live.tensors) == set(converted.tensors), "the converter writes the live model's keys"
    convert_to_hf(saved, tmp_path / "back", side_files_dir=hf_dirs[name])
    assert differing_tensors(weights(tmp_path / "back"), weights(hf_dirs[name])) == []


# Memory


def test_conversion_holds_one_tensor_at_a_time(hf_dirs, tmp_path, monkeypatch):
    """When a tensor is asked for, those handed out before are gone: neither side collects them."""
    alive: list[weakref.ref] = []
    most_alive = 0

    def watch(owner, method):
        original = getattr(owner, method)

        def watched(self, *args, **kwargs):
            nonlocal most_alive
            most_alive = max(most_alive, sum(ref() is not None for ref in alive))
            tensor = original(self, *args, **kwargs)
            alive.append(weakref.ref(tensor))
            return tensor

        monkeypatch.setattr(owner, method, watched)

    watch(hf_files.SafetensorsReader, "read")
    watch(torch_dist_files.TorchDistReader, "read")
    convert_to_megatron(hf_dirs["untied"], tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert len(alive) > 100
    assert most_alive <= 1, "the slice or tensor before may still be named while the next is read"


def test_peak_memory_is_far_below_the_model(tmp_path):
    """Both directions in one process, 320 MB of weights, the largest tensor 12.6 MB (gate and up of a layer).

    Bound: four such tensors (stored chunk, its copy, gate and up) and 30 MB for what the libraries allocate on first
    use. Pages of mapped files do not count: the system takes them back.
    """
    hf_dir = tmp_path / "hf"
    write_large_hf(hf_dir)
    program = """
import sys, threading, time
from models.qwen2_5_vl.dist_checkpoint import convert_to_hf, convert_to_megatron

def anonymous_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

samples, done = [anonymous_mb()], threading.Event()
def watch():
    while not done.wait(0.001):
        samples.append(anonymous_mb())
thread = threading.Thread(target=watch)
thread.start()
convert_to_megatron(sys.argv[1], sys.argv[2])
convert_to_hf(sys.argv[2], sys.argv[3])
done.set()
thread.join()
print(max(samples) - samples[0])
"""
    arguments = [str(hf_dir), str(tmp_path / "megatron"), str(tmp_path / "back")]
    run = subprocess.run([sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 80, f"{run.stdout} MB"


def write_large_hf(directory: Path) -> None:
    directory.mkdir()
    tiny_hf_config(num_layers=16, hidden_size=256, ffn_size=6144, vision_depth=2).save_pretrained(directory)
    specs = weight_specs(Qwen2_5_VLConfig.from_hf(directory))
    tensors = {n: torch.ones(s) for spec in specs for n, s in zip(spec.hf_names, spec.hf_shapes, strict=True)}
    save_file(tensors, directory / "model.safetensors")


# Errors


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/convert_checkpoint.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_tool_converts_and_reports_errors_in_one_line(hf_dirs, tmp_path):
    out = tmp_path / "megatron"
    run = run_tool("to-megatron", "--hf", str(hf_dirs["tied"]), "--out", str(out), "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["num_tensors"] == len(weights(hf_dirs["tied"]))
    run = run_tool("to-megatron", "--hf", str(hf_dirs["tied"]), "--out", str(out))
    assert run.returncode == 2 and run.stderr == f"error: {out} already exists; give --out a new directory\n"


def test_full_disk_is_one_clear_error_and_leaves_nothing(hf_dirs, megatron_dirs, tmp_path, monkeypatch):
    """The device accepts 100 kB, then no more; the space seemed to be there when the conversion began."""

    class FullDisk:
        def __init__(self, file):
            self._file, self._room = file, 100_000

        def write(self, data):
            self._room -= memoryview(data).nbytes
            if self._room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    def open_on_full_disk(path, mode="r", **options):
        file = open(path, mode, **options)
        return FullDisk(file) if mode == "wb" else file

    for module in (hf_files, torch_dist_files):
        monkeypatch.setattr(module, "open", open_on_full_disk, raising=False)
    with pytest.raises(UserError, match="disk full while writing megatron; choose another --out"):
        convert_to_megatron(hf_dirs["untied"], tmp_path / "megatron")
    with pytest.raises(UserError, match="disk full while writing hf; choose another --out"):
        convert_to_hf(megatron_dirs["untied"], tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_before_writing(hf_dirs, tmp_path, monkeypatch):
    usage = hf_files.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(hf_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"disk full: \d+ bytes needed, 1000 free"):
        convert_to_megatron(hf_dirs["untied"], tmp_path / "megatron")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_checkpoint_is_refused_and_checkpoints_inside_are_named(hf_dirs, megatron_dirs, tmp_path):
    with pytest.raises(UserError, match="not a Megatron distributed checkpoint"):
        convert_to_hf(hf_dirs["untied"], tmp_path / "out")
    with pytest.raises(UserError, match="it contains checkpoints: tied, untied"):
        convert_to_hf(megatron_dirs["untied"].parent, tmp_path / "out")
    with pytest.raises(UserError, match="no such directory; give --hf"):
        convert_to_megatron(tmp_path / "nowhere" / "config", tmp_path / "out")


def test_checkpoint_of_another_size_is_refused_by_tensor(hf_dirs, megatron_dirs, tmp_path):
    """The same names, other shapes; then fewer layers' worth of keys."""
    save_tiny_hf(tmp_path / "wide", **{**OPTIONS["untied"], "ffn_size": 128})
    message = r"mlp\.linear_fc1\.weight: expected shape \(4, 256, 64\), got \(4, 192, 64\)"
    with pytest.raises(UserError, match=message):
        convert_to_hf(megatron_dirs["untied"], tmp_path / "out", side_files_dir=tmp_path / "wide")
    with pytest.raises(UserError, match=r"1 tensors missing: language\.output_layer\.weight"):
        convert_to_hf(megatron_dirs["tied"], tmp_path / "out", side_files_dir=hf_dirs["untied"])
    with pytest.raises(UserError, match=r"does not call for: language\.output_layer\.weight"):
        convert_to_hf(megatron_dirs["untied"], tmp_path / "out", side_files_dir=hf_dirs["tied"])


def test_truncated_checkpoint_is_reported_and_leaves_nothing(megatron_dirs, hf_dirs, tmp_path):
    broken = tmp_path / "broken"
    convert_to_megatron(hf_dirs["tied"], broken)
    data = broken / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match=r"broken is damaged: __0_0.distcp: \d+ bytes, \d+ were written"):
        convert_to_hf(broken, tmp_path / "out")
    (broken / "checksums.json").unlink()  # As a checkpoint of somebody who writes none.
    with pytest.raises(UserError, match="__0_0.distcp, tensor .*: damaged"):
        convert_to_hf(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
