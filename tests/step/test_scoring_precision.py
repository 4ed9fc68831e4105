"""Scores at positions beyond 4,000 against Hugging Face in fp64, in every precision and every layout.

Two prompts: 4,200 tokens of text, and a short one whose video lasts so long that its text goes on at position 4,800.
Where products alone are lowered an error is rounding, of the same size at every position. With torch's autocast around
the pass, which this replaced, log-probs were off by 0.04 nats (text) and 0.18 (video) in the mean on one pipeline
stage, and by 0.8 to 1 on two, between which messages in bf16 were read as fp32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.distributed.groups import ParallelSizes
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.layouts import sizes_of
from tests.support.parity import Group, Medium, hf_logprobs, make_group, pack
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import make_config
from tests.support.tiny import FIRST_SPECIAL_ID, save_tiny_hf

NUM_TOKENS = 4200
LONG_VIDEO = (Medium("video", (5, 4, 4), seconds_per_grid=600.0),)
"""Two positions a second: the last of its temporal patches is at position 4 * 600 * 2 = 4,800."""
RESPONSES = (12, 20)


@dataclass(frozen=True)
class Precision:
    """How a pass is computed, and how far from fp64 its log-probs may be, in nats."""

    params_dtype: str
    scoring: str
    mean: float
    largest: float
    fp8_recipe: str | None = None
    """Linear layers in emulated FP8."""
    has_te_layers: bool = False
    """Linear layers that are lowered as a whole, as Transformer Engine's must be."""


PRECISIONS = {
    # 1e-6 seen: sums of 4,200 terms in another order.
    "fp32": Precision("fp32", "same", mean=2e-6, largest=1e-5),
    # 0.005 to 0.010 seen, 0.03 at most: 8 bits in each of 24 products.
    "bf16 products in an fp32 model": Precision("fp32", "bf16", mean=0.015, largest=0.045),
    # 0.007 to 0.013 seen, 0.04 at most: residuals, norms and rotations are rounded besides.
    "bf16 model": Precision("bf16", "same", mean=0.02, largest=0.06),
}
STAND_INS = {
    "bf16 products in TE's layers": Precision("fp32", "bf16", mean=0.015, largest=0.045, has_te_layers=True),
    # 4 bits in 16 products: 0.07 seen, 0.3 at most.
    "bf16 model, fp8 tensorwise": Precision("bf16", "same", mean=0.12, largest=0.5, fp8_recipe="tensorwise"),
    "bf16 model, fp8 blockwise": Precision("bf16", "same", mean=0.12, largest=0.5, fp8_recipe="blockwise"),
}
"""What needs a GPU, computed by what stands in for it."""

LAYOUTS = {
    1: {"one rank": ParallelSizes()},
    2: {
        "tp2": sizes_of(2),
        "tp2 sp": sizes_of(2, sp=True),
        "cp2": sizes_of(cp=2),
        "pp2": sizes_of(1, 2),
        "pp2 vpp2": sizes_of(1, 2, vpp=2),
    },
    4: {"tp2 pp2 sp": sizes_of(2, 2, sp=True), "tp2 cp2 sp": sizes_of(2, cp=2, sp=True)},
}

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
MOVES = {
    "_to_copy",
    "copy_",
    "t",
    "transpose",
    "permute",
    "view",
    "_unsafe_view",
    "expand",
    "slice",
    "select",
    "unbind",
}
MOVES |= {"stack", "cat", "index_select", "constant_pad_nd", "empty", "new_empty", "_allgather_base_"}
"""What may happen to numbers in bf16: they are multiplied, and they are carried about."""


class LoweredOperations(TorchDispatchMode):
    """The names of all operations that read or write a bf16 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = torch.utils._pytree.tree_leaves((args, kwargs, out))
        if any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in found):
            self.names.add(func._schema.name.rpartition("::")[2])
        return out


@dataclass(frozen=True)
class Case:
    hf_dir: Path
    groups: tuple[Group, ...]
    logprobs: tuple[Tensor, ...] = field(repr=False)
    """Of each group's response tokens, in fp64."""


@dataclass(frozen=True)
class Found:
    """On one rank of the last stage, in one layout and precision."""

    errors: list[Tensor]
    """|log-prob - fp64's| of every response token, by group."""
    angle: float
    """The largest error of a rotary angle, in rad."""
    lowered: set[str]
    """Operations with a bf16 tensor among inputs or outputs."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("long")
    model = save_tiny_hf(directory, std=0.1, vision_depth=2).double()
    model.set_attn_implementation("sdpa")  # eager would hold 4,200 x 4,200 scores of every layer
    config = Qwen2_5_VLConfig.from_hf(directory)
    groups = (_text_group(NUM_TOKENS, seed=1), make_group(config, media=LONG_VIDEO, response_lengths=RESPONSES, seed=2))
    with torch.no_grad():
        return Case(directory, groups, tuple(torch.cat(hf_logprobs(model, group)) for group in groups))


def _text_group(length: int, *, seed: int) -> Group:
    generator = torch.Generator().manual_seed(seed)
    prompt, *responses = (
        torch.randint(0, FIRST_SPECIAL_ID, (num,), generator=generator) for num in (length, *RESPONSES)
    )
    positions = torch.arange(length).expand(3, -1)
    weights = tuple(torch.ones(num) for num in RESPONSES)
    return Group(prompt, positions, length, media=(), patches=(), responses=tuple(responses), weights=weights)


def score(
    context: RankContext, *, case: Case, layouts: dict[str, ParallelSizes], precisions: dict[str, Precision]
) -> dict[tuple[str, str], Found]:
    found = {}
    for layout, sizes in layouts.items():
        groups = context.init(sizes)
        for name, precision in precisions.items():
            answer = _score(case, precision, sizes=sizes, groups=groups)
            if groups.is_last_stage:
                found[layout, name] = answer
    return found


def _score(case: Case, precision: Precision, *, sizes: ParallelSizes, groups: Any) -> Found:
    from benchmarks.fp8.emulation import Emulation, Recipe, language_linears
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy
    from tests.support.te_names import te_layers

    values = dict(params_dtype=precision.params_dtype, num_virtual_stages_per_pipeline_rank=sizes.virtual_pipeline)
    config = make_config(case.hf_dir, values, num_prompts=2, sizes=sizes)
    layers: Any = contextlib.nullcontext()
    if precision.has_te_layers:
        layers = te_layers()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, transformer_impl="te"))
    with layers:
        policy = Policy(case.hf_dir, options=PolicyOptions.of(config), ranks=groups, platform=current(), num_steps=1)
    emulated = contextlib.nullcontext()
    if precision.fp8_recipe:
        linears = language_linears(policy.bare_chunks[0])
        emulated = Emulation(linears, Recipe(precision.fp8_recipe)).on()
    batches = [pack([group], pad_to_multiple=sizes.tensor) for group in case.groups]
    with emulated, LoweredOperations() as lowered, _watched_angles(policy) as angles:
        scored = policy.score(batches, precision=precision.scoring)
    errors = []
    if groups.is_last_stage:
        pairs = zip(scored, case.logprobs, strict=True)
        errors = [(statistics.logprob_R.double() - expected).abs() for statistics, expected in pairs]
    return Found(errors, max(angles), lowered.names)


@contextlib.contextmanager
def _watched_angles(policy: Any) -> Iterator[list[float]]:
    """Largest difference of every pass's rotary angles from the definition in fp64; rows of padding count too."""
    errors: list[float] = []
    text = policy.model_config.text
    half = text.head_size // 2
    frequencies = text.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    axis_of_channel = [axis for axis, count in enumerate(text.mrope_section) for _ in range(count)]

    def compare(_: Any, inputs: tuple[Any, ...], angles_T11H: Tensor) -> None:
        expected_TH = inputs[0][axis_of_channel, 0].double().T * frequencies
        assert angles_T11H.dtype == torch.float32
        errors.append(float((angles_T11H[:, 0, 0].double() - expected_TH.repeat(1, 2)).abs().max()))

    hooks = [chunk.language.rotary_pos_emb.register_forward_hook(compare) for chunk in policy.bare_chunks]
    yield errors
    for hook in hooks:
        hook.remove()


def _assert_close(found: Found, precision: Precision, *, where: Any) -> None:
    for what, error_R in zip(("text", "video"), found.errors, strict=True):
        assert error_R.mean() < precision.mean and error_R.max() < precision.largest, (where, what, error_R)
    # fp32 rounds a frequency and the product with it: 5,000 * 1.2e-7. In TF32 or bf16 the error is above 1.
    assert found.angle < 1e-3, where


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_scores_at_long_positions_are_those_of_fp64(ranks: RankPool, case: Case, world_size: int) -> None:
    layouts = LAYOUTS[world_size]
    seen = set()
    for by_layout in ranks(score, world_size, case=case, layouts=layouts, precisions=PRECISIONS):
        for (layout, name), found in by_layout.items():
            seen.add((layout, name))
            _assert_close(found, PRECISIONS[name], where=(layout, name))
            if name == "fp32":
                assert not found.lowered
            if name.startswith("bf16 products"):
                assert found.lowered <= PRODUCTS | MOVES, found.lowered
                assert len(found.lowered & PRODUCTS) >= 2, "linear layers and attention are lowered"
    assert seen == {(layout, name) for layout in layouts for name in PRECISIONS}


def test_stand_ins_for_what_needs_a_gpu_score_like_fp64_at_long_positions(ranks: RankPool, case: Case) -> None:
    (by_layout,) = ranks(score, 1, case=case, layouts=LAYOUTS[1], precisions=STAND_INS)
    for (_, name), found in by_layout.items():
        _assert_close(found, STAND_INS[name], where=name)
        assert found.lowered & PRODUCTS
