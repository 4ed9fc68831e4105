"""A run whose servers go away in a step or an evaluation: the state before it is saved, and a resumed run gives the
numbers of one that was never disturbed. What it leaves behind has no secrets in it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import StepAbandoned
from megatron_ktr.files.checksums import file_digest
from megatron_ktr.run.directory import list_checkpoints
from megatron_ktr.train import train
from tests.support.fake_server import FakeServer
from tests.support.patience import wait_until

PROMPTS = 4
CANARY = "canary-f00d-of-the-token"
SAME = (
    "step",
    "loss",
    "grad_norm",
    "reward_mean",
    "response_length",
    "key_token_ratio",
    "learning_rate",
    "num_skipped",
)
FOR_EVER, NOT_AT_ALL = 10_000.0, 0.0


def uneven_reward(response: str, record: dict) -> float:
    return len(response) % 5 / 5


def train_once(context, *, values: dict[str, Any], signal_file: str = "") -> str:
    """The run's exit code, or its error. A signal is sent to every rank once ``signal_file`` is there."""
    if signal_file:

        def send() -> None:
            while not os.path.exists(signal_file):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
    os.environ["TOKEN_OF_TEST"] = CANARY
    try:
        return str(train(config_from_values(values)))
    except StepAbandoned as error:
        assert error.is_on_every_rank
        return str(error)


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """What every step trained on and did, without how fast it was and how often servers were asked."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in SAME} for row in rows]


@pytest.mark.slow
def test_a_step_without_servers_is_given_up_saved_before_and_done_again(ranks, tmp_path: Path) -> None:
    """On two replicas, first because no server comes back in time, then because the run is asked to leave while it
    waits for one."""
    save_tiny_model(tmp_path / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(tmp_path / "data", num_train=8, num_eval=1)
    server = FakeServer()
    server.token = CANARY
    values = {
        "model": str(tmp_path / "model"),
        "data_path": str(tmp_path / "data" / "train.json"),
        "prompt_template": str(tmp_path / "model" / "prompt_template.txt"),
        "video_num_frames": 2,
        "video_max_pixels": 3136,
        "engine": "vllm_server",
        "server_urls": (server.url,),
        "server_max_retries": 0,
        "server_token_env": "TOKEN_OF_TEST",
        "check_sampler": False,
        "num_generations": 2,
        "max_response_length": 6,
        "top_p": 1.0,
        "reward_functions": ("accuracy", f"{__name__}:uneven_reward"),
        "reward_workers": 0,
        "length_bonus": 0.0,
        "kl_beta": 0.0,
        "lr": 0.01,
        "lr_decay_style": "constant",
        "train_steps": 3,
        "prompts_per_step": PROMPTS,
    }

    def run(name: str, **changes: Any) -> Any:
        signal_file = changes.pop("signal_file", "")
        given = values | {"run_dir": str(tmp_path / name)} | changes
        return lambda: ranks(train_once, world_size=2, values=given, signal_file=signal_file)

    assert run("whole")() == ["0", "0"]

    def disturbed(after: int, *, name: str = "disturbed", **changes: Any) -> list[str]:
        """Runs until ``after`` answers are given and the others of the step are waited for; then the server dies."""
        server.restart() if server._is_dead.is_set() else None
        server.hold(after=after)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(run(name, **changes)()), daemon=True)
        thread.start()
        wait_until(lambda: server.running + server.num_answers >= after + 1 and server._num_allowed <= 0)
        server.kill()
        if "signal_file" in changes:
            Path(changes["signal_file"]).touch()
        thread.join()
        server.num_answers = 0
        return found[0]

    server.num_answers = 0
    first = disturbed(PROMPTS + 1, server_wait_minutes=NOT_AT_ALL)
    assert all("no vLLM server is left" in text or "failed" in text for text in first)
    assert all("saved after step 1, continue with --resume" in text for text in first)
    assert [step for step, _ in list_checkpoints(tmp_path / "disturbed")] == [1], "there is no --save-interval"
    go = tmp_path / "go"
    again = disturbed(PROMPTS + 1, server_wait_minutes=FOR_EVER, signal_file=str(go), resume=True)
    assert again == ["75", "75"]
    assert [step for step, _ in list_checkpoints(tmp_path / "disturbed")] == [1, 2]
    # In the evaluation before the first step, too.
    asked: dict[str, Any] = dict(eval_data=(str(tmp_path / "data" / "eval.json"),), eval_at_start=True)
    asked |= dict(server_wait_minutes=FOR_EVER, signal_file=str(tmp_path / "go again"))
    assert disturbed(0, name="asked at the start", **asked) == ["75", "75"]
    server.restart()
    assert run("disturbed", resume=True)() == ["0", "0"]
    server.kill()
    assert steps_of(tmp_path / "disturbed") == steps_of(tmp_path / "whole")
    weights = [tmp_path / name / "export" / "model.safetensors" for name in ("whole", "disturbed")]
    assert file_digest(weights[0]) == file_digest(weights[1])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not [text for text in first if CANARY in text]
