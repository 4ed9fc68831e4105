"""Starts and ends real ``vllm serve`` processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.support.patience import PATIENCE_SECONDS, wait_until


def start_server(model_dir: Path, port: int, log: Path, *flags: str, with_token: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_ktr.rollout.server.serve", str(model_dir), "--port", str(port)]
    command += ["--max-model-len", "1024", *flags, *(["--token-env", "TOKEN_OF_TESTS"] if with_token else [])]
    with log.open("w") as file:
        # A session of its own: killing it takes the engine's process along.
        environment = os.environ | {"TOKEN_OF_TESTS": TOKEN}
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)


TOKEN = "a-token-for-the-tests"


def open_url(url: str, *, token: str = TOKEN, method: str = "GET", data: bytes | None = None) -> bytes:
    """The body of an answer; raises ``HTTPError`` for any status but 200."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    return urllib.request.urlopen(request, timeout=PATIENCE_SECONDS).read()


def wait_for(url: str, process: subprocess.Popen, *, log: Path) -> None:
    def is_healthy() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=PATIENCE_SECONDS)
            return True
        return False

    wait_until(is_healthy, pause_seconds=0.5)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
