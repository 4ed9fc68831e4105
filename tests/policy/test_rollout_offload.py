"""``--offload-during-rollout``: nothing of an update is on the device while an engine generates, and no number changes.

Whole steps run twice, with the option and without; the source plays the engine and looks around while it generates.
Behind ``device_border`` host and device are two places, so that what moves on a GPU moves here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ktr.config import load_config
from megatron_ktr.data.random_groups import FixedSource
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.policy.rollout_offload import optimizer_off_device, optimizer_tensors
from tests.run.test_online_training import _reproducible as reproducible
from tests.run.test_online_training import inputs as inputs  # a fixture
from tests.run.test_online_training import metrics, settings
from tests.support.device_border import DEVICE, device_border
from tests.support.layouts import OVERLAPPED, SMALL, sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf

GROUPS = ("mixed", "text", "long video", "even")
ADAM = dict(optimizer="adam", lr=1e-3, clip_grad=0.5)
SHARDED = dict(**ADAM, use_distributed_optimizer=True)
BF16 = dict(params_dtype="bf16")
# The tiled head multiplies 16 bits into 32 on a device, for which CPU has no kernel.
BF16_BEHIND_BORDER = dict(**BF16, token_statistics_impl="naive")
NUM_STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Untied and tied."""
    found = {is_tied: tmp_path_factory.mktemp("tiny") for is_tied in (False, True)}
    for is_tied, directory in found.items():
        save_tiny_hf(directory, **(dict(tie_word_embeddings=True, num_kv_heads=4) if is_tied else {}))
    return found


@dataclass(frozen=True)
class Case:
    name: str
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    values: dict[str, Any] = field(default_factory=dict)
    is_tied: bool = False


@dataclass(frozen=True)
class Seen:
    """Bytes on the device at one moment of one rank, by what they are; the policy's weights as the engine got them."""

    gradients: int
    main_weights: int
    moments: int
    weights: int
    exported: dict[str, Tensor]


def bytes_on_device(tensors: list[Tensor], *, is_device: Callable[[Tensor], bool]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors if is_device(tensor)}
    return sum(tensor.untyped_storage().size() for tensor in storages.values())


def look_around(policy: Any, *, has_border: bool, exported: dict[str, Tensor]) -> Seen:
    def count(tensors: list[Tensor]) -> int:
        # On the CPU platform the one memory is the device's.
        return bytes_on_device(tensors, is_device=lambda t: not has_border or t.device.type != "cpu")

    state = [part.optimizer.state for part in policy.optimizer.chained_optimizers if part.optimizer is not None]
    moments = [v for s in state for entry in s.values() for name, v in entry.items() if name.startswith("exp_avg")]
    steps = [entry["step"] for s in state for entry in s.values() if "step" in entry]
    others = {id(tensor) for tensor in (*moments, *steps)}
    return Seen(
        gradients=count([buffer.grad_data for chunk in policy.chunks for buffer in chunk.buffers]),
        main_weights=count([t for t in optimizer_tensors(policy.optimizer) if id(t) not in others]),
        moments=count(moments),
        weights=count([parameter for chunk in policy.chunks for parameter in chunk.parameters()]),
        exported=exported,
    )


@contextlib.contextmanager
def playing_engine(policies: list[Any], seen: list[Seen], *, has_border: bool) -> Iterator[None]:
    """The source is sent the policy's weights and looks around when it generates."""
    finish, exported = FixedSource.finish, {}

    def load_weights(source: Any, named_tensors: Any) -> None:
        exported.update((name, tensor.detach().cpu().clone()) for name, tensor in named_tensors)

    def noting_finish(source: Any) -> Any:
        seen.append(look_around(policies[-1], has_border=has_border, exported=dict(exported)))
        return finish(source)

    engine = dict(
        needs_weights=True,
        needs_vision_weights=True,
        gather_weights_to="all",
        load_weights=load_weights,
        finish=noting_finish,
    )
    with contextlib.ExitStack() as stack:
        for name, value in engine.items():
            stack.enter_context(patch.object(FixedSource, name, value, create=True))
        yield


def moving(platform: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """``offload.moves`` behind a border, where the platform is CPU by name."""
    return {"to_host": lambda tensor: tensor.cpu(), "to_device": lambda tensor: tensor.to(DEVICE)}


def steps_with_and_without(
    context: RankContext, *, cases: list[Case], models: dict[bool, Path], has_border: bool
) -> dict[str, Any]:
    """By case: (records, what was seen in each step), with the option and without; a border for the first only."""
    from megatron_ktr.policy import policy as policy_module

    found = {}
    for case in cases:
        parallel = context.init(case.sizes)
        runs = []
        for offloads in (True, False):
            policies: list[Any] = []
            seen: list[Seen] = []
            is_behind = has_border and offloads
            with (
                device_border() if is_behind else contextlib.nullcontext(),
                patch.object(policy_module, "moves", moving) if is_behind else contextlib.nullcontext(),
                playing_engine(policies, seen, has_border=is_behind),
            ):
                records = run_steps(
                    parallel,
                    hf_dir=models[case.is_tied],
                    # A border that looks at every operation is slow.
                    rollout_groups=example_groups(*GROUPS[: 2 if has_border else 4]),
                    values={**case.values, "offload_during_rollout": offloads},
                    num_steps=2 if has_border else NUM_STEPS,
                    bucket_size=SMALL,
                    before=policies.append,
                )
                after = look_around(policies[-1], has_border=is_behind, exported={})
                for record in records:
                    record.weights = {name: tensor.cpu() for name, tensor in record.weights.items()}
            runs.append((records, [*seen, after]))
        found[case.name] = runs
    return found


CASES: dict[int, list[Case]] = {
    1: [
        Case("fp32", values=ADAM),
        Case("fp32, distributed optimizer, tied", values=SHARDED, is_tied=True),
        Case("bf16, tied", values={**ADAM, **BF16}, is_tied=True),
        Case("sgd", values={}),
        Case("adapters", values={**SHARDED, **BF16, "lora_rank": 4}),
    ],
    2: [
        Case("dp2, bf16, distributed optimizer", values={**SHARDED, **BF16, "vision_lr": 1e-4}),
        Case("dp2, bf16, overlapped", values={**SHARDED, **BF16, **OVERLAPPED}, is_tied=True),
        Case("dp2, moments on the host", values={**SHARDED, **BF16, "offload_optimizer_states": True}),
        Case("pp2, only the encoder trained", sizes_of(1, 2), {**ADAM, "freeze": ("language",)}),
    ],
    4: [
        Case("tp2 pp2", sizes_of(2, 2, sp=True), {**SHARDED, **BF16}, is_tied=True),
        Case("pp2 vpp2 dp2", sizes_of(1, 2, vpp=2), {**SHARDED, "updates_per_rollout": 2}),
    ],
}


def assert_bit_equal(runs: Any, *, name: str) -> None:
    (ours, seen), (expected, seen_without) = runs
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine.values == theirs.values, (name, step)
        assert [u.loss for u in mine.updates] == [u.loss for u in theirs.updates], (name, step)
        assert [u.grad_norm for u in mine.updates] == [u.grad_norm for u in theirs.updates], (name, step)
        assert all(update.has_stepped for update in mine.updates), (name, step)
        assert all(torch.equal(weight, theirs.weights[key]) for key, weight in mine.weights.items()), (name, step)
    for step, (now, without) in enumerate(zip(seen, seen_without, strict=True)):
        assert now.weights == without.weights > 0, name
        assert now.exported.keys() == without.exported.keys()
        assert all(torch.equal(tensor, without.exported[key]) for key, tensor in now.exported.items()), (name, step)
    first, second = (seen[step].exported for step in (0, 1))
    assert any(not torch.equal(tensor, second[key]) for key, tensor in first.items()), f"{name}: it learns nothing"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_gradient_buffers_are_empty_while_an_engine_generates(
    ranks: RankPool, models: dict[bool, Path], world_size: int
) -> None:
    """On CPU nothing else moves. Losses, gradient norms, weights and what the engine is sent are equal to the bit."""
    options = dict(cases=CASES[world_size], models=models, has_border=False)
    for by_name in ranks(steps_with_and_without, world_size, **options):
        for name, runs in by_name.items():
            assert_bit_equal(runs, name=name)
            (_, seen), (_, without) = runs
            *generating, after = seen
            assert [now.gradients for now in generating] == [0] * NUM_STEPS, name
            assert after == without[-1], name
            assert [(now.main_weights, now.moments) for now in seen] == [
                (now.main_weights, now.moments) for now in without
            ], name


BEHIND_BORDER: dict[int, list[Case]] = {
    1: [
        Case("fp32", values=ADAM),
        Case("fp32, distributed optimizer, tied", values=SHARDED, is_tied=True),
        Case("bf16", values={**ADAM, **BF16_BEHIND_BORDER}),
        Case("bf16, distributed optimizer", values={**SHARDED, **BF16_BEHIND_BORDER, "vision_lr": 1e-4}),
        Case("moments on the host", values={**SHARDED, **BF16_BEHIND_BORDER, "offload_optimizer_states": True}),
        Case("adapters", values={**SHARDED, **BF16_BEHIND_BORDER, "lora_rank": 4}),
    ],
    2: [
        Case("dp2, bf16, overlapped", values={**SHARDED, **BF16_BEHIND_BORDER, **OVERLAPPED}, is_tied=True),
        Case("pp2, only the encoder trained", sizes_of(1, 2), {**ADAM, "freeze": ("language",)}),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", BEHIND_BORDER)
def test_main_weights_and_moments_cross_to_the_host_and_back(
    ranks: RankPool, models: dict[bool, Path], world_size: int
) -> None:
    """The device holds the weights and nothing of the optimizer while an engine generates, and everything after."""
    options = dict(cases=BEHIND_BORDER[world_size], models=models, has_border=True)
    for rank, by_name in enumerate(ranks(steps_with_and_without, world_size, **options)):
        for name, runs in by_name.items():
            assert_bit_equal(runs, name=name)
            (_, seen), (_, without) = runs
            *generating, after = seen
            for now in generating:
                assert (now.gradients, now.main_weights, now.moments) == (0, 0, 0), name
            if "host" in name:
                assert without[-1].moments > 0 == after.moments
                after = dataclasses.replace(after, moments=without[-1].moments)
            assert after == without[-1], name
            if name.startswith("pp2") and rank == 1:
                assert after.gradients == 0, "a rank that trains nothing"
                continue
            assert after.gradients > 0, name
            assert (after.main_weights > 0) == ("bf16" in name or "host" in name or "adapters" in name), name
            if name.startswith("bf16"):  # alone: 4, 4 and 8 bytes a parameter, and the paddings of buffers
                assert after.moments == 2 * after.main_weights and after.main_weights <= after.gradients


def test_an_engine_that_fails_leaves_the_state_as_it_was(ranks: RankPool, models: dict[bool, Path]) -> None:
    for equal in ranks(state_after_failures, 1, hf_dir=models[False]):
        assert equal == dict.fromkeys(("OutOfMemoryError", "KeyboardInterrupt", "UserError"), True)


def state_after_failures(context: RankContext, *, hf_dir: Path) -> dict[str, bool]:
    """By failure: whether the optimizer's tensors are the same objects with the same numbers on the same side."""
    policies: list[Any] = []
    found = {}
    with device_border():
        run_steps(
            context.init(),
            hf_dir=hf_dir,
            rollout_groups=example_groups("mixed"),
            values={**SHARDED, **BF16_BEHIND_BORDER},
            before=policies.append,
        )
        policy = policies[-1]
        tensors = optimizer_tensors(policy.optimizer)
        assert any(tensor.device == DEVICE for tensor in tensors)
        sizes = [buffer.grad_data.untyped_storage().size() for chunk in policy.chunks for buffer in chunk.buffers]
        before = [(tensor, tensor.device, tensor.cpu().clone()) for tensor in tensors]
        for failure in (torch.OutOfMemoryError("engine"), KeyboardInterrupt(), UserError("a prompt is too long")):
            with (
                pytest.raises(type(failure)) as raised,
                optimizer_off_device(policy.chunks, policy.optimizer, platform=policy.platform),
            ):
                assert all(t.untyped_storage().size() == 0 for t in tensors if t.device == DEVICE)
                raise failure
            assert raised.value is failure
            now = optimizer_tensors(policy.optimizer)
            found[type(failure).__name__] = (
                [buffer.grad_data.untyped_storage().size() for chunk in policy.chunks for buffer in chunk.buffers]
                == sizes
            ) and all(
                mine is tensor and mine.device == device and torch.equal(mine.cpu(), value)
                for mine, (tensor, device, value) in zip(now, before, strict=True)
            )
    return found


def test_the_engine_s_error_is_told_where_it_still_holds_the_room() -> None:
    def no_room() -> None:
        raise torch.OutOfMemoryError("the engine is awake")

    chunk = SimpleNamespace(offload_grad_buffers=lambda empty_cache: None, restore_grad_buffers=no_room)
    optimizer = SimpleNamespace(optimizer=None)
    platform = SimpleNamespace(empty_cache=lambda: None)
    with pytest.raises(UserError, match="too long"), optimizer_off_device([chunk], optimizer, platform=platform):
        raise UserError("a prompt is too long")
    with pytest.raises(torch.OutOfMemoryError), optimizer_off_device([chunk], optimizer, platform=platform):
        pass


# A run


def train_with_and_without(context: RankContext, *, inputs: Path, out: Path) -> None:
    """The whole run, the same with the option, and the first again, from its checkpoint on with the option."""
    from megatron_ktr.train import train

    options = dict(**SHARDED, **BF16, save_interval=1, train_steps=2, keep_checkpoints=0, media_cache_gb=0.0)
    for name, is_on in {"plain": False, "offloaded": True}.items():
        train(settings(inputs, out / name, **options, offload_during_rollout=is_on))
    if context.rank == 0:
        shutil.copytree(out / "plain", out / "resumed")
        shutil.rmtree(out / "resumed" / "checkpoints" / "step_00000002")
    torch.distributed.barrier()
    train(settings(inputs, out / "resumed", **options, offload_during_rollout=True, resume=True))


@pytest.mark.slow
def test_a_run_and_its_resumption_are_the_run_without_it(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    """With Hugging Face's engine on the training ranks, the sampler's check before the first step included. A run may
    take the option up when it resumes."""
    ranks(train_with_and_without, 2, inputs=inputs, out=tmp_path)

    expected = reproducible(tmp_path / "plain")
    assert [line["has_stepped"] for line in expected] == [1.0, 1.0]
    assert all("seconds/offload" in line for line in metrics(tmp_path / "offloaded"))
    exported = load_file(tmp_path / "plain" / "export" / "model.safetensors")
    for name in ("offloaded", "resumed"):
        assert reproducible(tmp_path / name) == expected, name
        found = load_file(tmp_path / name / "export" / "model.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in exported.items()), name


# Why megatron-core's own offload_to_cpu is not used


class _TwoPlaces(TorchFunctionMode):
    """``is_cuda`` of every tensor is ``on_device``; ``cpu()`` and ``cuda()`` copy."""

    on_device = True

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == Tensor.is_cuda.__get__:
            return self.on_device
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def what_core_moves(context: RankContext, *, hf_dir: Path) -> dict[str, bool]:
    """Per kind of optimizer: whether core's offload takes the model's own weights along, and cuts views of them."""
    found = {}
    kinds = {"fp32": ADAM, "fp32 distributed": SHARDED, "bf16 distributed": {**SHARDED, **BF16}}
    for name, values in kinds.items():
        policies: list[Any] = []
        run_steps(
            context.init(),
            hf_dir=hf_dir,
            rollout_groups=example_groups("mixed"),
            values=values,
            before=policies.append,
        )
        policy = policies[-1]

        def storages(tensors: Any) -> set[int]:
            return {tensor.untyped_storage().data_ptr() for tensor in tensors}

        def inner(policy: Any = policy) -> list[Tensor]:
            parts = policy.optimizer.chained_optimizers
            return [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]

        model = [p for chunk in policy.chunks for p in chunk.parameters()]
        weights, shards = storages(model), storages(inner())
        with _TwoPlaces() as places:
            policy.optimizer.offload_to_cpu()
            found[f"{name}: weights leave"] = storages(model) != weights
            places.on_device = False
            policy.optimizer.restore_from_cpu()
        found[f"{name}: views before"] = bool(shards & weights)
        found[f"{name}: views after"] = bool(storages(inner()) & storages(model))
    return found


def test_core_moves_weights_of_the_model_and_cuts_views_of_them(ranks: RankPool, models: dict[bool, Path]) -> None:
    """In fp32. When this fails, megatron-core has changed, and ``policy/rollout_offload.py`` may use it."""
    [found] = ranks(what_core_moves, 1, hf_dir=models[False])
    assert found == {
        "fp32: weights leave": True,  # the engine would be sent host tensors
        "fp32: views before": True,
        "fp32: views after": True,
        "fp32 distributed: weights leave": False,
        "fp32 distributed: views before": True,
        "fp32 distributed: views after": False,  # a second copy on the device for the rest of the run
        "bf16 distributed: weights leave": False,
        "bf16 distributed: views before": False,
        "bf16 distributed: views after": False,
    }


# Options


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--engine", "replay", "--replay-path", "r"], "--engine replay generates nothing on the training ranks"),
        (["--engine", "vllm_server", "--data-path", "d", "--server-urls", "http://a:1"], "--engine vllm_server"),
        (["--objective", "sft", "--data-path", "d"], "--objective sft generates nothing"),
        (["--engine", "hf", "--data-path", "d", "--lag", "1", "--importance-sampling", "token"], "needs --lag 0"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(flags: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as raised:
        load_config(["--model", "m", "--offload-during-rollout", *flags])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("engine", ["hf", "vllm_colocated"])
def test_engines_on_the_training_ranks_may_have_the_room(engine: str) -> None:
    flags = ["--model", "m", "--engine", engine, "--data-path", "d", "--offload-during-rollout"]
    assert load_config(flags).optimizer.offload_during_rollout
