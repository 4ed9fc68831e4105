"""Weights from GPU to GPU, with stand-ins for the communicator and the servers: what is announced is what is sent.

Not run on GPUs: that vLLM's workers receive what is broadcast is vLLM's half.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.rollout import server_broadcast
from megatron_ktr.rollout.server_broadcast import BroadcastTransfer, vllm_connect
from megatron_ktr.rollout.server_pool import PoolSettings
from megatron_ktr.rollout.server_replicas import Replicas
from megatron_ktr.rollout.vllm_server import ServerEngine
from tests.support.fake_server import FakeServer
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import tiny_hf_config
from tests.support.tokenizer import tiny_tokenizer
from tests.test_server_pool import MEDIA, SAMPLING, counts, prompts


class Recorder:
    """A communicator that keeps what it is told to broadcast."""

    def __init__(self, address: str, port: int, world_size: int) -> None:
        self.joined = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        self.sent: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0 and tensor.is_contiguous()
        self.sent.append(tensor.clone())


def weights(value: float) -> dict[str, Tensor]:
    torch.manual_seed(round(value))
    return {
        "first.weight": torch.randn(4, 6).T,  # not contiguous
        "second.bias": torch.randn(5).to(torch.bfloat16),
        "third.weight": torch.full((2, 2), value),
    }


def told(server: FakeServer, route: str) -> list[dict[str, Any]]:
    return [json.loads(call.removeprefix(route)) for call in server.control if call.startswith(f"{route} ")]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServerEngine, list[FakeServer], list]]:
    """An engine with two servers of two workers each; its communicators, as they are made."""
    monkeypatch.setattr(server_broadcast, "CHUNK_BYTES", 100)  # two announcements for three tensors
    servers = [FakeServer(), FakeServer()]
    recorders: list[Recorder] = []

    def connect(address: str, port: int, world_size: int) -> Recorder:
        recorders.append(Recorder(address, port, world_size))
        return recorders[-1]

    tiny_hf_config().save_pretrained(tmp_path)
    urls = [server.url for server in servers]
    engine = ServerEngine(
        tmp_path,
        urls=urls,
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=SAMPLING,
        transfer=BroadcastTransfer(owned_urls=urls, timeout_seconds=PATIENCE_SECONDS, connect=connect),
        replicas=Replicas(),
        settings=PoolSettings(timeout_seconds=PATIENCE_SECONDS, backoff_seconds=0.01, probe_seconds=0.05),
    )
    yield engine, servers, recorders
    engine.close()
    for server in servers:
        server.kill()


def test_servers_are_told_exactly_what_is_broadcast(made) -> None:
    engine, servers, recorders = made
    for value in (1.0, 2.0):
        engine.load_weights(iter(weights(value).items()))
    assert len(recorders) == 2, "one communicator per server, kept for the next update"
    joined = [told(server, "init_weight_transfer_engine") for server in servers]
    assert sorted(call["init_info"]["master_port"] for (call,) in joined) == sorted(
        recorder.joined["master_port"] for recorder in recorders
    )
    assert all(recorder.joined["world_size"] == 3 for recorder in recorders), "two workers and the sender"
    expected = {**{f"{name} 1": t for name, t in weights(1.0).items()}, **{name: t for name, t in weights(2.0).items()}}
    for server, recorder in zip(servers, recorders, strict=True):
        announced = [call["update_info"] for call in told(server, "update_weights")]
        assert len(announced) == 4
        names = [name for info in announced for name in info["names"]]
        assert names == 2 * list(weights(1.0))
        shapes = [tuple(shape) for info in announced for shape in info["shapes"]]
        dtypes = [getattr(torch, name) for info in announced for name in info["dtype_names"]]
        assert [(tuple(t.shape), t.dtype) for t in recorder.sent] == list(zip(shapes, dtypes, strict=True))
        for sent, wanted in zip(recorder.sent, expected.values(), strict=True):
            assert torch.equal(sent, wanted)
    label = f"{engine.replicas.run}-2"
    resets = ["reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"]
    for server in servers:
        end = [call for call in server.control if not call.startswith("update_weights")]
        assert end[-9:] == ["pause wait", f"version {label}-loading", "start_weight_update", "finish_weight_update"] + [
            *resets,
            f"version {label}",
            "resume",
        ]
    assert len(engine.generate(prompts(4))) == 4 and counts(engine) == {}


def test_a_server_that_fails_an_update_is_left_out_until_the_next_one(made) -> None:
    """The weights are nowhere but in the trainer: it must wait, and gets a new communicator then."""
    engine, (bad, good), recorders = made
    engine.load_weights(iter(weights(1.0).items()))
    bad.reload_status = 500
    stream = iter(weights(2.0).items())
    engine.load_weights(stream)
    assert next(stream, None) is None
    assert counts(engine) == {"taken_out": 1}
    bad.reload_status = 200
    before = bad.num_answers
    assert len(engine.generate(prompts(6))) == 6
    assert bad.num_answers == before and good.num_answers == 6
    engine.load_weights(iter(weights(3.0).items()))
    assert len(recorders) == 3 and len(told(bad, "init_weight_transfer_engine")) == 2
    engine.generate(prompts(6))
    assert bad.num_answers > before, "it is asked again"
    # A sender that went away in the middle of an update leaves it open.
    bad.version, bad.paused = "another-run-loading", True
    bad.is_half_loaded = bad.is_update_open = True
    before = bad.num_answers
    engine.load_weights(iter(weights(4.0).items()))
    engine.generate(prompts(6))
    assert bad.num_answers > before and counts(engine) == {"taken_out": 1}


def test_no_server_that_takes_weights_is_an_error(made) -> None:
    engine, servers, _ = made
    for server in servers:
        server.reload_status = 500
    with pytest.raises(UserError, match="no vLLM server took the new weights: .*/update_weights answered 500"):
        engine.load_weights(iter(weights(1.0).items()))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="the core environment only")
def test_without_vllm_the_error_names_the_way_out() -> None:
    with pytest.raises(UserError, match="--weight-transfer directory"):
        vllm_connect()
