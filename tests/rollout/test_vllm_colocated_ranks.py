"""Training with the colocated vLLM engine in one and in four gloo ranks, engines of several ranks, and the export."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.errors import UserError
from tests.support.colocated import MEAN_TOLERANCE, STEPS, check, make_side, settings, write_inputs

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    return write_inputs(tmp_path_factory.mktemp("colocated"))


def train_alone(context: Any, *, inputs: Path, out: Path) -> None:
    from megatron_ktr.train import train

    train(settings(inputs, out / "whole"))
    train(settings(inputs, out / "resumed", train_steps=2))
    train(settings(inputs, out / "resumed", resume=True))
    train(settings(inputs, out / "features", share_vision_features=True, save_interval=0))


def train_by_objective(context: Any, *, inputs: Path, out: Path, rewards: dict[str, str]) -> None:
    """With every objective, and the reward that it is given."""
    from megatron_ktr.train import train

    for objective, reward in rewards.items():
        options = dict(objective=objective, reward_functions=("accuracy", f"tests.support.colocated:{reward}"))
        train(settings(inputs, out / objective, train_steps=1, save_interval=0, **options))


def in_four_ranks(context: Any, *, inputs: Path, out: Path) -> dict[str, Any]:
    """Training from TP2 x PP2 shards, and engines of one and of four ranks; what the last stages found."""
    from megatron_ktr.distributed.groups import ParallelSizes
    from megatron_ktr.train import train

    shards = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    train(settings(inputs, out / "run", rollout_tensor_parallel_size=2, save_interval=0, **shards))
    train(settings(inputs, out / "features", share_vision_features=True, train_steps=1, save_interval=0, **shards))
    found: dict[str, Any] = {}
    layouts = {
        "4 engines, 1 replica": (shards, ParallelSizes(tensor=2, pipeline=2), 1),
        "1 engine, 2 replicas": ({"tensor_model_parallel_size": 2}, ParallelSizes(tensor=2), 4),
    }
    for name, (options, sizes, engine_size) in layouts.items():
        side = make_side(settings(inputs, out / "unused", **options), context.init(sizes))
        side.change_weights(1.1)
        if engine_size == 1:
            with pytest.raises(UserError, match="--rollout-tensor-parallel-size 3 must divide"):
                side.engine(rollout_tensor_parallel_size=3)
        engine = side.engine(rollout_tensor_parallel_size=engine_size)
        engine.load_weights(side.policy.export(gather_to=engine.gather_weights_to))
        groups = engine.generate(side.prompts)
        assert bool(groups) == side.policy.ranks.is_source
        found[name] = {
            "problems": [group.prompt.problem_id for group in groups],
            "responses": sum(len(group.rollouts) for group in groups),
            "difference": side.difference(groups),
        }
        # Only the first replica has a second prompt; engines that several replicas share answer it all the same.
        more = [dataclasses.replace(side.prompts[2], variant="shuffled")] if side.policy.ranks.data_rank == 0 else []
        twice = dict(engine.stream([*side.prompts, *more], counts=[3, 3, 3, *[2 for _ in more]]))
        tokens = [[rollout.token_ids for rollout in twice[place].rollouts] for place in sorted(twice)]
        assert tokens[: len(groups)] == [[rollout.token_ids for rollout in group.rollouts] for group in groups]
        assert [len(responses) for responses in tokens[3:]] == [2 for _ in more if groups]
        if engine_size == 1:
            # One engine refuses its part; the others learn it instead of waiting for answers.
            long = dataclasses.replace(side.prompts[2], problem_id="long", token_ids=side.prompts[2].token_ids * 200)
            with pytest.raises(UserError, match="prompt long has 400 tokens"):
                engine.generate([*side.prompts, long])
            assert [group.rollouts for group in engine.generate(side.prompts)] == [group.rollouts for group in groups]
        engine.close()
    return found


@pytest.fixture(scope="module")
def four_ranks(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("four")
    return out, ranks(in_four_ranks, world_size=4, inputs=inputs, out=out)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_run(run_dir: Path, *, num_steps: int = STEPS) -> None:
    steps = metrics(run_dir)
    assert [step["has_stepped"] for step in steps] == [1.0] * num_steps
    assert [step["num_prompts"] for step in steps] == [2.0] * num_steps
    for step in steps:
        print(f"step {step['step']}: gap {step['sampler_trainer_logprob_gap']:.1e}, grad norm {step['grad_norm']:.2f}")
        assert step["sampler_trainer_logprob_gap"] < MEAN_TOLERANCE
        assert 0 < step["key_token_ratio"] <= 1


def test_video_ktr_trains_from_two_by_two_shards_with_engines_of_two_ranks(four_ranks) -> None:
    out, _ = four_ranks
    check_run(out / "run")
    assert (out / "run" / "export" / "model.safetensors").exists()


def test_engines_on_every_stage_answer_with_the_trainers_vision_features(four_ranks) -> None:
    out, _ = four_ranks
    check_run(out / "features", num_steps=1)


@pytest.mark.parametrize("layout", ["4 engines, 1 replica", "1 engine, 2 replicas"])
def test_shares_of_the_work_come_back_to_the_ranks_that_read_the_prompts(four_ranks, layout) -> None:
    _, results = four_ranks
    found = [result[layout] for result in results]
    readers = [0] if layout == "4 engines, 1 replica" else [0, 2]
    for rank, result in enumerate(found):
        assert result["responses"] == (9 if rank in readers else 0)
    differences = [result["difference"] for result in found if result["difference"] is not None]
    assert differences
    for difference_R in differences:
        check(difference_R)
    problems = [tuple(found[rank]["problems"][:2]) for rank in readers]
    assert len(set(problems)) == len(readers), "each replica has prompts of its own"


@pytest.fixture(scope="module")
def one_rank_runs(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    ranks(train_alone, world_size=1, inputs=inputs, out=out)
    return out


@pytest.mark.parametrize("run", ["whole", "features"])
def test_video_ktr_trains_in_one_process_on_pixels_and_on_features(one_rank_runs, run) -> None:
    check_run(one_rank_runs / run)


def test_objectives_that_ask_engines_for_more_get_it(ranks: Any, inputs: Path, tmp_path: Path) -> None:
    """T-GRPO asks a second time with shuffled frames, DAPO once more for each group of equal rewards."""
    rewards = {"t_grpo": "uneven_reward", "dapo": "half_of_the_records"}
    ranks(train_by_objective, world_size=1, inputs=inputs, out=tmp_path, rewards=rewards)
    for objective, count in {"t_grpo": "shuffled/prompts", "dapo": "filter/rejected"}.items():
        check_run(tmp_path / objective, num_steps=1)
        assert metrics(tmp_path / objective)[0][count] >= 1


def test_a_resumed_run_repeats_the_rollouts(one_rank_runs) -> None:
    name = f"rollouts/step_{STEPS:08d}.jsonl"
    whole, resumed = ((one_rank_runs / run / name).read_text() for run in ("whole", "resumed"))
    assert whole == resumed and len(whole.splitlines()) == 2
    assert metrics(one_rank_runs / "whole")[-1]["loss"] == metrics(one_rank_runs / "resumed")[-1]["loss"]


def test_the_export_of_a_run_is_a_model_vllm_starts_from(
    four_ranks, one_rank: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``vllm serve`` would by default: pixels are normalised in the model, by what the export's files say."""
    from megatron_ktr.rollout.colocated import engine as vllm_colocated
    from models.qwen2_5_vl.conversion import load_hf_weights

    start = partial(vllm_colocated.start_vllm_on_cpu, mm_device_do_normalize=True)
    monkeypatch.setattr(vllm_colocated, "start_vllm_on_cpu", start)

    out, _ = four_ranks
    side = make_side(settings(inputs, tmp_path), one_rank)
    export = out / "run" / "export"
    load_hf_weights(side.policy.bare_chunks, export, ranks=side.policy.ranks)
    side.policy.vision.forget()
    engine = side.engine(model=str(export))  # no weights are sent: it has them from the directory
    check(side.difference(engine.generate(side.prompts)))
    engine.close()
