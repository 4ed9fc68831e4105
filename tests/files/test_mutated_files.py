"""Every kind of file that a run reads, damaged by a seeded mutation: it is read, or costs one ``UserError``.

Mutations change bytes, and values of JSON to ones that no writer makes. Examples are the same in every run. What once
ended in a traceback, or asked for more time or memory than there is, is a fixed example below.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.template_probe import require_bounded
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.random_states import random_states_to_json, read_random_states
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.files.checksums import find_damage, write_manifest
from megatron_ktr.files.hf_files import SafetensorsReader
from megatron_ktr.files.intact_checkpoint import checkpoint_damage
from megatron_ktr.files.safe_pickle import load_metadata, load_torch_object
from megatron_ktr.run.checkpoint_state import read_training_state
from megatron_ktr.run.kept import _found
from megatron_ktr.run.metrics import MetricsWriter, read_records
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.fuzzing import fuzzed

NASTY: list[Any] = [
    *(None, True, "", "x" * 1000, "\x1b[2J", -1, 0, 2**63, 10**400, 1e308, float("nan"), float("-inf"), [], {}),
    *([[[[1]]]], {"a": {"b": None}}, [0] * 1000, "9" * 5000, [-1, -1], [2**62, 2**62], "../../etc/passwd", "\ud800"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mutated") / "model"
    corpus = ["what is the colour of the ball"] * 4
    save_tiny_model(out, corpus=corpus, hidden_size=16, ffn_size=16, num_layers=1, vision_hidden_size=16)
    return out


@st.composite
def byte_changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "zeros"]))
    where, value = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))

    def change(content: bytes) -> bytes:
        at = min(int(where * len(content)), max(len(content) - 1, 0))
        return {
            "flip": content[:at] + value + content[at + len(value) :],
            "cut": content[:at],
            "insert": content[:at] + value + content[at:],
            "double": content + content[at:],
            "zeros": content[:at] + bytes(len(content) - at),
        }[kind]

    return change


@st.composite
def value_changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One value somewhere in a JSON document becomes another, is left out, or is nested very deeply."""
    path = draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=5))
    nasty = draw(st.one_of(st.sampled_from(NASTY), st.just("LEFT OUT"), st.just("DEEP")))

    def change(content: bytes) -> bytes:
        try:
            document = json.loads(content)
        except ValueError:
            return content[: len(content) // 2]
        node: Any = document
        for depth, share in enumerate(path):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[int(share * len(keys))]
            if depth + 1 < len(path) and isinstance(node[key], dict | list) and node[key]:
                node = node[key]
            elif nasty == "LEFT OUT":
                del node[key]
                break
            else:
                node[key] = nasty
                break
        text = json.dumps(document)
        return text.replace('"DEEP"', "[" * 20_000 + "]" * 20_000).encode("utf-8", "surrogatepass")

    return change


CHANGES = st.one_of(byte_changes(), value_changes())


def read_or_refuse(read: Callable[[], Any]) -> None:
    """Either it is read, or there is one short line for the user."""
    try:
        read()
    except UserError as error:
        line = one_line(error)
        assert line and "\n" not in line and len(line) <= 2100


def with_mutation(source: Path, target: Path, change: Callable[[bytes], bytes]) -> None:
    target.write_bytes(change(source.read_bytes()))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_configurations_of_a_model(model, tmp_path, name):
    for path in model.iterdir():
        if path.suffix == ".json" and path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    read = {"config.json": Qwen2_5_VLConfig.from_hf, "preprocessor_config.json": PreprocessSettings.from_model}[name]
    if not (tmp_path / name).exists():
        (tmp_path / name).write_text(json.dumps({"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}))
    clean = (tmp_path / name).read_bytes()

    @fuzzed(150)
    @given(change=CHANGES)
    def mutated(change: Callable[[bytes], bytes]) -> None:
        (tmp_path / name).write_bytes(change(clean))
        read_or_refuse(lambda: read(tmp_path))

    mutated()


def test_tokenizers(model, tmp_path):
    for path in model.iterdir():
        if path.name.startswith(("tokenizer", "config", "special")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("tokenizer"))
    clean = {name: (tmp_path / name).read_bytes() for name in names if name.endswith(".json")}

    @fuzzed(25)
    @given(name=st.sampled_from(sorted(clean)), change=CHANGES)
    def mutated(name: str, change: Callable[[bytes], bytes]) -> None:
        for one, content in clean.items():
            (tmp_path / one).write_bytes(change(content) if one == name else content)
        read_or_refuse(lambda: load_tokenizer(tmp_path))

    mutated()


def safetensors(header: Any, *, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


HEADERS = {
    "huge length": safetensors({"a": entry()}, length=2**63),
    "length beyond the file": safetensors({"a": entry()}, length=10**6),
    "overlapping": safetensors({"a": entry(), "b": entry(data_offsets=[8, 24])}),
    "negative": safetensors({"a": entry(data_offsets=[-16, 0])}),
    "backwards": safetensors({"a": entry(data_offsets=[16, 0])}),
    "beyond the end": safetensors({"a": entry(data_offsets=[0, 10**12], shape=[10**6, 10**6])}),
    "shape that overflows": safetensors({"a": entry(shape=[2**62, 4])}),
    "negative shape": safetensors({"a": entry(shape=[-2, -2])}),
    "unknown dtype": safetensors({"a": entry(dtype="F99")}),
    "dtype of another size": safetensors({"a": entry(dtype="F64")}),
    "no object": safetensors([1]),
    "deep": safetensors(b"[" * 100_000),
    "not utf-8": safetensors(b'{"\xff": 1}'),
    "empty": b"",
}


@pytest.mark.parametrize("header", HEADERS)
def test_hostile_headers_of_weights_cost_a_line(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(HEADERS[header])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged|unsupported dtype"):
        reader = SafetensorsReader(tmp_path)
        for name in reader.infos:
            reader.read(name)


def test_weights(model, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    clean = (tmp_path / "model.safetensors").read_bytes()

    def read() -> None:
        reader = SafetensorsReader(tmp_path)
        for name in reader.infos:
            reader.read(name)

    @fuzzed(150)
    @given(change=byte_changes(), is_header=st.booleans())
    def mutated(change: Callable[[bytes], bytes], is_header: bool) -> None:
        (size,) = struct.unpack("<Q", clean[:8])
        header = clean[8 : 8 + size]
        content = safetensors(change(header), data=clean[8 + size :]) if is_header else change(clean)
        (tmp_path / "model.safetensors").write_bytes(content)
        read_or_refuse(read)

    mutated()


def test_the_files_of_a_checkpoint(tmp_path):
    """Their checksums are right: whoever writes a hostile file writes its checksum too."""
    random_state = {
        "python": (3, tuple(range(625)), None),
        "numpy": ("MT19937", list(range(624)), 624, 0, 0.0),
        "torch": torch.zeros(8, dtype=torch.uint8),
        "device": torch.zeros(8, dtype=torch.uint8),
        "tracker": {"model-parallel-rng": torch.zeros(8, dtype=torch.uint8)},
    }
    training = {"version": 2, "step": 3, "layout": {"world": 1}, "scheduler_steps": 3, "sources": [{"drawn": 4}]}
    torch.save({"optimizer": {"step": 3, "lr": torch.ones(2)}}, tmp_path / "common.pt")
    (tmp_path / "rng.json").write_text(random_states_to_json([random_state]))
    (tmp_path / "training.json").write_text(json.dumps(training))
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": [1, 2, (3, "x" * 300)] * 30}))
    write_manifest(tmp_path)
    readers = {
        "common.pt": lambda: load_torch_object(tmp_path / "common.pt"),
        "rng.json": lambda: read_random_states(tmp_path),
        "training.json": lambda: read_training_state(tmp_path),
        ".metadata": lambda: load_metadata(tmp_path / ".metadata"),
        "checksums.json": lambda: [find_damage(tmp_path), checkpoint_damage(tmp_path)],
    }
    clean = {name: (tmp_path / name).read_bytes() for name in readers}
    for read in readers.values():
        read()

    @fuzzed(300)
    @given(name=st.sampled_from(sorted(readers)), change=CHANGES)
    def mutated(name: str, change: Callable[[bytes], bytes]) -> None:
        (tmp_path / name).write_bytes(change(clean[name]))
        read_or_refuse(readers[name])
        (tmp_path / name).write_bytes(clean[name])

    mutated()


def test_pickles_and_archives_that_ask_for_all_memory_cost_a_line(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04Nr\xff\xff\xff\x3f.")  # an object is stored under number 2^30: a table of 16 GB
    with pytest.raises(UserError, match="damaged: an object is stored under number"):
        load_metadata(path)
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".")  # a text of an exabyte
    with pytest.raises(UserError, match="damaged"):
        load_metadata(path)
    torch.save({"a": torch.zeros(10)}, tmp_path / "clean")
    with zipfile.ZipFile(tmp_path / "clean") as clean, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in clean.namelist():
            bomb.writestr(name, bytes(10**8) if name.endswith("/data/0") else clean.read(name))
    with pytest.raises(UserError, match=r"damaged: its parts claim 1\d+ bytes, it has \d+$"):
        load_torch_object(path)


def test_records_of_a_run(tmp_path):
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 0.5, "eval/a/accuracy": 0.1 * step}) for step in (1, 2, 3)]
    clean = "".join(line + "\n" for line in lines).encode()
    path = tmp_path / "metrics.jsonl"

    def read() -> None:
        assert all(isinstance(record["step"], int) for record in read_records(tmp_path))
        _found(tmp_path, "eval/a/accuracy", until=3)

    @fuzzed(100)
    @given(change=byte_changes(), nasty=st.sampled_from([*NASTY, {"step": "x"}, {"step": True}, {"step": 10**400}]))
    def mutated(change: Callable[[bytes], bytes], nasty: Any) -> None:
        path.write_bytes(change(clean))
        read_or_refuse(read)
        values = json.dumps({"step": 2, "eval/a/accuracy": nasty})
        path.write_text("\n".join([lines[0], json.dumps(nasty), values, "[" * 20_000, lines[2]]))
        read_or_refuse(read)
        assert [record["step"] for record in read_records(tmp_path)][::2] == [1, 3]

    mutated()
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2], "a resumed run drops what is no record"


@pytest.mark.parametrize(
    "template, word",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{% set x = 'x' * (10 ** 10) %}", "needs more than 1024 MB"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "makes more than 1048576 characters"),
    ],
)
def test_templates_that_ask_for_too_much_cost_a_line(template, word):
    with pytest.raises(UserError, match=f"chat_template: x: the chat template {word}"):
        require_bounded(template, where="chat_template: x")


def test_templates_reach_nothing_outside_the_sandbox(model, tmp_path):
    ran = tmp_path / "ran"
    template = f"{{{{ ''.__class__.__mro__[1] }}}}{{{{ cycler.__init__.__globals__.os.mkdir('{ran}') }}}}"
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match="chat_template: .* failed: SecurityError"):
        load_tokenizer(model, chat_template=path)
    assert not ran.exists()
