"""vLLM's first model runner: chosen where we start an engine, required where one sleeps, the same on all servers."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.rollout.colocated.engine import start_vllm_on_gpu
from megatron_ktr.rollout.server.serve import prepare
from megatron_ktr.rollout.vllm.runner import VARIABLE, runner_named_by
from tests.rollout.test_server_setup import engine_of
from tests.support.fake_server import FakeServer


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM reads is put back afterwards."""
    for name in (VARIABLE, "VLLM_SERVER_DEV_MODE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "ERROR")


def test_engines_on_gpus_use_the_first_runner_and_refuse_the_second(environment, monkeypatch) -> None:
    def make(model: str, **options: Any) -> SimpleNamespace:
        # As vLLM 0.32 decides on a GPU, when it is asked to make the engine.
        is_second = os.environ.get(VARIABLE) != "0"
        return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=is_second)))

    vllm = ModuleType("vllm")
    vllm.LLM = make
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    assert start_vllm_on_gpu("model").llm_engine.vllm_config.use_v2_model_runner is False
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(UserError, match=f"{VARIABLE}=1: vLLM's second model runner loses the positions"):
        start_vllm_on_gpu("model")


def test_servers_that_we_start_use_it_too(environment) -> None:
    prepare(on_cpu=False)
    assert os.environ[VARIABLE] == "0"


def test_servers_of_one_run_have_one_runner(tmp_path: Path) -> None:
    assert [runner_named_by(env) for env in ({}, {VARIABLE: False}, {VARIABLE: True})] == [
        "vLLM's default",
        "the first",
        "the second",
    ]
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        server.environment = {VARIABLE: False}
    engine_of(tmp_path, servers).close()
    servers[1].environment = {}
    with pytest.raises(UserError, match="the same seed would give other responses.*start all with VLLM_USE_V2"):
        engine_of(tmp_path, servers)
    for server in servers:
        server.kill()


@pytest.mark.vllm
def test_vllm_still_has_what_the_choice_rests_on(environment, monkeypatch) -> None:
    """Fails where a newer vLLM has mended it: then the second runner can be taken."""
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.mm.rope import RopeState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    monkeypatch.setenv(VARIABLE, "0")
    assert envs.VLLM_USE_V2_MODEL_RUNNER is False and isinstance(VllmConfig.use_v2_model_runner, property)
    assert "init_model_state(" in inspect.getsource(GPUModelRunner.load_model), "made in the pool of the weights"
    assert "self.positions = torch.zeros(" in inspect.getsource(RopeState.__init__)
    assert "self.positions" in inspect.getsource(RopeState.prepare_positions), "only the rows of tokens are written"
