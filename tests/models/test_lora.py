"""Adapters against Hugging Face with low-rank matrices on its weights, and one layout against another.

The other side puts A and B on transformers' modules by ``torch.nn.utils.parametrize`` and lets autograd find their
gradients; q, k and v share one A, gate and up another. B starts random here (in training it starts at zero, where A has
no gradient).
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.config import load_config
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from tests.step.test_training_step import (
    GRADIENT_TOLERANCE,
    GROUPS,
    LOSS_TOLERANCE,
    SCORE_TOLERANCE,
    _assert_small,
    _published,
)
from tests.support.hf_updates import Models, score_responses, with_gradient
from tests.support.layouts import DISTRIBUTED, FULL, OVERLAPPED, SMALL, Layout, sizes_of
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.reference_ktr import reference_update, token_logprobs
from tests.support.steps import StepDifference, StepRecord, compare_steps, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

RANK, ALPHA = 3, 6.0
LORA: dict[str, Any] = dict(lora_rank=RANK, lora_alpha=ALPHA, lr=0.3)
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}
TARGETS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}
PARTS = dict(lora_targets=("linear_fc1",))
"""Nothing before the first layer's MLP is trained."""
SELECTIVE = dict(recompute_granularity="selective")
STAGES = dict(account_for_vision_in_pipeline_split=4)
"""A first stage without a layer: it has nothing to train."""

LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("full recomputation", values={**LORA, **FULL}),
        Layout("distributed optimizer", values={**DISTRIBUTED, **LORA, "lr": LORA["lr"] * DISTRIBUTED["adam_eps"]}),
    ],
    2: [
        Layout("tp2", sizes_of(2), LORA),
        Layout("tp2 sp, selective recomputation", sizes_of(2, sp=True), {**LORA, **SELECTIVE}),
        Layout("pp2", sizes_of(1, 2), LORA),
        Layout("pp2, 0 + 4 layers", sizes_of(1, 2), {**LORA, **STAGES}),
        Layout("cp2", sizes_of(cp=2), LORA),
        Layout(
            "dp2 overlapped",
            values={**OVERLAPPED, **LORA, "lr": LORA["lr"] * DISTRIBUTED["adam_eps"]},
            bucket_size=SMALL // 10,
        ),
    ],
    4: [
        Layout("tp4, more ranks than key heads", sizes_of(4), LORA),
        Layout("tp2 pp2 vpp2 sp full recomputation", sizes_of(2, 2, sp=True, vpp=2), {**LORA, **FULL}),
        Layout("tp2 cp2 sp", sizes_of(2, cp=2, sp=True), LORA),
    ],
}


def random_b(add_adapters: Any, chunks: Any, settings: Any, *, ranks: Any) -> None:
    """Adapters as in training, then B from numbers that depend on Hugging Face's name alone."""
    from models.qwen2_5_vl.conversion import named_model_parameters
    from models.qwen2_5_vl.lora import adapter_specs

    add_adapters(chunks, settings, ranks=ranks)
    specs = {spec.name: spec for spec in adapter_specs(chunks[0].model_config, settings)}
    with torch.no_grad():
        for name, parameter in named_model_parameters(chunks, adapters=True):
            spec, shape = specs[name], tuple(parameter.shape)
            if name.endswith("lora_b"):
                whole = dict(zip(spec.hf_names, map(_random, spec.hf_names, spec.hf_shapes), strict=True))
                count = spec.num_shards(shape, tensor_size=ranks.sizes.tensor)
                index = ranks.tensor_rank if count > 1 else 0
                parameter.copy_(spec.read_shard(partial(_slice, whole), shape, index=index, count=count))


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _slice(whole: dict[str, Tensor], name: str, axis: int, start: int, length: int) -> Tensor:
    return whole[name].narrow(axis, start, length)


def run_with_adapters(ranks: ParallelGroups, **options: Any) -> list[StepRecord]:
    from models.qwen2_5_vl.lora import add_adapters

    with patch("megatron_ktr.policy.policy.add_adapters", partial(random_b, add_adapters)):
        return run_steps(ranks, rollout_groups=example_groups(*GROUPS), **options)


def steps_in_layouts(
    context: RankContext, *, layouts: list[Layout], hf_dir: Path, initial: dict[str, Tensor], expected: list[StepRecord]
) -> dict[str, StepDifference]:
    found = {}
    for layout in layouts:
        records = run_with_adapters(
            context.init(layout.sizes),
            hf_dir=hf_dir,
            values=layout.values,
            num_steps=2,
            masks=[record.chosen for record in expected],
            bucket_size=layout.bucket_size,
        )
        assert records[0].updates[0].gradients is None or records[0].updates[0].gradients
        found[layout.name] = compare_steps(records, expected, initial=initial)
    return found


class LowRank(nn.Module):
    """W -> W + scale B A."""

    def __init__(self, lora_a: nn.Parameter, lora_b: nn.Parameter) -> None:
        super().__init__()
        self.lora_a, self.lora_b = lora_a, lora_b

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.lora_b @ self.lora_a


def put_on(model: HFModel, adapters: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Puts the matrices of an adapter file on the modules they name; returns the parameters by name in the file."""
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    shared: dict[tuple[str, str], nn.Parameter] = {}
    for name in adapters:
        module_name, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if side == "lora_A":
            layer, _, kind = module_name.rpartition(".")
            key = (layer, SHARED.get(kind, kind))
            lora_a = shared.setdefault(key, nn.Parameter(adapters[name].clone()))
            assert torch.equal(lora_a, adapters[name]), name
            b_name = name.replace("lora_A", "lora_B")
            lora_b = nn.Parameter(adapters[b_name].clone())
            parameters |= {name: lora_a, b_name: lora_b}
            parametrize.register_parametrization(model.get_submodule(module_name), "weight", LowRank(lora_a, lora_b))
    return parameters


class Run:
    """Two steps of one process with adapters, and what was exported before and after them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hf_dir = folder, folder / "hf"
        self.initial = _published(save_tiny_hf(self.hf_dir, tie_word_embeddings=True))
        self.records: list[StepRecord] = []

    def train(self, ranks: ParallelGroups, **values: Any) -> None:
        self.records = run_with_adapters(
            ranks,
            hf_dir=self.hf_dir,
            values={**LORA, **values},
            num_steps=2,
            before=partial(self.export, name="before"),
            after=partial(self.export, name="after"),
        )

    def export(self, policy: Any, *, name: str) -> None:
        from models.qwen2_5_vl.lora import save_adapters

        policy.save_hf(self.folder / f"{name} merged")
        path = self.folder / f"{name} adapter"
        save_adapters(policy.bare_chunks, path, settings=policy.lora, ranks=policy.ranks, base=self.hf_dir)

    def adapters(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name} adapter" / "adapter_model.safetensors")

    def hf_model(self, name: str = "hf") -> HFModel:
        return HFModel.from_pretrained(self.folder / name, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def run(tmp_path: Path, one_rank: ParallelGroups) -> Run:
    found = Run(tmp_path)
    found.train(one_rank)
    return found


def test_update_equals_low_rank_matrices_on_hugging_faces_weights(run: Run) -> None:
    """Loss (with a KL to the model without adapters), gradients of every A and B; then the exports of two steps."""
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig

    model, adapters = run.hf_model(), run.adapters("before")
    parameters = put_on(model, adapters)
    models = Models(model, run.hf_model(), run.hf_dir, run.hf_dir, Qwen2_5_VLConfig.from_hf(run.hf_dir))
    groups = example_groups(*GROUPS)
    first = run.records[0]
    masks = [[torch.tensor(response) for response in first.key_tokens[name]] for name in GROUPS]
    responses = score_responses(models, groups)
    expected = reference_update(
        with_gradient(model, models.config, groups, responses), masks=masks, ratios=0.3, kl_beta=0.04
    )
    (update,) = first.updates
    assert first.values["kl"] == pytest.approx(expected.kl_mean, abs=LOSS_TOLERANCE) and first.values["kl"] > 1e-3
    assert update.loss == pytest.approx(float(expected.loss), abs=LOSS_TOLERANCE)
    wanted = dict(zip(parameters, torch.autograd.grad(expected.loss, list(parameters.values())), strict=True))
    assert update.gradients.keys() == wanted.keys() and len(wanted) == 4 * 7 * 2
    assert max_relative_difference(update.gradients, wanted) <= GRADIENT_TOLERANCE
    # SGD, then the second step: scores of the trained model are those of the exported one.
    moved = {name: adapters[name] - LORA["lr"] * gradient for name, gradient in wanted.items()}
    stepped = run.hf_model()
    put_on(stepped, moved)
    _assert_scores(stepped, run.records[1], models)


def _assert_scores(model: HFModel, record: StepRecord, models: Models) -> None:
    scored = score_responses(Models(model, model, *_rest(models)), example_groups(*GROUPS))
    for name, group in zip(GROUPS, scored, strict=True):
        logprobs = torch.cat([token_logprobs(response.intact, response.token_ids) for response in group])
        assert torch.allclose(record.scores[name]["policy_logprob_R"], logprobs, rtol=0, atol=2 * SCORE_TOLERANCE), name


def _rest(models: Models) -> tuple[Any, ...]:
    return models.policy_dir, models.reference_dir, models.config


def test_both_exports_are_the_trained_model(run: Run) -> None:
    """Merged weights are those of the base with the exported matrices put on them; nothing else has moved."""
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig

    model = run.hf_model()
    put_on(model, run.adapters("after"))
    merged = run.records[-1].weights
    num_changed = 0
    for place in (f"layers.{n}.{module}" for n in range(4) for group in TARGETS.values() for module in group):
        weight = merged[f"model.{place}.weight"]
        # Sums of three products of fp32 numbers of size 0.1.
        expected = model.get_submodule(f"model.language_model.{place}").weight
        assert torch.allclose(weight, expected, rtol=0, atol=1e-6), place
        num_changed += not torch.equal(weight, run.initial[f"model.{place}.weight"])
    assert num_changed == 28 == sum(not torch.equal(merged[name], run.initial[name]) for name in merged)
    loaded = _published(run.hf_model("after merged"))
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)
    config = json.loads((run.folder / "after adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    matching = [name for name, _ in model.named_modules() if _fully_matches(config["target_modules"], name)]
    assert sorted(matching) == sorted(
        {n.split(".lora_")[0].removeprefix("base_model.model.") for n in run.adapters("after")}
    )
    # The exported model answers as the one that was scored before its last step.
    models = Models(model, model, run.hf_dir, run.hf_dir, Qwen2_5_VLConfig.from_hf(run.hf_dir))
    _assert_scores(run.hf_model("before merged"), run.records[0], models)


def _fully_matches(pattern: str, name: str) -> bool:
    import re

    return re.fullmatch(pattern, name) is not None


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_two_steps_with_adapters_are_the_same_in_every_layout(ranks: RankPool, run: Run, world_size: int) -> None:
    """Scores, loss, gradients of every matrix, and the merged weights after SGD; A starts the same everywhere."""
    found = ranks(
        steps_in_layouts,
        world_size,
        layouts=LAYOUTS[world_size],
        hf_dir=run.hf_dir,
        initial=run.initial,
        expected=run.records,
    )
    for by_name in found:
        for name, difference in by_name.items():
            _assert_small(name, difference)


def test_targets_are_the_layers_that_move(tmp_path: Path, one_rank: ParallelGroups) -> None:
    """With recomputed MLPs, whose input has no gradient of its own in the first layer."""
    run = Run(tmp_path)
    run.train(one_rank, **PARTS, **FULL)
    merged = run.records[-1].weights
    moved = {name for name in merged if not torch.equal(merged[name], run.initial[name])}
    assert moved == {f"model.layers.{n}.{module}.weight" for n in range(4) for module in TARGETS["linear_fc1"]}
    assert all(gradient.any() for gradient in run.records[0].updates[0].gradients.values())


ADAM: dict[str, Any] = dict(LORA, objective="grpo", optimizer="adam", lr=0.01, use_distributed_optimizer=True)
"""GRPO, because the frame orders of Video-KTR depend on the number of the step, which starts again here."""


def adapters_of(policy: Any) -> dict[str, Tensor]:
    from models.qwen2_5_vl.lora import export_adapters

    return {name: t.clone() for name, t in export_adapters(policy.bare_chunks, policy.lora, ranks=policy.ranks)}


def save_and_resume(context: RankContext, *, hf_dir: Path, path: Path) -> dict[str, Any]:
    """Two steps, a checkpoint after the first; the second again from there; the checkpoint in another layout."""
    from megatron.core import dist_checkpointing

    from megatron_ktr.run.checkpoint_state import load_sharded_state, sharded_state

    found: dict[str, Any] = {}

    def note(policy: Any, *, name: str) -> None:
        found[name] = adapters_of(policy)

    def save(policy: Any) -> None:
        note(policy, name="saved")
        dist_checkpointing.save(sharded_state(policy), str(path))

    def load(policy: Any, *, name: str) -> None:
        load_sharded_state(policy, path)
        note(policy, name=name)

    sizes = sizes_of(2, sp=True)
    options = dict(hf_dir=hf_dir, values=ADAM)
    run_with_adapters(context.init(sizes), num_steps=1, after=save, **options)
    run_with_adapters(context.init(sizes), num_steps=2, after=partial(note, name="uninterrupted"), **options)
    run_with_adapters(
        context.init(sizes), before=partial(load, name="same"), after=partial(note, name="resumed"), **options
    )
    run_with_adapters(context.init(sizes_of(1, 2)), before=partial(load, name="other"), num_steps=0, **options)
    return found


def test_checkpoint_holds_adapters_alone_and_continues_in_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    from megatron_ktr.files.torch_dist_files import TorchDistReader
    from models.qwen2_5_vl.dist_checkpoint import convert_to_hf

    hf_dir, path = tmp_path / "hf", tmp_path / "checkpoint"
    save_tiny_hf(hf_dir)
    path.mkdir()
    for found in ranks(save_and_resume, 2, hf_dir=hf_dir, path=path):
        for name in ("same", "other"):
            assert all(torch.equal(found[name][key], value) for key, value in found["saved"].items()), name
        for key, value in found["uninterrupted"].items():
            assert torch.equal(found["resumed"][key], value), key
            assert not torch.equal(value, found["saved"][key]), key
    keys = TorchDistReader(path).tensors
    assert {key.rpartition(".")[2] for key in keys if key.startswith("language.")} == {"lora_a", "lora_b"}
    assert not any(key.startswith("vision.") for key in keys)
    with pytest.raises(UserError, match="adapters alone"):
        convert_to_hf(path, tmp_path / "out", side_files_dir=hf_dir)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora-export", "adapter"], "--lora-export adapter needs --lora-rank"),
        (["--lora-rank", "4", "--freeze", "vision"], "--freeze is not read with --lora-rank"),
        (["--lora-rank", "4", "--vision-lr", "1e-5"], "--vision-lr is not read"),
        (["--lora-rank", "4", "--lora-targets", "q_proj"], "linear_qkv, linear_proj, linear_fc1, linear_fc2"),
        (["--lora-dropout", "0.1"], "adapters have no dropout"),
    ],
)
def test_unusable_settings_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(["--model", "m", "--replay-path", "r", *flags])


def test_adapter_behind_a_fused_norm_sees_the_normed_input(one_rank: ParallelGroups) -> None:
    """As Transformer Engine has it: one layer with the norm's weight in it, whose normed input does not come out."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from models.qwen2_5_vl.lora import LoraSettings, _with_adapter
    from models.qwen2_5_vl.norm import RMSNorm

    class Fused(ColumnParallelLinear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, 1e-6))

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, layernorm_epsilon=1e-6)
    options = dict(config=config, init_method=nn.init.normal_, bias=False, gather_output=False, skip_bias_add=True)
    norm = RMSNorm(config, 8, 1e-6)
    nn.init.normal_(norm.weight)
    state: dict[str, Tensor] = {}
    outputs, x = [], torch.randn(5, 1, 8)
    for layer_class in (ColumnParallelLinear, Fused):
        layer = layer_class(8, 12, **options)
        layer.__class__ = _with_adapter(layer_class)
        layer.init_adapter(LoraSettings(2, 4.0, ("linear_qkv",)), group=one_rank.tensor, target="linear_qkv", place="x")
        if outputs:
            layer.load_state_dict(state, strict=False)
            layer.layer_norm_weight = norm.weight
        else:
            nn.init.normal_(layer.lora_b)
            state = layer.state_dict()
        outputs.append(layer(x if outputs else norm(x))[0])
    assert torch.allclose(*outputs, rtol=0, atol=1e-5)
    assert not torch.allclose(outputs[0], nn.functional.linear(norm(x), layer.weight), atol=0.1)


def test_frozen_products_are_credited_for_one_gradient() -> None:
    """Of forward and both gradients (3 parts) the weights' is left out; adapters themselves are not counted."""
    from megatron_ktr.accounting.flops import count_step
    from megatron_ktr.accounting.rates import settings_of
    from megatron_ktr.accounting.work import GroupWork
    from megatron_ktr.config import config_from_values
    from megatron_ktr.objectives import build_objective
    from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

    flops = []
    for rank in (0, 16):
        config = config_from_values(dict(lora_rank=rank, objective="grpo", kl_beta=0.0))
        settings = settings_of(StepOptions.of(config), build_objective(config.objective, reward=config.reward))
        group = GroupWork(text_length=1000, response_lengths=(100,) * 8)
        flops.append(count_step(PUBLISHED_CONFIGS["7B"], [group], settings=settings).total)
    assert flops[1] / flops[0] == pytest.approx(2 / 3, abs=0.02)
