"""What a run's options make of the server engine, and what the start command adds to ``vllm serve``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.server.broadcast import _chunks
from megatron_ktr.rollout.server.engine import server_engine
from megatron_ktr.rollout.server.serve import arguments
from tests.rollout.test_server_pool import MEDIA, SAMPLING, prompts, tensors
from tests.support.fake_server import FakeServer
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import tiny_hf_config
from tests.support.tokenizer import tiny_tokenizer


def engine_of(folder: Path, servers: list[FakeServer], *, sampling: SamplingSettings = SAMPLING, **options):
    tiny_hf_config().save_pretrained(folder / "model")
    urls = tuple(f"{server.url}/" for server in servers) + (servers[0].url,)
    values = {"model": str(folder / "model"), "engine": "vllm_server", "run_dir": str(folder / "run")}
    config = config_from_values(values | {"server_urls": urls, "server_timeout_seconds": PATIENCE_SECONDS} | options)
    return server_engine(
        config.model.model,
        rollout=config.rollout,
        run_dir=Path(config.trainer.run_dir),
        data_group=None,
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=sampling,
        gap_limit=0.05,
    )


def test_a_run_on_cpu_sends_weights_through_its_own_directory(tmp_path: Path) -> None:
    left = tmp_path / "run" / "server_weights" / "of-a-run-that-was-cut-off"
    left.mkdir(parents=True)
    servers = [FakeServer(), FakeServer()]
    engine = engine_of(tmp_path, servers)
    assert not left.exists()
    engine.load_weights(tensors(1.0))
    assert [server.control.count("reload") for server in servers] == [1, 1], "an address given twice is one server"
    assert (tmp_path / "run" / "server_weights" / f"{engine.replicas.run}-1").is_dir()
    assert len(engine.generate(prompts(3))) == 3
    engine.close()
    for server in servers:
        server.kill()


def test_another_directory_keeps_what_is_in_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "somebody-else").mkdir(parents=True)
    server = FakeServer()
    engine = engine_of(tmp_path, [server], weight_directory=str(shared))
    engine.load_weights(tensors(1.0))
    engine.close()
    assert [path.name for path in shared.iterdir()] == ["somebody-else"]
    server.kill()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="the core environment only")
def test_sending_from_gpu_to_gpu_needs_vllm_here(tmp_path: Path) -> None:
    server = FakeServer()
    with pytest.raises(UserError, match="--weight-transfer directory"):
        engine_of(tmp_path, [server], weight_transfer="nccl")
    server.kill()


def test_a_server_without_encoder_is_refused_where_pixels_are_sent(tmp_path: Path) -> None:
    server = FakeServer()
    server.multimodal = {"enable_mm_embeds": True, "limit_per_prompt": {"image": {"count": 0}, "video": {"count": 0}}}
    with pytest.raises(UserError, match="has no vision encoder.*--share-vision-features"):
        engine_of(tmp_path, [server])
    engine_of(tmp_path, [server], share_vision_features=True).close()
    server.kill()


def test_tensors_are_announced_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ktr.rollout.server.broadcast.CHUNK_BYTES", 30)
    named = list(tensors(1.0)) + list(tensors(2.0))  # 24, 16, 24, 16 bytes
    assert [[tensor.nbytes for _, tensor in chunk] for chunk in _chunks(iter(named))] == [[24], [16], [24], [16]]
    monkeypatch.setattr("megatron_ktr.rollout.server.broadcast.CHUNK_BYTES", 40)
    assert [[tensor.nbytes for _, tensor in chunk] for chunk in _chunks(iter(named))] == [[24, 16], [24, 16]]
    assert list(_chunks(iter([]))) == []


def test_the_start_command_adds_what_is_not_given() -> None:
    found = arguments(["model", "--port", "1", "--dtype=bfloat16", "--mm-device-do-normalize"], on_cpu=True)
    assert found[:5] == ["model", "--port", "1", "--dtype=bfloat16", "--mm-device-do-normalize"]
    assert "--enable-scale-out" in found and found[found.index("--logprobs-mode") + 1] == "raw_logprobs"
    assert "--no-mm-device-do-normalize" not in found and "--dtype" not in found, "what is given wins"
    assert "--kv-cache-memory-bytes" in found
    assert "--kv-cache-memory-bytes" not in arguments(["model"], on_cpu=False), "GPUs are sized by vLLM"
    on_gpu = arguments(["model"], on_cpu=False)
    assert json.loads(on_gpu[on_gpu.index("--weight-transfer-config") + 1]) == {}, "vLLM's default backend, NCCL"
    assert "--weight-transfer-config" not in found and "--no-enable-chunked-prefill" in found
    with pytest.raises(UserError, match="usage: .*MODEL"):
        arguments(["--port", "1"], on_cpu=True)
