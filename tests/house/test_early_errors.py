"""A wrong option ends a run before a platform is started: no memory of a GPU is taken, and no weight is read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr import train
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from models.qwen2_5_vl import hf_weights


class Started(Exception):
    """The platform would be started now."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_ktr.distributed.platform import start

    start("cpu")
    folder = tmp_path_factory.mktemp("early") / "model"
    save_tiny_model(folder, corpus=corpus(), hidden_size=64, ffn_size=96, num_layers=2, num_heads=4, num_kv_heads=2)
    return folder


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was reached of that which takes memory or time."""
    found: list[str] = []

    def start(name: str = "auto") -> None:
        found.append("platform")
        raise Started

    def read(*_: Any, **__: Any) -> None:
        found.append("weights")
        raise Started

    monkeypatch.setattr(train.platforms, "start", start)
    monkeypatch.setattr(train, "init_parallel", lambda *_, **__: found.append("groups"))
    monkeypatch.setattr(hf_weights.SafetensorsReader, "read", read)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return found


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown option": (["--no-such-option", "1"], "unknown flag"),
    "unknown value": (["--engine", "magic"], "engine"),
    "no number": (["--lr", "fast"], "lr"),
    "beyond its limits": (["--top-p", "1.5"], "top.p"),
    "contradiction": (["--sequence-parallel"], "sequence.parallel"),
    "option of another engine": (["--replay-path", "rollouts.jsonl", "--engine", "hf"], "replay.path"),
    "two precisions": (["--bf16", "--fp16"], "contradict"),
    "more ranks than there are": (["--tensor-model-parallel-size", "2"], "tensor.model.parallel.size"),
    "layers that do not divide": (["--pipeline-model-parallel-size", "3"], "pipeline"),
    "prompts that do not divide": (["--prompts-per-step", "3", "--micro-batch-groups", "2"], "micro.batch.groups"),
    "no model": (["--model", "no/such/directory"], "no/such/directory"),
    "a file as run directory": (["--run-dir", "{model}/config.json"], "is a file"),
    "a run directory with something in it": (["--run-dir", "{model}"], "is not empty"),
    "nothing to resume": (["--resume", "--run-dir", "{model}/none"], "no complete checkpoint"),
    "a reward that is not there": (["--reward-functions", "accuracy,no_such_module:reward"], "no_such_module"),
    "an engine that is not there": (["--engine", "vllm_colocated"], "needs vLLM"),
    "no chat template": (["--chat-template", "no/such/template"], "no/such/template"),
    "odd frames": (["--video-max-frames", "3"], "video.max.frames"),
    "contradicting pixels": (["--video-min-pixels", "1000000", "--video-max-pixels", "1000"], "pixels"),
    "no run file": (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
}


def options(model: Path, run_dir: Path, *others: str) -> list[str]:
    given = ["--model", str(model), "--data-path", "questions.json", "--engine", "hf", "--platform", "cpu"]
    return [*given, "--train-steps", "1", "--run-dir", str(run_dir), *(text.format(model=model) for text in others)]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_ends_the_run_before_a_device_is_touched(
    model: Path, tmp_path: Path, reached: list[str], name: str
) -> None:
    given, words = WRONG[name]
    if words == "needs vLLM" and importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match=words):
        train.main(options(model, tmp_path / "run", *given))
    assert reached == [] and not (tmp_path / "run").exists()


def test_right_options_reach_the_platform_and_have_read_no_weight(
    model: Path, tmp_path: Path, reached: list[str]
) -> None:
    with pytest.raises(Started):
        train.main(options(model, tmp_path / "run"))
    assert reached == ["platform"]


def test_a_model_whose_weights_do_not_fit_ends_the_run_before_a_device_is_touched(
    model: Path, tmp_path: Path, reached: list[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    for manifest in broken.glob("*manifest*"):
        manifest.unlink()
    config = json.loads((broken / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing"):
        train.main(options(broken, tmp_path / "run"))
    assert reached == []
