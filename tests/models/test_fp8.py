"""FP8 as far as a CPU can tell: what it asks for, what is refused, where it is switched on, and that padding is exact.

No product here is in FP8; ``docs/precision.md`` says what waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.checks import check
from megatron_ktr.config.part_options import ModelOptions, PolicyOptions, StepOptions
from megatron_ktr.config.sections import ModelSection
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.stack import has_core_0_19, load_strategy
from megatron_ktr.types import BatchFacts
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.layouts import sizes_of
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import StepRecord, compare_steps, example_groups, make_config, run_steps
from tests.support.tiny import save_tiny_hf
from tests.support.vision import vision_config

HOPPER = SimpleNamespace(
    name="gpu", device=torch.device("cpu"), compute_capability=(9, 0), toolkit_version=(13, 0), backend="gloo"
)
FP8 = ModelSection(model="m", params_dtype="bf16", fp8_format="hybrid")


# Refusals


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (dict(fp8_format="hybrid", platform="cpu"), "--fp8-format runs on a GPU only"),
        (dict(scoring_precision="fp8", platform="cpu"), "--scoring-precision fp8 runs on a GPU only"),
        (dict(fp8_format="hybrid", transformer_impl="local"), "needs Transformer Engine"),
        (dict(fp8_format="e4m3", params_dtype="fp32"), "needs --bf16"),
        (dict(fp8_param_gather=True), "--fp8-param-gather needs --fp8-format"),
        (dict(fp8_vision=True), "--fp8-vision needs --fp8-format"),
        (dict(fp8_format="hybrid", fp8_recipe="delayed", first_last_layers_bf16=True), "--first-last-layers-bf16"),
        (dict(scoring_precision="fp8", fp8_recipe="delayed"), "scales come from training"),
        (dict(fp8_format="hybrid", fp8_param_gather=True, use_distributed_optimizer=False), "distributed-optimizer"),
        (dict(fp8_format="hybrid", fp8_param_gather=True, fp8_recipe="mxfp8"), "not available with"),
        (dict(fp8_format="hybrid", fp8_param_gather=True, scoring_precision="bf16"), "no weights in BF16"),
        (dict(fp8_format="hybrid", fp8_vision=True, vision_parallel="frame"), "--vision-parallel tensor"),
        (dict(scoring_precision="bf16", params_dtype="fp16"), "does not go with --fp16"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], part: str) -> None:
    common = dict(model="m", replay_path="r", params_dtype="bf16")
    check(config_from_values({**common, "fp8_format": "hybrid", "fp8_param_gather": True, "fp8_vision": True}))
    with pytest.raises(UserError, match=part) as refusal:
        check(config_from_values({**common, **values}))
    assert "\n" not in str(refusal.value)


def test_a_run_that_finds_itself_on_cpu_says_why_it_stops(one_rank, tmp_path: Path) -> None:
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.model import build_model

    save_tiny_hf(tmp_path, num_layers=1)
    with pytest.raises(UserError, match=r"--fp8-recipe tensorwise: FP8 products need .* this platform is cpu"):
        build_model(Qwen2_5_VLConfig.from_hf(tmp_path), ranks=one_rank, options=ModelOptions.of(Config(model=FP8)))


# What megatron-core is told


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_the_options_reach_the_transformer_configuration(one_rank, recipe: str) -> None:
    from models.qwen2_5_vl import fp8
    from models.qwen2_5_vl.transformer_config import language_transformer_config
    from models.qwen2_5_vl.vision import vision_transformer_config

    keeps_ends = recipe != "delayed"
    section = dataclasses.replace(
        FP8, fp8_recipe=recipe, first_last_layers_bf16=keeps_ends, num_layers_at_end_in_bf16=2, fp8_param_gather=True
    )
    options = dict(sizes=one_rank.sizes, dtype=torch.bfloat16, options=ModelOptions.of(Config(model=section)))
    with patch.object(fp8, "current", lambda: HOPPER):
        with pytest.raises(UserError, match="Transformer Engine's, which is not installed"):
            language_transformer_config(PUBLISHED_CONFIGS["3B"], **options)
    with patch.object(fp8, "current", lambda: HOPPER), patch.object(fp8, "resolve_transformer_impl", lambda impl: "te"):
        found = language_transformer_config(PUBLISHED_CONFIGS["3B"], **options)
        vision = dataclasses.replace(section, fp8_vision=True)
        language_transformer_config(
            PUBLISHED_CONFIGS["3B"], **{**options, "options": ModelOptions.of(Config(model=vision))}
        )
        odd = dataclasses.replace(
            PUBLISHED_CONFIGS["3B"], vision=vision_config(vision_hidden_size=40, vision_num_heads=2)
        )
        with pytest.raises(UserError, match="vision encoder cannot take it: the hidden size is 40 .* --fp8-vision"):
            language_transformer_config(odd, **{**options, "options": ModelOptions.of(Config(model=vision))})
    assert (found.fp8, found.fp8_recipe, found.fp8_param) == ("hybrid", recipe, True)
    assert found.tp_only_amax_red, "replicas may run different numbers of micro-batches"
    assert (found.fp8_amax_history_len, found.fp8_amax_compute_algo) == (1024, "max")
    assert (found.first_last_layers_bf16, found.num_layers_at_end_in_bf16) == (keeps_ends, 2)
    encoder = [
        vision_transformer_config(PUBLISHED_CONFIGS["3B"].vision, base=found, tensor_parallel_size=4, fp8=is_on)
        for is_on in (False, True)
    ]
    assert [config.ffn_hidden_size for config in encoder] == [3420, 3456], "864 = 54 * 16 on each of 4 ranks"
    assert [config.fp8 for config in encoder] == [None, "hybrid"] and encoder[1].fp8_recipe == recipe
    assert not encoder[1].first_last_layers_bf16


# Where FP8 is switched on


def cloned(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def precision_of_passes(context: RankContext, *, hf_dir: Path) -> dict[str, Any]:
    """(format, layer) of every FP8 context that core opens, by kind of pass, and what an update computes."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer import transformer_block

    from megatron_ktr.batch.micro_batch import MicroBatch
    from megatron_ktr.data.media.preprocess import PreprocessSettings
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.objectives import build_objective
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.step.scoring import ScoringPasses
    from models.qwen2_5_vl import fp8
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec
    from tests.models.test_te_spec import stored_tensors

    seen: list[tuple[Any, int]] = []
    original = transformer_block.get_fp8_context

    def watched(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        if not is_init and not is_first_last_bf16_layer(config, layer_no):
            seen.append((config.fp8, layer_no))
        return original(config, layer_no, is_init)

    parallel = context.init(ParallelSizes())
    groups = tuple(example_groups("mixed", "text"))
    media = media_spec(Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings().patchify)
    base = make_config(hf_dir, {"kl_beta": 0.0}, num_prompts=2, sizes=parallel.sizes)
    found: dict[str, Any] = {}

    def run(name: str, model: dict[str, Any], **objective_: Any) -> None:
        config = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, **model),
            objective=dataclasses.replace(base.objective, **objective_),
        )
        policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=parallel, platform=current(), num_steps=1)
        objective = build_objective(config.objective, reward=config.reward)
        scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
        item = MicroBatch(groups, scoring.pack(groups, "intact"))
        assert item.batch.layout.num_tokens % 16 == 0
        seen.clear()
        (item,) = scoring.with_counterfactuals([item], step=0)
        found[f"{name}, scoring"] = list(seen)
        seen.clear()
        result = policy.backward([item], objective=objective, facts=BatchFacts(num_responses=6))
        found[f"{name}, update"] = list(seen)
        found[f"{name}, loss"] = result.loss
        found[f"{name}, gradients"] = cloned(policy.export(tensor_of=lambda p: p.main_grad))
        found[f"{name}, weights"] = cloned(policy.export())
        found[f"{name}, stored"] = {(key, shape) for key, shape, *_ in stored_tensors(policy.bare_chunks)}
        found[f"{name}, reference"] = [(policy.transformer_config.fp8, -1)]

    platform = SimpleNamespace(**{**vars(HOPPER), "device": current().device})
    with (
        patch.object(transformer_block, "get_fp8_context", watched),
        patch.object(fp8, "current", lambda: platform),
        patch.object(fp8, "resolve_transformer_impl", lambda impl: "te"),
    ):
        run("bf16", dict(first_last_layers_bf16=True), scoring_precision="fp8")
        run("bf16 kl", dict(), scoring_precision="fp8", shift="kl")
        run("fp8", dict(fp8_format="e4m3"))
        run("fp8 vision", dict(fp8_format="e4m3", fp8_vision=True))
        run("fp8, bf16 scores", dict(fp8_format="e4m3"), scoring_precision="bf16")
    return found


def test_fp8_is_on_in_the_passes_and_layers_that_ask_for_it(ranks: RankPool, tmp_path: Path) -> None:
    save_tiny_hf(tmp_path, num_layers=3, vision_depth=1, vision_ffn_size=42, fullatt_block_indexes=(0,))
    (found,) = ranks(precision_of_passes, 1, hf_dir=tmp_path)
    # Two views. The first and last of three layers stay in bf16.
    assert found["bf16, scoring"] == [("hybrid", 1)] * 2
    assert found["bf16, update"] == [] and found["bf16, reference"] == [(None, -1)]
    assert found["bf16 kl, scoring"] == [("hybrid", layer) for layer in range(3)] * 2
    assert found["bf16 kl, update"] == []
    assert found["fp8, scoring"] == [("e4m3", layer) for layer in range(3)] * 2
    assert found["fp8, update"] == [("e4m3", layer) for layer in range(3)]
    assert found["fp8, bf16 scores, scoring"] == []
    assert found["fp8, bf16 scores, update"] == found["fp8, update"]
    # The encoder's one layer, then the language model's. Its MLP of 42 became 48, its patches a multiple of 16.
    assert found["fp8 vision, update"] == [("e4m3", 0), *found["fp8, update"]]
    assert found["fp8 vision, loss"] == pytest.approx(found["fp8, loss"], abs=2e-6)
    assert max_relative_difference(found["fp8 vision, gradients"], found["fp8, gradients"]) <= 1e-4
    assert found["fp8 vision, stored"] == found["fp8, stored"], "a checkpoint knows nothing of the padding"
    for name, weight in found["fp8 vision, weights"].items():
        assert torch.equal(weight, found["fp8, weights"][name]), name


# Weights that passes see


def weights_that_passes_see(context: RankContext, *, hf_dir: Path, recompute_vision: bool) -> dict[str, bool]:
    """By what runs after the policy's weights have changed: whether it is what layers that keep nothing compute. The
    layers keep their weights as Transformer Engine's do in FP8."""
    from megatron_ktr.batch.micro_batch import MicroBatch
    from megatron_ktr.data.media.preprocess import PreprocessSettings
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.objectives import build_objective
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.step.scoring import ScoringPasses
    from models.qwen2_5_vl import fp8
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec
    from tests.support.te_names import te_layers

    parallel = context.init(ParallelSizes())
    groups = tuple(example_groups("mixed", "text"))
    base = make_config(
        hf_dir,
        {"objective": "grpo", "kl_beta": 0.0, "recompute_vision": recompute_vision},
        num_prompts=2,
        sizes=parallel.sizes,
    )
    options = dict(transformer_impl="te", fp8_format="e4m3", fp8_vision=True)
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, **options))
    platform = SimpleNamespace(**{**vars(HOPPER), "device": current().device})
    with te_layers(), patch.object(fp8, "current", lambda: platform):
        policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=parallel, platform=current(), num_steps=1)
    objective = build_objective(config.objective, reward=config.reward)
    media = media_spec(Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings().patchify)
    scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
    item = MicroBatch(groups, scoring.pack(groups, "intact"))
    layers = [module for module in policy.bare_chunks[0].modules() if hasattr(module, "cached_weight")]
    assert len(layers) == 4 * 3, "one layer of the encoder, two of the language model"

    def features() -> list[Tensor]:
        return [part for parts in policy.vision_features([group.prompt for group in groups]) for part in parts]

    def scores() -> list[Tensor]:
        return [statistics.logprob_R for statistics in policy.score([item.batch])]

    def gradients() -> list[Tensor]:
        """Passes of a step in which something is scored first."""
        policy.prepare_vision([item.batch])
        policy.score([item.batch])
        policy.backward([item, item], objective=objective, facts=BatchFacts(num_responses=6))
        return [parameter.main_grad.clone() for parameter in policy.bare_chunks[0].parameters()]

    def changed() -> None:
        with torch.no_grad():
            for parameter in policy.bare_chunks[0].parameters():
                parameter.mul_(1.01)
        policy.vision.after_step()

    found = {}
    for run in (features, scores, gradients):
        run()
        changed()
        ours = run()
        for layer in layers:
            layer.cached_weight = None
        policy.vision.forget()
        found[run.__name__] = all(torch.equal(*pair) for pair in zip(ours, run(), strict=True))
    return found


@pytest.mark.parametrize("recompute_vision", [False, True])
def test_no_pass_sees_weights_of_the_step_before(ranks: RankPool, tmp_path: Path, recompute_vision: bool) -> None:
    """Also those that run outside megatron-core's schedules, which tell layers when to quantise anew."""
    save_tiny_hf(tmp_path, num_layers=2, vision_depth=1, vision_ffn_size=48, fullatt_block_indexes=(0,))
    (found,) = ranks(weights_that_passes_see, 1, hf_dir=tmp_path, recompute_vision=recompute_vision)
    assert found == {"features": True, "scores": True, "gradients": True}


# Padding is exact


PADDED_LAYOUTS = {
    1: {"one rank": ParallelSizes()},
    2: {"tp2 sp": sizes_of(2, sp=True), "cp2": sizes_of(cp=2), "pp2": sizes_of(1, 2)},
    4: {"tp2 sp cp2": sizes_of(2, cp=2, sp=True)},
}
GROUPS = ("mixed", "text", "long video")


def padded_steps(context: RankContext, *, layouts: dict[str, ParallelSizes], **options: Any) -> dict[str, Any]:
    """A training step with every micro-batch, in every view, padded to 128 rows per tensor rank."""
    from megatron_ktr.config import part_options
    from models.qwen2_5_vl import model

    found = {}
    for name, sizes in layouts.items():
        lengths: list[int] = []
        forward = model.Qwen2_5_VLModel.forward

        def watched(self: Any, batch: Any, forward: Any = forward, lengths: list[int] = lengths) -> Tensor:
            lengths.append(batch.layout.num_tokens)
            return forward(self, batch)

        def multiple(config: Config, sizes: ParallelSizes = sizes) -> int:
            return 128 * sizes.tensor

        with (
            patch.object(part_options, "row_multiple", multiple),
            patch.object(model.Qwen2_5_VLModel, "forward", watched),
        ):
            records = run_steps(context.init(sizes), rollout_groups=example_groups(*GROUPS), **options)
        assert lengths and all(length % (128 * sizes.tensor) == 0 for length in lengths)
        found[name] = records
    return found


def plain_steps(context: RankContext, **options: Any) -> list[StepRecord]:
    return run_steps(context.init(ParallelSizes()), rollout_groups=example_groups(*GROUPS), **options)


@pytest.fixture(scope="module")
def plain(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    hf_dir = tmp_path_factory.mktemp("hf")
    model = save_tiny_hf(hf_dir, num_layers=2, vision_depth=2)
    (records,) = ranks(plain_steps, 1, hf_dir=hf_dir)
    names = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }
    yield SimpleNamespace(hf_dir=hf_dir, records=records, initial=names)


@pytest.mark.parametrize("world_size", PADDED_LAYOUTS)
def test_a_step_padded_to_128_rows_a_rank_is_the_same_step(ranks: RankPool, plain: Any, world_size: int) -> None:
    """Loss, metrics (that no padding is counted in), scores, gradients and weights, where 14 to 34 tokens became 128 to
    256: products sum in another order, the tolerances are those of layouts (``test_training_step.py``)."""
    masks = [record.chosen for record in plain.records]
    options = dict(layouts=PADDED_LAYOUTS[world_size], hf_dir=plain.hf_dir, masks=masks)
    for by_layout in ranks(padded_steps, world_size, **options):
        for name, records in by_layout.items():
            difference = compare_steps(records, plain.records, initial=plain.initial)
            assert difference.loss <= 2e-6 and difference.score <= 1e-5, (name, difference)
            assert difference.value <= 1e-4, (name, difference)
            assert difference.gradient <= 1e-4 and difference.update <= 5e-4, (name, difference)
            assert records[0].batching == plain.records[0].batching, "work is counted in real tokens"


def test_padded_patches_change_nothing_in_the_encoder(one_rank) -> None:
    from tests.support.vision import build_encoder

    encoder = build_encoder(vision_config(), groups=one_rank, dtype=torch.float32)
    grids = torch.tensor([(1, 6, 10), (3, 4, 6), (1, 2, 2)])
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(int(grids.prod(1).sum()), vision_config().patch_dim, generator=generator)
    found = []
    for multiple in (1, 32):
        encoder.row_multiple = multiple
        assert multiple == 1 or len(patches) % multiple
        encoder.zero_grad()
        features = encoder(patches, grids)
        features.square().sum().backward()
        found.append((features.detach(), [parameter.grad.clone() for parameter in encoder.parameters()]))
    (plain_features, plain_grads), (features, grads) = found
    # fp32 products of other shapes may sum in another order.
    torch.testing.assert_close(features, plain_features, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(grads, plain_grads, strict=True):
        assert float((ours - expected).norm() / expected.norm()) <= 1e-5


# Parameters kept in FP8


class Rounded(Tensor):
    """Stands in for Transformer Engine's quantised tensor: what ``copy_`` puts in is kept in e4m3, what comes out is of
    the nominal dtype only through ``dequantize``."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).clone()


def in_e4m3(value: Tensor) -> Tensor:
    scale = value.abs().max() / 448
    return ((value / scale).to(torch.float8_e4m3fn).to(value.dtype)) * scale


@pytest.fixture
def rounded_is_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.qwen2_5_vl import fp8

    monkeypatch.setattr(fp8, "is_float8tensor", lambda tensor: isinstance(tensor, Rounded))
    monkeypatch.setattr(fp8, "dequantize_fp8_tensor", lambda tensor: tensor.dequantize())


def test_export_hands_out_plain_numbers_of_parameters_in_fp8(one_rank, tmp_path: Path, rounded_is_fp8) -> None:
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights, named_model_parameters
    from models.qwen2_5_vl.model import build_model

    save_tiny_hf(tmp_path, num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    model = build_model(Qwen2_5_VLConfig.from_hf(tmp_path), ranks=one_rank)
    load_hf_weights(model, tmp_path, ranks=one_rank)
    local = dict(named_model_parameters(model))
    weight = local["language.decoder.layers.0.mlp.linear_fc2.weight"]
    weight.data = in_e4m3(weight.data)

    def as_fp8(parameter: Tensor) -> Tensor:
        return parameter.data.as_subclass(Rounded) if parameter is weight else parameter

    exported = dict(export_hf_tensors(model, ranks=one_rank, tensor_of=as_fp8))
    assert not any(isinstance(tensor, Rounded) for tensor in exported.values())
    assert torch.equal(exported["model.layers.0.mlp.down_proj.weight"], weight.data)


def test_loading_reaches_what_the_optimizer_takes_its_exact_weights_from(rounded_is_fp8) -> None:
    """Otherwise the optimizer would start from the random initialisation and undo the loading in its first step."""
    from models.qwen2_5_vl.fp8 import drop_initial_values, initial_values, set_parameter

    class Kept(torch.nn.Parameter):
        def get_high_precision_init_val(self) -> Tensor | None:
            return getattr(self, "first", None)

        def clear_high_precision_init_val(self) -> None:
            del self.first

    parameter, plain = Kept(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    parameter.first = torch.full((4,), 7.0)
    value = torch.arange(4.0)
    for target in (parameter, plain):
        set_parameter(target, value)
        assert torch.equal(target.data, value)
    assert torch.equal(initial_values(parameter), value) and initial_values(plain) is None
    drop_initial_values([parameter, plain])
    assert initial_values(parameter) is None


class OneScale(Tensor):
    """Stands in for Transformer Engine's ``Float8Tensor`` with scales from values: a slice shares numbers and scale,
    and what is copied into one sets the scale of all."""

    is_cuda = True
    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> OneScale:
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)
        made.numbers, made.scale = numbers, scale
        return made

    def dequantize(self) -> Tensor:
        return self.numbers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target, *others = args
        if func is torch.ops.aten.copy_.default:
            target.scale.copy_(others[0].abs().max() / 448)
            target.numbers.copy_((others[0] / target.scale).to(torch.float8_e4m3fn))
            return target
        assert func in (torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default), func
        return cls(func(target.numbers, *others, **(kwargs or {})), target.scale)


@pytest.mark.skipif(not has_core_0_19(), reason="megatron-core 0.16 has no streamed loading")
def test_weights_in_fp8_are_not_streamed_because_pieces_would_overwrite_each_others_scale(monkeypatch) -> None:
    """megatron-core's planner is right about a tensor that comes whole. Of one in two pieces (gate and up; what two
    tensor ranks saved) the first is read with the scale of the second. What we load is quantised whole."""
    from megatron.core import fp8_utils
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from torch.distributed.checkpoint.metadata import MetadataIndex

    monkeypatch.setattr(strategies, "HAVE_TE", True)
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: isinstance(tensor, OneScale))
    value = torch.cat([torch.linspace(100, 200, 8), torch.linspace(1, 2, 8)])

    def streamed(*bounds: int) -> Tensor:
        parameter = OneScale(torch.zeros(16, dtype=torch.float8_e4m3fn), torch.ones(()))
        planner = strategies.MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.state_dict = {"weight": parameter}
        for start, end in itertools.pairwise(bounds):
            size = torch.Size([end - start])
            item = SimpleNamespace(dest_index=MetadataIndex("weight"), dest_offsets=torch.Size([start]), lengths=size)
            target = planner.resolve_tensor(item)
            assert not isinstance(target, OneScale)
            planner.commit_tensor(item, target.copy_(value[start:end]))
        return parameter.dequantize()

    # e4m3 has three bits behind the point: half a unit is 1/16.
    torch.testing.assert_close(streamed(0, 16), value, rtol=1 / 16, atol=0)
    in_pieces = streamed(0, 8, 16)
    torch.testing.assert_close(in_pieces[8:], value[8:], rtol=1 / 16, atol=0)
    torch.testing.assert_close(in_pieces[:8], value[:8] / 100, rtol=1 / 16, atol=0)

    ours = load_strategy("checkpoint")
    assert not ours.stream_ckpt_dequant
    assert not FullyParallelLoadStrategyWrapper(ours, None, False).stream_ckpt_dequant
