"""What tests of evaluation share: a model, and the server that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.serving import kill, start_server, wait_for
from tests.support.speaking_model import save_speaking_model


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speaking") / "model"
    save_speaking_model(directory)
    return directory


@pytest.fixture(scope="package")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of ``vllm serve`` with the model, which takes frames as images and as videos."""
    pytest.importorskip("vllm", reason="the vLLM environment only")
    port = free_port()
    log = tmp_path_factory.mktemp("served") / "log"
    process = start_server(model_dir, port, log, "--trust-request-mm-kwargs")
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log=log)
        yield f"http://127.0.0.1:{port}"
    finally:
        kill(process)
