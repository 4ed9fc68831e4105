"""On a GPU (marker ``gpu``): training steps, checkpoints and exports, against the same computed on the host in fp32.

    python -m pytest -m gpu

A process runs on one platform. The host's numbers come from a process of the rank pool, which sees no GPU; ours are
computed here, by the same functions. The other tests marked ``gpu`` are about single kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import RankContext, RankPool
from tests.support.tiny import save_tiny_hf

pytestmark = pytest.mark.gpu

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_te = pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine")
NAMES = ("mixed", "text", "long video", "image")
LOCAL = {"transformer_impl": "local"}
TE = {"transformer_impl": "te"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def device() -> Iterator[RankContext]:
    """This process as the one rank of a GPU run."""
    from megatron_ktr.distributed import platform
    from megatron_ktr.distributed.groups import destroy_parallel

    if platform._platform is not None and platform._platform.name == "cpu":
        pytest.skip("this process already runs on CPU, for tests that are not of the marker: pytest -m gpu")
    # Anything else that is wrong with the GPU fails.
    platform.start("cuda").seed(0)
    yield RankContext(rank=0, world_size=1)
    destroy_parallel()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 16, every size a multiple of 16: what flash kernels and FP8 take."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_hf(directory, num_layers=2, vocab_size=208, vision_ffn_size=48)
    return directory


def steps(
    context: RankContext, *, hf_dir: Path, values: dict[str, Any], masks: Any = None, num_steps: int = 2
) -> list[Any]:
    """Records of training steps, every tensor in them on the host in fp32."""
    from torch.utils._pytree import tree_map_only

    from tests.support.steps import example_groups, run_steps

    records = run_steps(
        context.init(),
        hf_dir=hf_dir,
        rollout_groups=example_groups(*NAMES),
        values={"platform": "auto", **values},
        masks=masks,
        num_steps=num_steps,
    )
    for record in records:
        for name in ("scores", "chosen", "weights"):
            setattr(record, name, tree_map_only(torch.Tensor, _host, getattr(record, name)))
        for update in record.updates:
            update.gradients = tree_map_only(torch.Tensor, _host, update.gradients)
    return records


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu() if tensor.dtype in (torch.bool, torch.int64) else tensor.float().cpu()


FP32_CASES: dict[str, dict[str, Any]] = {
    "video_ktr": {},
    "kl scores, two updates": dict(shift="kl", updates_per_rollout=2, num_shuffles=2),
    "recompute": dict(**RECOMPUTE, recompute_vision=True, shuffle_unit="temporal_patch"),
    "frames, head in torch": dict(vision_parallel="frame", token_statistics_impl="chunked"),
    "frozen encoder, all tokens": dict(freeze=("vision", "merger"), objective="grpo"),
    "tw_grpo": dict(objective="tw_grpo", loss_aggregation="token"),
}


@pytest.mark.parametrize("name", FP32_CASES)
def test_fp32_steps_equal_the_host(name: str, device: RankContext, model: Path, ranks: RankPool) -> None:
    """fp32 on both sides: sums in another order. As between layouts on CPU, a decade wider for kernels that fuse
    multiplication and addition; the tokens are those the host chose."""
    from tests.support.steps import compare_steps

    values = {**LOCAL, **FP32_CASES[name]}
    [expected] = ranks(steps, world_size=1, hf_dir=model, values=values)
    masks = [record.chosen for record in expected] if expected[0].chosen else None
    ours = steps(device, hf_dir=model, values=values, masks=masks)
    found = compare_steps(ours, expected, initial=_initial(model))
    assert found.loss < 1e-5 and found.score < 1e-4
    assert found.gradient < 1e-3 and found.update < 1e-3
    assert found.value < 1e-3, found.worst_value


HALF_CASES: dict[str, Any] = {
    "varlen, triton": {**LOCAL, "attention_impl": "varlen", "token_statistics_impl": "triton"},
    "merged, triton": {**LOCAL, "attention_impl": "merged"},
    "torch, chunked": {**LOCAL, "attention_impl": "torch", "token_statistics_impl": "chunked"},
    "varlen, recompute": {**LOCAL, **RECOMPUTE, "recompute_vision": True},
    "te": TE,
    "te, merged": {**TE, "attention_impl": "merged"},
    "te, recompute": {**TE, **RECOMPUTE},
    "te fp8 tensorwise": {**TE, "fp8_format": "hybrid"},
    "te fp8 delayed": {**TE, "fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "te fp8 weights": {**TE, "fp8_format": "hybrid", "fp8_param_gather": True, "use_distributed_optimizer": True},
}


def _params(cases: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(name, marks=needs_te if values["transformer_impl"] == "te" else (), id=name)
        for name, values in cases.items()
    ]


@pytest.mark.parametrize("name", _params(HALF_CASES))
def test_bf16_and_fp8_steps_are_as_near_as_their_bits(
    name: str, device: RankContext, model: Path, ranks: RankPool
) -> None:
    """The host's own bf16 step says what 8 bits cost; ours may be twice as far from fp32. FP8 has 3 bits of fraction in
    place of 7: 16 times, and 32 for gradients in e5m2. A mask, a scale or a missing part is off by far more than bf16.
    """
    values = {"kl_beta": 0.0, **HALF_CASES[name]}
    is_fp8 = "fp8_format" in values
    if is_fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    host = {**LOCAL, "kl_beta": 0.0}
    [exact] = ranks(steps, world_size=1, hf_dir=model, values=host, num_steps=1)
    masks = [record.chosen for record in exact]
    [rounded] = ranks(
        steps, world_size=1, hf_dir=model, values={**host, "params_dtype": "bf16"}, masks=masks, num_steps=1
    )
    adam = {"optimizer": "adam", "lr": 1e-4} if values.get("use_distributed_optimizer") else {}
    ours = steps(device, hf_dir=model, values={**values, **adam, "params_dtype": "bf16"}, masks=masks, num_steps=1)
    factor = 32.0 if is_fp8 else 2.0
    assert _score_distance(ours, exact) <= factor * _score_distance(rounded, exact)
    if ours[0].updates[0].gradients is not None:
        distance, allowed = (_gradient_distance(side, exact) for side in (ours, rounded))
        assert distance <= min(factor * allowed, 0.5)
    assert ours[0].updates[0].has_stepped and ours[0].updates[0].grad_norm > 0


def _score_distance(ours: list[Any], exact: list[Any]) -> float:
    """Mean difference of log-probs and entropies, nats."""
    differences = [
        (ours[0].scores[problem][name] - values_R).abs()
        for problem, columns in exact[0].scores.items()
        for name, values_R in columns.items()
    ]
    return float(torch.cat(differences).nanmean())


def _gradient_distance(ours: list[Any], exact: list[Any]) -> float:
    theirs = exact[0].updates[0].gradients
    mine, wanted = (
        torch.cat([gradients[name].flatten() for name in theirs])
        for gradients in (ours[0].updates[0].gradients, theirs)
    )
    return float((mine - wanted).norm() / wanted.norm())


def _initial(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("values", [LOCAL, pytest.param(TE, marks=needs_te)], ids=["local", "te"])
def test_a_checkpoint_brings_back_weights_moments_and_export(
    values: dict[str, Any], device: RankContext, model: Path, tmp_path: Path
) -> None:
    """Weights, optimizer state and random states after loading are those saved, bit for bit; so is the export, and what
    it holds loads again."""
    from megatron_ktr.config.part_options import CheckpointOptions
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.run.checkpoint import Checkpoints

    trainer = build_trainer(device, model, {**values, "params_dtype": "bf16"})
    trainer.train_step(1)
    checkpoints = Checkpoints(
        tmp_path, policy=trainer.policy, source=trainer.source, options=CheckpointOptions(resolved="")
    )
    checkpoints.save_and_wait(1)
    checkpoints.close()
    weights = {name: tensor.clone() for name, tensor in trainer.policy.export()}
    moments = [state.clone() for state in moments_of(trainer)]
    drawn = torch.rand(3, device=current().device)
    trainer.policy.save_hf(tmp_path / "export")

    again = build_trainer(device, model, {**values, "params_dtype": "bf16"})
    checkpoints = Checkpoints(
        tmp_path, policy=again.policy, source=again.source, options=CheckpointOptions(resolved="")
    )
    checkpoints.load(next((tmp_path / "checkpoints").iterdir()))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.policy.export())
    assert all(torch.equal(*pair) for pair in zip(moments_of(again), moments, strict=True))
    assert torch.equal(torch.rand(3, device=current().device), drawn)
    assert all(torch.equal(tensor.cpu(), weights[name].cpu()) for name, tensor in _initial(tmp_path / "export").items())


def build_trainer(context: RankContext, model: Path, values: dict[str, Any]) -> Any:
    from megatron_ktr.config.part_options import PolicyOptions, StepOptions
    from megatron_ktr.data.media.preprocess import PreprocessSettings
    from megatron_ktr.data.random_groups import FixedSource
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.objectives import build_objective
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.trainer import Trainer
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec
    from tests.support.steps import example_groups, make_config

    parallel = context.init()
    groups = example_groups(*NAMES)
    adam = {"optimizer": "adam", "lr": 1e-3, "use_distributed_optimizer": True, "platform": "auto"}
    config = make_config(model, {**adam, **values}, num_prompts=len(groups), sizes=parallel.sizes)
    policy = Policy(model, options=PolicyOptions.of(config), ranks=parallel, platform=current(), num_steps=4)
    policy.add_reference()
    source = FixedSource(groups[parallel.data_rank :: parallel.data_size])
    source.state_dict, source.load_state_dict = lambda: {"rank": 0, "size": 1}, lambda state: None
    return Trainer(
        options=StepOptions.of(config),
        policy=policy,
        source=source,
        objective=build_objective(config.objective, reward=config.reward),
        media=media_spec(Qwen2_5_VLConfig.from_hf(model), patchify=PreprocessSettings().patchify),
    )


def moments_of(trainer: Any) -> list[torch.Tensor]:
    """Adam's moments in the order of the parameters."""
    optimizer = trainer.policy.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        state[name]
        for part in parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for state in [part.optimizer.state[parameter]]
        for name in ("exp_avg", "exp_avg_sq")
    ]


def encode(context: RankContext, *, hf_dir: Path, values: dict[str, Any]) -> list[torch.Tensor]:
    """Vision features of every prompt's media."""
    from tests.support.steps import example_groups

    policy = build_trainer(context, hf_dir, values).policy
    found = policy.vision_features([group.prompt for group in example_groups(*NAMES)])
    return [features.float().cpu() for prompt in found for features in prompt]


def test_vision_features_equal_the_host(device: RankContext, model: Path, ranks: RankPool) -> None:
    """fp32: 1e-4 of the largest feature, over two layers. bf16 twice as far as the host's own bf16."""
    [expected] = ranks(encode, world_size=1, hf_dir=model, values=LOCAL)
    [rounded] = ranks(encode, world_size=1, hf_dir=model, values={**LOCAL, "params_dtype": "bf16"})
    for dtype in ("fp32", "bf16"):
        ours = encode(device, hf_dir=model, values={**LOCAL, "params_dtype": dtype})
        for features, exact, host in zip(ours, expected, rounded, strict=True):
            allowed = 1e-4 * exact.abs().max() if dtype == "fp32" else 2 * (host - exact).norm()
            assert (features - exact).norm() <= allowed
