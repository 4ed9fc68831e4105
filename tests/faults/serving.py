"""Faults of rollout servers: two stand-ins answer wrongly, break connections, die and come back while a batch runs.

The stand-in's answers are a function of prompt, seed and weights (``tests/support/fake_server.py``), so what comes back
after any fault must be what two servers that behave would have said with the same weights.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.server.engine import ServerEngine
from megatron_ktr.rollout.server.pool import PoolSettings
from megatron_ktr.rollout.server.replicas import Replicas
from megatron_ktr.rollout.server.weights import DirectoryTransfer
from megatron_ktr.types import Prompt
from tests.faults.world import Fault, World
from tests.support.fake_server import MISBEHAVIOUR, FakeServer
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, tiny_hf_config
from tests.support.tokenizer import tiny_tokenizer

MEDIA = MediaSpec(IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, 14, 2, 2, positions=lambda *a, **k: None, patchify=lambda *a: None)
NUM_PROMPTS = 12


def serving(world: World, rng: random.Random, folder: Path) -> Fault:
    """Three steps with new weights each; in every step one server misbehaves. The fault counts as that of the first
    step in which the batch met it."""
    del world
    servers, calm = [FakeServer(), FakeServer()], FakeServer()
    engine, expected = _engine(servers, folder / "faulted"), _engine([calm], folder / "expected")
    kinds = []
    try:
        for step in range(1, 4):
            for one in (engine, expected):
                one.load_weights(_tensors(step / 4))
            victim = rng.choice(servers)
            kind = rng.choice(("answers wrongly", "dies and comes back"))
            if kind == "answers wrongly":
                acts = [rng.choice((*MISBEHAVIOUR, "drop", "500", "503")) for _ in range(rng.randint(1, 3))]
                victim.script.extend(acts)
                found = engine.generate(_prompts(), step=step)
                has_fired = len(victim.script) < len(acts)
            else:
                found, has_fired = _while_one_dies(engine, victim, rng, step=step)
                victim.restart()
            wanted = expected.generate(_prompts(), step=step)
            assert found == wanted, f"I2: step {step}: responses of other weights or prompts after: {kind}"
            kinds += [kind] if has_fired else []
    finally:
        for server in (*servers, calm):
            server.release()
        for one in (engine, expected):
            one.close()
        for server in (*servers, calm):
            server.kill()
    assert not list((folder / "faulted").rglob(".*")), "I4: scratch files of weights are left"
    return Fault(f"server {kinds[0] if kinds else 'misbehaves'}, of three in a run", bool(kinds))


def _while_one_dies(engine: ServerEngine, victim: FakeServer, rng: random.Random, *, step: int) -> tuple[Any, bool]:
    """The server dies after a drawn number of answers. Returns the responses, and whether the batch was under way."""
    victim.hold(after=rng.randint(0, 4))
    found = []
    thread = threading.Thread(target=lambda: found.append(engine.generate(_prompts(), step=step)), daemon=True)
    thread.start()
    threading.Event().wait(rng.uniform(0.0, 0.1))
    has_fired = thread.is_alive()
    victim.kill()
    thread.join(PATIENCE_SECONDS)
    assert found, "I4: the batch does not end, or failed"
    return found[0], has_fired


def _engine(servers: list[FakeServer], folder: Path) -> ServerEngine:
    tiny_hf_config().save_pretrained(folder / "model")
    urls = tuple(server.url for server in servers)
    replicas = Replicas()
    return ServerEngine(
        folder / "model",
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=SamplingSettings(num_generations=3, max_response_length=12, seed=7),
        transfer=DirectoryTransfer(folder / "weights", owned_urls=replicas.own(list(urls)), replicas=replicas),
        replicas=replicas,
        settings=PoolSettings(urls=urls, timeout_seconds=PATIENCE_SECONDS, backoff_seconds=0.01, probe_seconds=0.05),
    )


def _prompts() -> list[Prompt]:
    return [Prompt(f"p{index}", (10, 20, 30 + index)) for index in range(NUM_PROMPTS)]


def _tensors(value: float) -> Iterator[tuple[str, torch.Tensor]]:
    yield "a.weight", torch.full((3, 2), value)
    yield "b.weight", torch.zeros(4)
