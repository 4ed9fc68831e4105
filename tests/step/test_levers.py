"""Options that move memory and time around change no number: uneven pipeline stages, selective recomputation.

Whole training steps run through Trainer and Policy as in ``test_training_step.py``, against one plain process.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_ktr.config import load_config
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.pipeline_split import check_recomputation, chunk_layout, is_even, split_layers, virtual_stages
from megatron_ktr.config.sections import ParallelSection
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.types import RolloutGroup
from tests.step.test_training_step import (
    GROUPS,
    Case,
    _assert_small,
    assert_layouts_agree,
    differences_of,
    make_cases,
)
from tests.support.layouts import FULL, OVERLAPPED, SMALL, Layout, sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import StepDifference, StepRecord, compare_steps, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

FIRST = dict(decoder_first_pipeline_num_layers=1)
VISION = dict(account_for_vision_in_pipeline_split=4)
"""With four layers over two stages: the first one has the encoder and the embedding, and no layer."""
INTERLEAVED = dict(account_for_vision_in_pipeline_split=3, account_for_loss_in_pipeline_split=True)
ENDS = dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)


def selective(*modules: str) -> dict[str, Any]:
    return dict(recompute_granularity="selective", recompute_modules=modules)


LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("norms recomputed", values=selective("layernorm")),
        Layout("MLPs recomputed, tied", values=selective("mlp"), case="tied, clipped"),
    ],
    2: [
        Layout("tp2 sp, all modules recomputed", sizes_of(2, sp=True), selective("core_attn", "mlp", "layernorm")),
        Layout("cp2, attention and MLPs recomputed", sizes_of(cp=2), selective("core_attn", "mlp")),
        Layout("pp2, 1 + 3 layers", sizes_of(1, 2), FIRST),
        Layout("pp2, 3 + 1 layers, tied", sizes_of(1, 2), dict(decoder_last_pipeline_num_layers=1), "tied, clipped"),
        Layout("pp2, 0 + 4 layers", sizes_of(1, 2), VISION),
        Layout("pp2 vpp2, 0 + 2 and 1 + 1 layers", sizes_of(1, 2, vpp=2), INTERLEAVED),
    ],
    3: [
        Layout("pp3, 1 + 2 + 1 layers, full recomputation, tied", sizes_of(1, 3), {**ENDS, **FULL}, "tied, clipped"),
        Layout("pp3, 0 + 2 + 2 layers", sizes_of(1, 3), dict(account_for_vision_in_pipeline_split=2)),
    ],
    4: [
        Layout("tp2 pp2 sp, 3 + 1 layers", sizes_of(2, 2, sp=True), dict(decoder_first_pipeline_num_layers=3)),
        Layout("pp2 dp2 overlapped, 0 + 4 layers", sizes_of(1, 2), {**OVERLAPPED, **VISION}, bucket_size=SMALL),
    ],
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, Case]:
    return make_cases(tmp_path_factory, ranks)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_two_steps_are_the_same_whatever_lever_is_pulled(
    ranks: RankPool, cases: dict[str, Case], world_size: int
) -> None:
    """Scores, loss, metrics, gradient norm, gradients by published name and SGD weights, on every rank."""
    assert_layouts_agree(ranks, world_size, layouts=LAYOUTS[world_size], cases=cases)


# Uneven pipeline stages


def test_split_is_megatron_cores_wherever_core_has_the_option(one_rank: object) -> None:
    """Number and offset of every chunk's layers, or refusal by both."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    num_compared = num_refused = 0
    ends = [(first, last, False, False) for first in (None, 1, 2, 4) for last in (None, 2, 4) if first or last]
    accounted = [(None, None, embedding, loss) for embedding in (False, True) for loss in (False, True)]
    for num_layers, pipeline, virtual in itertools.product((7, 8, 10, 12, 30), (2, 3, 4), (1, 2)):
        for first, last, embedding, loss in ends + accounted:
            options = ParallelSection(
                decoder_first_pipeline_num_layers=first,
                decoder_last_pipeline_num_layers=last,
                account_for_embedding_in_pipeline_split=embedding,
                account_for_loss_in_pipeline_split=loss,
            )
            where = (num_layers, pipeline, virtual, options)
            settings = dict(
                num_layers=num_layers,
                hidden_size=8,
                num_attention_heads=2,
                pipeline_model_parallel_size=pipeline,
                pipeline_dtype=torch.float32,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
                account_for_embedding_in_pipeline_split=embedding,
                account_for_loss_in_pipeline_split=loss,
            )
            stages = [(vp_stage, rank) for vp_stage in range(virtual) for rank in range(pipeline)]
            try:
                config = TransformerConfig(**settings)
                theirs = [get_num_layers_to_build(config, *stage) for stage in stages]
                assert min(theirs) >= 0  # core goes on with minus one layer
            except (ValueError, AssertionError):
                with pytest.raises(UserError, match="pipeline"):
                    split_layers(num_layers, pipeline=pipeline, virtual=virtual, options=options)
                num_refused += 1
                continue
            split = split_layers(num_layers, pipeline=pipeline, virtual=virtual, options=options)
            assert [split[rank][chunk] for chunk, rank in stages] == theirs, where
            assert sum(theirs) == num_layers, where
            num_compared += 1
            if pipeline == 2 and virtual == 2 and first and last:
                continue  # core divides by its number of middle stages, zero
            offsets = [get_transformer_layer_offset(config, *stage) for stage in stages]
            assert offsets == [sum(theirs[:index]) for index in range(len(theirs))], where
    assert num_compared > 100 and num_refused > 50


def test_vision_counts_as_layers_of_the_first_stage() -> None:
    def split(num_layers: int, pipeline: int, virtual: int, vision: int, **options: Any) -> tuple[tuple[int, ...], ...]:
        section = ParallelSection(account_for_vision_in_pipeline_split=vision, **options)
        return split_layers(num_layers, pipeline=pipeline, virtual=virtual, options=section)

    assert split(28, 4, 1, 8) == ((1,), (9,), (9,), (9,))
    assert split(28, 4, 3, 8) == ((0, 0, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)), "first the chunk where the encoder runs"
    assert split(64, 8, 1, 7, account_for_loss_in_pipeline_split=True)[0] == (2,)
    assert is_even(split(8, 2, 2, 0)) and not is_even(split(6, 2, 2, 2))
    assert chunk_layout(((0, 1), (2, 1))) == [
        ["embedding"],
        ["decoder", "decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]
    for num_layers, vision, message in ((28, 7, "must divide the 28 layers"), (8, 24, "lower --account-for-vision")):
        with pytest.raises(UserError, match=message):
            split(num_layers, 4, 1, vision)


def test_recomputed_groups_must_fill_every_chunk() -> None:
    def check(split: tuple[tuple[int, ...], ...], size: int, method: str = "uniform") -> None:
        options = dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=size)
        check_recomputation(split, options=ParallelSection(**options))

    check(((28,),), 7)
    check(((0, 3), (3, 6)), 3)
    check(((28,),), 40, method="block")
    check_recomputation(((28,),), options=ParallelSection())
    for split, size, message in (
        (((28,),), 5, "the model has 28; use 4, or --recompute-method block"),
        (((28,),), 40, "the model has 28; use 28, or"),
        (((1,), (9,), (9,), (9,)), 3, "a pipeline chunk has 1; use 1, or"),
        (((2, 2), (2, 2)), 4, "a pipeline chunk has 2; use 2, or"),
    ):
        with pytest.raises(UserError, match=message):
            check(split, size)


def test_virtual_stages_are_counted_with_what_counts_beside_layers() -> None:
    options = dict(pipeline_model_parallel_size=4, num_layers_per_virtual_pipeline_stage=3)
    assert virtual_stages(28, options=ParallelSection(**options, account_for_vision_in_pipeline_split=8)) == 3
    assert virtual_stages(24, options=ParallelSection(**options)) == 2
    assert virtual_stages(24, options=ParallelSection(pipeline_model_parallel_size=4)) is None
    assert virtual_stages(24, options=ParallelSection(num_virtual_stages_per_pipeline_rank=3)) == 3
    with pytest.raises(UserError, match="must divide the 7 layers of a pipeline stage"):
        virtual_stages(28, options=ParallelSection(**options))


def save_in_layout(context: RankContext, *, hf_dir: Path, out_dir: Path, sizes: ParallelSizes, values: dict) -> None:
    from models.qwen2_5_vl.conversion import load_hf_weights
    from models.qwen2_5_vl.dist_weights import save_megatron_weights

    groups = context.init(sizes)
    model = _build(hf_dir, groups=groups, values=values)
    load_hf_weights(model, hf_dir, ranks=groups)
    save_megatron_weights(model, out_dir)


def load_in_layout(
    context: RankContext, *, hf_dir: Path, checkpoint: Path, sizes: ParallelSizes, values: dict
) -> dict[str, torch.Tensor]:
    from models.qwen2_5_vl.conversion import export_hf_tensors
    from models.qwen2_5_vl.dist_weights import load_megatron_weights

    groups = context.init(sizes)
    model = _build(hf_dir, groups=groups, values=values)
    load_megatron_weights(model, checkpoint)
    return {name: tensor.clone() for name, tensor in export_hf_tensors(model, ranks=groups)}


def _build(hf_dir: Path, *, groups: Any, values: dict[str, Any]) -> list[torch.nn.Module]:
    from megatron_ktr.config import config_from_values
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.model import build_model

    return build_model(
        Qwen2_5_VLConfig.from_hf(hf_dir), ranks=groups, options=ModelOptions.of(config_from_values(values))
    )


def test_checkpoint_of_uneven_stages_is_the_checkpoint_of_even_ones(ranks: RankPool, tmp_path: Path) -> None:
    """Saved by stages of 0 + 2 and 1 + 1 layers, it holds what the offline converter writes; loaded by stages of 3 + 1
    layers it is the model it came from, bit for bit."""
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.dist_checkpoint import convert_to_hf
    from models.qwen2_5_vl.hf_weights import open_hf_weights
    from tests.models.test_conversion import differing_tensors

    hf_dir, saved = tmp_path / "hf", tmp_path / "saved"
    save_tiny_hf(hf_dir, tie_word_embeddings=True)
    saved.mkdir()
    writer = next(layout for layout in LAYOUTS[2] if layout.sizes.virtual_pipeline)
    ranks(save_in_layout, 2, hf_dir=hf_dir, out_dir=saved, sizes=writer.sizes, values=writer.values)
    reader = open_hf_weights(hf_dir, config=Qwen2_5_VLConfig.from_hf(hf_dir))
    expected = {name: reader.read(name, 0, 0, info.shape[0]) for name, info in reader.infos.items()}
    values = dict(decoder_last_pipeline_num_layers=1)
    options = dict(hf_dir=hf_dir, checkpoint=saved, sizes=sizes_of(1, 2), values=values)
    for exported in ranks(load_in_layout, 2, **options):
        assert differing_tensors(exported, expected) == []
    convert_to_hf(saved, tmp_path / "back", side_files_dir=hf_dir)
    back = open_hf_weights(tmp_path / "back", config=Qwen2_5_VLConfig.from_hf(hf_dir))
    found = {name: back.read(name, 0, 0, info.shape[0]) for name, info in back.infos.items()}
    assert differing_tensors(found, expected) == []


# Selective recomputation


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--recompute-modules", "mlp"], "needs --recompute-granularity selective"),
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "moe_act"],
            "one of core_attn, mlp, layernorm",
        ),
        (["--recompute-granularity", "selective", "--recompute-modules", ""], "needs --recompute-modules"),
        (["--decoder-first-pipeline-num-layers", "2"], "needs --pipeline-model-parallel-size above 1"),
    ],
)
def test_levers_without_effect_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(["--model", "m", "--replay-path", "r", *flags])


# The reference model on the host


def test_weights_are_on_the_device_only_while_they_are_used() -> None:
    """The meta device plays the device: it keeps no numbers, so that what comes back must be the host's."""
    from megatron_ktr.policy.offload import HostWeights

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5, bias=False)).requires_grad_(False)
    module[0].weight.sequence_parallel = True
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    num_moved: list[int] = []

    def to_device(tensor: Tensor) -> Tensor:
        num_moved.append(tensor.numel())
        return tensor.to("meta")

    weights = HostWeights([module], to_host=torch.clone, to_device=to_device)
    assert not num_moved
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), weights.on_device():
            assert all(parameter.is_meta for parameter in module.parameters())
            assert module[0].weight.sequence_parallel and not module[0].weight.requires_grad
            _ = 1 / 0
        assert {name: p.device.type for name, p in module.named_parameters()} == dict.fromkeys(before, "cpu")
        assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert sum(num_moved) == 2 * (3 * 4 + 4 + 4 * 5)
    with pytest.raises(ValueError, match="weight is trained"):
        HostWeights([torch.nn.Linear(2, 2)], to_host=torch.clone, to_device=torch.clone)


def steps_with_reference_on_the_host(
    context: RankContext, *, layout: Layout, case: Case, groups: list[RolloutGroup]
) -> tuple[StepDifference, dict[str, set[int]]]:
    """Copies play the device's weights: how many are alive is noted in every pass of either model, and at the end."""
    from megatron_ktr.policy.offload import HostWeights
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.policy.roles import ModelRole

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    noted: dict[str, set[int]] = {role.value: set() for role in ModelRole}

    def to_device(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        alive.add(copied.untyped_storage())
        return copied

    def on(chunks: Any, *, platform: Any) -> HostWeights:
        return HostWeights(chunks, to_host=torch.clone, to_device=to_device)

    run = Policy._run

    def noting_run(policy: Any, *args: Any, model: ModelRole = ModelRole.POLICY, **options: Any) -> Any:
        noted[model.value].add(len(alive))
        return run(policy, *args, model=model, **options)

    with patch.object(HostWeights, "on", on), patch.object(Policy, "_run", noting_run):
        records = run_steps(
            context.init(layout.sizes),
            hf_dir=case.hf_dir,
            reference_dir=case.reference_dir,
            rollout_groups=groups,
            values={**case.values, **layout.values},
            num_steps=2,
            masks=case.masks,
        )
    return compare_steps(records, case.expected, initial=case.initial), noted


def test_reference_model_on_the_host_gives_the_same_steps(ranks: RankPool, cases: dict[str, Case]) -> None:
    """Its weights are there in its own pass, all of them, and in no other."""
    layout = Layout("pp2", sizes_of(1, 2), dict(offload_reference=True))
    options = dict(layout=layout, case=cases["untied"], groups=example_groups(*GROUPS))
    for difference, noted in ranks(steps_with_reference_on_the_host, 2, **options):
        _assert_small(layout.name, difference)
        assert noted["policy"] == {0}
        assert len(noted["reference"]) == 1 and min(noted["reference"]) > 10


# Adam's moments on the host


def steps_with_moments_on_the_host(
    context: RankContext, *, sizes: ParallelSizes, values: dict[str, Any], case: Case, groups: list[RolloutGroup]
) -> tuple[list[StepRecord], list[StepRecord], set[int], set[int]]:
    """Records with and without; how many copies of moments the device held in passes, and in optimizer steps."""
    from megatron_ktr.policy import policy as policy_module
    from megatron_ktr.policy.offload import moments_on_device
    from megatron_ktr.policy.policy import Policy

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    in_passes, in_steps = set(), set()

    def to_device(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        alive.add(copied.untyped_storage())
        return copied

    run, step = Policy._run, moments_on_device

    def noting_run(policy: Any, *args: Any, **options: Any) -> Any:
        in_passes.add(len(alive))
        return run(policy, *args, **options)

    @contextlib.contextmanager
    def noting_step(*args: Any, **options: Any) -> Any:
        with step(*args, **options):
            in_steps.add(len(alive))
            yield

    parallel = context.init(sizes)
    values = {**values, "optimizer": "adam", "lr": 1e-3}
    records = []
    with (
        patch.object(policy_module, "moves", lambda platform: {"to_host": torch.clone, "to_device": to_device}),
        patch.object(policy_module, "moments_on_device", noting_step),
        patch.object(Policy, "_run", noting_run),
    ):
        for is_offloaded in (True, False):
            options = {**values, "offload_optimizer_states": is_offloaded}
            records.append(run_steps(parallel, hf_dir=case.hf_dir, rollout_groups=groups, values=options, num_steps=3))
    return (*records, in_passes, in_steps)


@pytest.mark.parametrize("is_distributed", [True, False])
def test_moments_on_the_host_give_the_same_steps(ranks: RankPool, cases: dict[str, Case], is_distributed: bool) -> None:
    """To the bit; the device holds moments while the optimizer steps and in no pass."""
    values = dict(use_distributed_optimizer=is_distributed, params_dtype="bf16" if is_distributed else "fp32")
    options = dict(sizes=sizes_of(1, 1), values=values, case=cases["untied"], groups=example_groups(*GROUPS))
    for offloaded, plain, in_passes, in_steps in ranks(steps_with_moments_on_the_host, 2, **options):
        for ours, expected in zip(offloaded, plain, strict=True):
            assert ours.values == expected.values
            assert all(torch.equal(weight, expected.weights[name]) for name, weight in ours.weights.items())
        assert in_passes == {0} and max(in_steps) > 10


def test_sgd_has_no_moments_to_move() -> None:
    flags = ["--optimizer", "sgd", "--no-use-distributed-optimizer", "--offload-optimizer-states"]
    with pytest.raises(UserError, match="--optimizer sgd has none"):
        load_config(["--model", "m", "--replay-path", "r", *flags])


# Weight gradients that go straight into the buffer


class _WeightGradientKernel:
    """What APEX's kernel does, by its definition."""

    def __init__(self) -> None:
        self.num_calls = 0

    def wgrad_gemm_accum_fp32(self, input_: Tensor, output_gradient: Tensor, buffer: Tensor) -> None:
        self.num_calls += 1
        buffer += output_gradient.t().float() @ input_.float()


def steps_with_fused_gradients(
    context: RankContext, *, layout: Layout, case: Case, groups: list[RolloutGroup]
) -> tuple[StepDifference, int]:
    from megatron.core.tensor_parallel import layers

    kernel = _WeightGradientKernel()
    with (
        patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
        patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        found = differences_of(context, layouts=[layout], cases={layout.case: case}, groups=groups)
    return found[layout.name], kernel.num_calls


def test_fused_weight_gradients_are_those_of_autograd(ranks: RankPool, cases: dict[str, Case]) -> None:
    """With APEX's kernel played by its definition: four layers of four products, four micro-batches, two steps."""
    fused = dict(gradient_accumulation_fusion=True)
    layout = Layout("tp2 sp fused", sizes_of(2, sp=True), fused, "tied, clipped")
    options = dict(layout=layout, case=cases[layout.case], groups=example_groups(*GROUPS))
    for difference, num_calls in ranks(steps_with_fused_gradients, 2, **options):
        _assert_small(layout.name, difference)
        assert num_calls == 4 * 4 * 4 * 2


def steps_with_te_fusion(
    context: RankContext, *, layout: Layout, case: Case, groups: list[RolloutGroup]
) -> tuple[StepDifference, set[bool], bool]:
    from tests.support.te_names import te_layers

    fused: set[bool] = set()
    with te_layers():
        found = differences_of(context, layouts=[layout], cases={layout.case: case}, groups=groups)
        (chunk,) = _build(case.hf_dir, groups=context.init(layout.sizes), values=layout.values)
    for name, module in chunk.named_modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            assert module.fuse_wgrad_accumulation == name.startswith("language."), name
            fused.add(module.fuse_wgrad_accumulation)
    output = getattr(chunk.language, "output_layer", None)
    return found[layout.name], fused, output is not None and output.gradient_accumulation_fusion


def test_te_fuses_weight_gradients_without_apex(ranks: RankPool, cases: dict[str, Case]) -> None:
    """Layers with Transformer Engine's contract (``te_names.py``) over two stages, scored before they are trained, with
    layers run again in backward: the gradients are autograd's, and core's output layer does not ask for APEX."""
    fused = dict(gradient_accumulation_fusion=True, transformer_impl="te", recompute_vision=True, **FULL)
    layout = Layout("pp2 te fused", sizes_of(1, 2), fused, "tied, clipped")
    options = dict(layout=layout, case=cases[layout.case], groups=example_groups(*GROUPS))
    for difference, flags, output_fuses in ranks(steps_with_te_fusion, 2, **options):
        _assert_small(layout.name, difference)
        assert True in flags and not output_fuses


FROZEN = {"language": dict(freeze=("language",)), "all but adapters": dict(lora_rank=2)}


def steps_of_frozen_layers(context: RankContext, *, case: Case, groups: list[RolloutGroup]) -> dict[str, list[Any]]:
    """Of each way to freeze: gradients of a step with fusion and without."""
    from tests.support.te_names import te_layers

    found: dict[str, list[Any]] = {}
    for name, values in FROZEN.items():
        for is_fused in (True, False):
            options = {**values, "transformer_impl": "te", "gradient_accumulation_fusion": is_fused}
            with te_layers():
                records = run_steps(context.init(), hf_dir=case.hf_dir, rollout_groups=groups, values=options)
            found.setdefault(name, []).append((records[0].updates[0].gradients, records[0].weights))
    return found


def test_fusion_leaves_frozen_layers_alone(ranks: RankPool, cases: dict[str, Case]) -> None:
    (found,) = ranks(steps_of_frozen_layers, 1, case=cases["untied"], groups=example_groups("mixed"))
    for name, (fused, plain) in found.items():
        for ours, expected in zip(fused, plain, strict=True):
            assert ours.keys() == expected.keys() and ours, name
            assert all(torch.equal(ours[key], expected[key]) for key in ours), name


def test_fusion_is_the_default_where_it_runs(one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    from megatron_ktr.config import config_from_values
    from models.qwen2_5_vl import transformer_config

    def fuses(option: bool | None, *, impl: str, has_apex: bool, platform: str = "cuda") -> bool:
        monkeypatch.setattr(transformer_config, "resolve_transformer_impl", lambda _: impl)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", has_apex)
        monkeypatch.setattr(transformer_config, "current", lambda: SimpleNamespace(name=platform))
        config = config_from_values({"model": "m", "replay_path": "r", "gradient_accumulation_fusion": option})
        return transformer_config._fuses_weight_gradients(config)

    assert fuses(None, impl="te", has_apex=False) and fuses(None, impl="local", has_apex=True)
    assert not fuses(None, impl="local", has_apex=False) and not fuses(
        None, impl="local", has_apex=True, platform="cpu"
    )
    assert fuses(True, impl="te", has_apex=False) and not fuses(False, impl="te", has_apex=True)


def test_fusion_without_a_kernel_is_refused(one_rank: ParallelGroups, tmp_path: Path) -> None:
    save_tiny_hf(tmp_path)
    with pytest.raises(UserError, match="fused_weight_gradient_mlp_cuda"):
        _build(tmp_path, groups=one_rank, values=dict(gradient_accumulation_fusion=True))
