"""Evaluation between steps by vLLM inside the training ranks: two replicas share one engine of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from tests.evaluation.test_in_training import answers, evaluated, settings, train_all

pytestmark = pytest.mark.vllm

NUM_QUESTIONS = 7
"""Four for one replica and three for the other, three at a time: in the last round the second has nothing to ask."""


def test_answers_are_those_of_hugging_face_with_pixels_and_with_the_trainers_features(ranks, tmp_path) -> None:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    save_tiny_model(tmp_path / "model", corpus=corpus(), num_layers=2)
    make_dataset(tmp_path / "data", num_train=4, num_eval=NUM_QUESTIONS)
    common = {
        "prompt_template": str(tmp_path / "model" / "prompt_template.txt"),
        "data_path": str(tmp_path / "data" / "train.json"),
        "objective": "grpo",
        "loss_aggregation": "sequence",
        "image_max_pixels": 3136,
        "max_prompt_length": 256,
        "max_response_length": 12,
        "rollout_kv_cache_gb": 0.03,
        "reward_functions": ("tests.support.colocated:uneven_reward",),
        "reward_workers": 0,
        "prompts_per_step": 2,
        "train_steps": 1,
        "platform": "cpu",
        "eval_data": (str(tmp_path / "data" / "eval.json"),),
        "eval_interval": 1,
        "eval_at_start": True,
        "eval_temperature": 0.0,
    }
    colocated = {"engine": "vllm_colocated", "rollout_tensor_parallel_size": 2}
    runs = {"hf": {}, "vllm": colocated, "features": {**colocated, "share_vision_features": True}}
    ranks(
        train_all,
        world_size=2,
        configs=[settings(tmp_path, tmp_path / name, **{**common, **changes}) for name, changes in runs.items()],
    )
    for name in runs:
        assert list(evaluated(Path(tmp_path / name))) == [0, 1]
        found = answers(tmp_path / name, 0)
        assert len(found) == NUM_QUESTIONS and found == answers(tmp_path / "hf", 0)
        assert answers(tmp_path / name, 1) != found, "the step's own weights"
