"""Who may use a server: what the middleware lets pass, how the start command is told the token, where it listens."""

from __future__ import annotations

import asyncio
import json
import os
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.errors import UserError, run_cli
from megatron_ktr.rollout.server import guard
from megatron_ktr.rollout.server.serve import arguments, check_reach, early_options, split_token
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.web.address import ApiKey, is_loopback

TOKEN = "t0ken-of-enough-length"
CONTROL = ["/pause", "/collective_rpc", "/update_weights", "/server_info", "/v1/models", "/health/", "/metrics", "/"]


def ask(app: Any, path: str, *, method: str = "POST", kind: str = "http", **headers: str) -> int | str:
    """The status that a request gets; 200 is that of the app behind the guard."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        raise AssertionError("the body of a request that is refused is not waited for")

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": raw, "root_path": ""}
    asyncio.run(app(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"]
    assert TOKEN not in str(sent)
    return sent[0]["status"]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def make(source: str) -> guard.Guard:
        monkeypatch.setenv("THE_TOKEN", TOKEN)
        monkeypatch.setenv(guard.SOURCE, source)
        return guard.Guard(app)

    return make


def test_every_route_but_health_wants_the_token(guarded) -> None:
    app = guarded("env THE_TOKEN")
    for path in CONTROL:
        for wrong in ("", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer ü"):
            assert ask(app, path, Authorization=wrong) == 401, (path, wrong)
        assert ask(app, path) == 401 and ask(app, path, method="OPTIONS") == 401
        assert ask(app, path, Authorization=f"Bearer {TOKEN}") == 200
        assert ask(app, path, Authorization=f"bearer {TOKEN}") == 200, "the scheme has no case"
    assert ask(app, "/health", method="GET") == 200 and ask(app, "/health") == 401
    assert ask(app, "/v1/realtime", kind="websocket") == "websocket.close"


def test_without_a_token_web_pages_are_kept_out(guarded) -> None:
    app = guarded("")
    assert ask(app, "/pause", Origin="http://somewhere") == 403
    assert ask(app, "/pause") == 200
    # A page reads without an Origin what its own name leads to; that name is the host.
    for host in ("somewhere", "somewhere:8000", "127.0.0.1.somewhere", "localhost.somewhere:80", "10.0.0.1", "[", ""):
        assert ask(app, "/server_info", method="GET", Host=host) == 403, host
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "127.0.1.1", "[::1]:8000"):
        assert ask(app, "/server_info", method="GET", Host=host) == 200, host


def test_a_token_comes_from_a_place_and_is_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    found = guard.read_token(f"file {file}")
    assert found is not None and found.is_in(f"Bearer {TOKEN}") and TOKEN not in repr(found)
    for bad in (b"", b"\n", b"two words of it\n", b"two\nlines-of-it\n", b"\xff" * 20, b"x" * 5000, b"short\n"):
        file.write_bytes(bad)
        with pytest.raises(UserError) as refused:
            guard.read_token(f"file {file}")
        assert "--token-file" in str(refused.value) and "words" not in str(refused.value)
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="--token-file"):
            guard.read_token(f"file {wrong}")
    monkeypatch.setenv("SHORT", "secret")
    for name in ("SHORT", "NOT_SET", TOKEN):
        with pytest.raises(UserError, match="--token-env") as refused:
            guard.read_token(f"env {name}")
        assert "secret" not in str(refused.value) and TOKEN not in str(refused.value)
    with pytest.raises(TypeError):
        ApiKey(TOKEN).__reduce__()


def test_a_secret_is_hidden_wherever_a_library_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In tracebacks, the last line of a command, and the incidents of a run."""
    secret = "canary-5ecret-of-enough-length"
    ApiKey(secret)

    def main() -> None:
        raise RuntimeError(f"a library shows {secret}")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    shown = capsys.readouterr().err
    assert ended.value.code == 70 and "Traceback" in shown and shown.count("a library shows ***") >= 2
    Incidents(tmp_path).add("server", f"it said {secret}", step=3, url=f"http://x/{secret}")
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "it said ***" and json.loads(line)["url"] == "http://x/***"
    assert secret not in shown + line


def test_the_start_command_takes_the_place_of_the_token_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert split_token(["model", "--token-env", "NAME", "--port=1"]) == (["model", "--port=1"], "env NAME")
    assert split_token(["model", "--token-file=/a/b"]) == (["model"], "file /a/b")
    assert split_token(["model"]) == (["model"], "")
    for wrong in (["--token-env"], ["--token-env", "--port"], ["--token-env", "A", "--token-file", "b"]):
        with pytest.raises(UserError, match="token"):
            split_token(["model", *wrong])
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)
    assert split_token(["model"]) == (["model"], "env VLLM_API_KEY"), "vLLM's own key opens some routes only"
    with pytest.raises(UserError, match="given twice"):
        split_token(["model", "--token-env", "NAME"])


def test_other_addresses_than_loopback_need_a_token() -> None:
    def options(**changes: Any) -> Any:
        values = dict(api_key=None, middleware=[guard.PATH], grpc=False, grpc_port=None, uds=None, host="127.0.0.1")
        return types.SimpleNamespace(**values | changes)

    found = arguments(["model"], on_cpu=True)
    assert found[found.index("--host") + 1] == "127.0.0.1" and found[found.index("--middleware") + 1] == guard.PATH
    check_reach(options(), has_token=False)
    check_reach(options(host=None, uds="/run/x"), has_token=False)
    for host in (None, "", "0.0.0.0", "::", "10.0.0.1", "node7", "127.0.0.1.example.org"):
        with pytest.raises(UserError, match="--host .*--token-env"):
            check_reach(options(host=host), has_token=False)
        check_reach(options(host=host), has_token=True)
    for wrong in ({"api_key": [TOKEN]}, {"middleware": []}, {"grpc": True}, {"grpc_port": 5}):
        with pytest.raises(UserError) as refused:
            check_reach(options(**wrong), has_token=True)
        assert TOKEN not in str(refused.value)
    for flags in (["--host", "0.0.0.0"], ["--host=0.0.0.0"], ["--api-key", TOKEN], ["--api_key", TOKEN], ["--grpc"]):
        with pytest.raises(UserError) as refused:
            check_reach(early_options(["serve", *arguments(["model", *flags], on_cpu=True)]), has_token=False)
        assert TOKEN not in str(refused.value)
    check_reach(early_options(["serve", *arguments(["model", "--port", "1"], on_cpu=True)]), has_token=False)
    assert [is_loopback(host) for host in ("localhost", "127.1.2.3", "::1", "[::1]", "0.0.0.0")] == [True] * 4 + [False]
