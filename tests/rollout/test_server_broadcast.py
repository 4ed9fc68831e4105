"""Weights from GPU to GPU, with stand-ins for the communicator and the servers: what is announced is what is sent.

vLLM's own receiver takes it apart, on the host. Not run on GPUs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.rollout.server import broadcast as server_broadcast
from megatron_ktr.rollout.server.broadcast import BroadcastTransfer, vllm_connect
from megatron_ktr.rollout.server.engine import ServerEngine
from megatron_ktr.rollout.server.member import PoolSettings
from megatron_ktr.rollout.server.replicas import Replicas
from tests.rollout.test_server_pool import MEDIA, SAMPLING, counts, prompts
from tests.support.fake_server import FakeServer
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.tiny import tiny_hf_config
from tests.support.tokenizer import tiny_tokenizer


class Recorder:
    """A communicator that keeps what it is told to broadcast."""

    def __init__(self, address: str, port: int, world_size: int) -> None:
        self.joined = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        self.sent: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0 and tensor.is_contiguous() and tensor.dtype == torch.uint8
        self.sent.append(tensor.clone())


def weights(value: float) -> dict[str, Tensor]:
    torch.manual_seed(round(value))
    return {
        "first.weight": torch.randn(4, 6).T,  # not contiguous
        "second.bias": torch.randn(5).to(torch.bfloat16),
        "third.weight": torch.full((2, 2), value),
        "third.scale": torch.tensor(value),
    }


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def told(server: FakeServer, route: str) -> list[dict[str, Any]]:
    return [json.loads(call.removeprefix(route)) for call in server.control if call.startswith(f"{route} ")]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServerEngine, list[FakeServer], list]]:
    """An engine with two servers of two workers each; its communicators, as they are made."""
    # Three announcements for four tensors: one by size and two by type.
    monkeypatch.setattr(server_broadcast, "CHUNK_BYTES", 100)
    servers = [FakeServer(), FakeServer()]
    recorders: list[Recorder] = []

    def connect(address: str, port: int, world_size: int) -> Recorder:
        recorders.append(Recorder(address, port, world_size))
        return recorders[-1]

    tiny_hf_config().save_pretrained(tmp_path)
    urls = [server.url for server in servers]
    engine = ServerEngine(
        tmp_path,
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=SAMPLING,
        transfer=BroadcastTransfer(owned_urls=urls, timeout_seconds=PATIENCE_SECONDS, connect=connect),
        replicas=Replicas(),
        settings=PoolSettings(
            urls=tuple(urls), timeout_seconds=PATIENCE_SECONDS, backoff_seconds=0.01, probe_seconds=0.05
        ),
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
    assert all(
        call["init_info"]["packed"] and call["init_info"]["packed_buffer_size_bytes"] == 100 for (call,) in joined
    )
    expected = [*weights(1.0).values(), *weights(2.0).values()]
    for server, recorder in zip(servers, recorders, strict=True):
        announced = [call["update_info"] for call in told(server, "update_weights")]
        assert len(announced) == len(recorder.sent) == 6, "a collective for each announcement"
        names = [name for info in announced for name in info["names"]]
        assert names == 2 * list(weights(1.0))
        shapes = [tuple(shape) for info in announced for shape in info["shapes"]]
        dtypes = [getattr(torch, name) for info in announced for name in info["dtype_names"]]
        assert [(tuple(t.shape), t.dtype) for t in expected] == list(zip(shapes, dtypes, strict=True))
        assert b"".join(map(bytes_of, recorder.sent)) == b"".join(map(bytes_of, expected))
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


def test_nothing_is_sent_to_a_server_that_vanished_between_two_chunks(made) -> None:
    """It has taken one and waits for the next, while the other server is still busy with the first."""
    engine, (gone, slow), recorders = made

    def take_and_vanish(path: str, body: Any, headers: Any, answer: Callable[..., Any] = gone.answer) -> Any:
        found = answer(path, body, headers)
        if path == "/update_weights":
            gone.is_mute = gone.breaks_off_health = True
        return found

    def take_slowly(path: str, body: Any, headers: Any, answer: Callable[..., Any] = slow.answer) -> Any:
        if path == "/update_weights":
            wait_until(lambda: engine.pool._servers[0].is_silent)
        return answer(path, body, headers)

    gone.answer, slow.answer = take_and_vanish, take_slowly
    engine.load_weights(iter(weights(1.0).items()))
    sent = {recorder.joined["master_port"]: len(recorder.sent) for recorder in recorders}
    ports = [told(server, "init_weight_transfer_engine")[0]["init_info"]["master_port"] for server in (gone, slow)]
    assert [sent[port] for port in ports] == [1, 3] and counts(engine) == {"taken_out": 1}
    assert len(engine.generate(prompts(4))) == 4 and slow.num_answers == 4


def test_no_server_that_takes_weights_is_an_error(made) -> None:
    engine, servers, _ = made
    for server in servers:
        server.reload_status = 500
    with pytest.raises(UserError, match="no vLLM server took the new weights: .*/update_weights answered 500"):
        engine.load_weights(iter(weights(1.0).items()))


@pytest.mark.vllm
@pytest.mark.parametrize("chunk_bytes", [1, 20, 100, 1 << 20])
def test_vllms_own_receiver_reads_the_same_bits(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Its ``packed_nccl_broadcast_consumer``, told what the engine tells it, with streams that do nothing."""
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

    class Stream:
        def synchronize(self) -> None: ...

    monkeypatch.setattr(server_broadcast, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda index, count: (Stream(),) * count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    buffer_bytes = NCCLWeightTransferInitInfo(
        master_address="a",
        master_port=1,
        rank_offset=1,
        world_size=2,
        packed=True,
        packed_buffer_size_bytes=chunk_bytes,
    ).packed_buffer_size_bytes
    given = {**weights(3.0), "many": torch.randn(7).to(torch.bfloat16), "odd": torch.randn(3).to(torch.bfloat16)}
    received: dict[str, Tensor] = {}
    for chunk in server_broadcast._chunks(iter(given.items())):
        sent = [server_broadcast._packed([tensor for _, tensor in chunk])]

        class Group:
            def broadcast(self, tensor: Tensor, src: int, sent: list[Tensor] = sent) -> None:
                tensor.copy_(sent.pop())

        packed_tensor.packed_nccl_broadcast_consumer(
            iterator=iter([(name, (list(tensor.shape), tensor.dtype)) for name, tensor in chunk]),
            group=Group(),
            src=0,
            post_unpack_func=received.update,
            buffer_size_bytes=buffer_bytes,
            device="cpu",
        )
        assert not sent, "one collective on either side"
    assert list(received) == list(given)
    for name, tensor in given.items():
        assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor), name


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="the core environment only")
def test_without_vllm_the_error_names_the_way_out() -> None:
    with pytest.raises(UserError, match="--weight-transfer directory"):
        vllm_connect()
