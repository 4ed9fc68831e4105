"""The language model on one rank: Hugging Face parity on text, recomputation, precision, layer specifications."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.sections import ModelSection, ParallelSection
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.ops.prefix_attention import prefix_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.types import GroupSpan, PackedBatch, PackedLayout
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.parity import (
    Group,
    Medium,
    hf_reference,
    make_group,
    max_relative_difference,
    pack,
    weights_R,
)
from tests.support.tiny import save_tiny_hf

MEDIA = (Medium("image", (1, 4, 6)), Medium("video", (2, 4, 4), seconds_per_grid=1.0))
LAYOUT = PackedLayout((GroupSpan(0, 3, (2, 4)), GroupSpan(9, 5, (1, 0, 3))), num_padding=4)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    save_tiny_hf(directory, num_layers=3, vision_depth=2)
    return directory


@pytest.fixture
def run(hf_dir: Path, one_rank: ParallelGroups) -> Iterator[Callable]:
    """Builds the model with options, runs one batch forward and backward: (log-probs, gradients, model)."""
    from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights
    from models.qwen2_5_vl.model import build_model

    def forward_backward(batch: PackedBatch, weight_R: Tensor, **options: object) -> SimpleNamespace:
        chunks = build_model(Qwen2_5_VLConfig.from_hf(hf_dir), ranks=one_rank, **options)
        load_hf_weights(chunks, hf_dir, ranks=one_rank)
        model = chunks[0].train()
        logprob_R = model.response_statistics(model(batch), batch).logprob_R
        (-(weight_R * logprob_R).sum()).backward()
        gradients = dict(export_hf_tensors(chunks, ranks=one_rank, tensor_of=lambda p: p.grad))
        return SimpleNamespace(logprob_R=logprob_R.detach(), gradients=gradients, model=model)

    yield forward_backward


def groups_of(hf_dir: Path, *, media: tuple[Medium, ...]) -> list[Group]:
    config = Qwen2_5_VLConfig.from_hf(hf_dir)
    return [make_group(config, media=media, response_lengths=(4, 1, 6), seed=5)]


def test_text_model_equals_hugging_face(hf_dir: Path, run: Callable) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

    groups = groups_of(hf_dir, media=())
    model = HFModel.from_pretrained(hf_dir, attn_implementation="eager", dtype=torch.float32)
    expected_R, expected_gradients = hf_reference(model, groups)
    ours = run(pack(groups), weights_R(groups))
    # fp32 rounding through three layers; seen 1e-6 and 3e-6.
    torch.testing.assert_close(ours.logprob_R, expected_R, rtol=0, atol=1e-5)
    assert max_relative_difference(ours.gradients, expected_gradients) <= 1e-4
    # Text never touches the encoder, but its gradients exist, for data-parallel reduction.
    vision = [gradient for name, gradient in ours.gradients.items() if name.startswith("visual.")]
    assert vision and all(bool((gradient == 0).all()) for gradient in vision)


def test_padding_changes_nothing(hf_dir: Path, run: Callable) -> None:
    groups = groups_of(hf_dir, media=MEDIA)
    plain, padded = (run(pack(groups, pad_to_multiple=n), weights_R(groups)) for n in (1, 64))
    # Other matrix sizes may be summed in another order.
    torch.testing.assert_close(padded.logprob_R, plain.logprob_R, rtol=0, atol=5e-6)
    assert max_relative_difference(padded.gradients, plain.gradients) <= 2e-5


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelSection(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        ParallelSection(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
        ParallelSection(recompute_granularity="selective"),
    ],
    ids=["full uniform", "full block", "selective"],
)
def test_recomputation_changes_nothing(hf_dir: Path, run: Callable, parallel: ParallelSection) -> None:
    groups = groups_of(hf_dir, media=MEDIA)
    batch = pack(groups)
    stored = run(batch, weights_R(groups))
    recomputed = run(batch, weights_R(groups), options=ModelOptions.of(Config(parallel=parallel)))
    assert recomputed.model.config.recompute_granularity == parallel.recompute_granularity
    # The same operations on the same numbers, twice.
    torch.testing.assert_close(recomputed.logprob_R, stored.logprob_R, rtol=0, atol=0)
    assert max_relative_difference(recomputed.gradients, stored.gradients) <= 1e-6


@pytest.mark.parametrize("granularity", [None, "selective"])
def test_attention_implementations_give_the_same_model(hf_dir: Path, run: Callable, granularity: str | None) -> None:
    """The option reaches every layer, and stays in place when backward recomputes the attention."""
    groups = groups_of(hf_dir, media=MEDIA) + groups_of(hf_dir, media=())
    batch, found = pack(groups, pad_to_multiple=8), {}
    for impl in ("torch", "merged"):
        config = Config(
            model=ModelSection(attention_impl=impl), parallel=ParallelSection(recompute_granularity=granularity)
        )
        found[impl] = run(batch, weights_R(groups), options=ModelOptions.of(config))
        layers = found[impl].model.language.decoder.layers
        assert {layer.self_attention.core_attention.impl for layer in layers} == {impl}
    # fp32 rounding through three layers, sums in another order.
    torch.testing.assert_close(found["merged"].logprob_R, found["torch"].logprob_R, rtol=0, atol=5e-6)
    assert max_relative_difference(found["merged"].gradients, found["torch"].gradients) <= 2e-5


def test_bf16_stays_close_to_fp32(hf_dir: Path, run: Callable) -> None:
    groups = groups_of(hf_dir, media=MEDIA)
    exact = run(pack(groups), weights_R(groups))
    rounded = run(pack(groups), weights_R(groups), dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    # Eight bits of mantissa through three layers and the encoder; a wrong position moves values by about one.
    torch.testing.assert_close(rounded.logprob_R, exact.logprob_R, rtol=0, atol=0.1)


def test_vision_encoder_does_not_run_when_scoring_text(hf_dir: Path, run: Callable) -> None:
    """The hidden view costs text only."""
    groups = groups_of(hf_dir, media=())
    model = run(pack(groups), weights_R(groups)).model
    model.vision.forward = None  # calling it would raise
    with torch.no_grad():
        assert model(pack(groups)).isfinite().all()
    model.vision.requires_grad_(False)
    assert model(pack(groups)).requires_grad


def test_checkpoint_keys_do_not_depend_on_the_layer_specification(hf_dir: Path, run: Callable) -> None:
    groups = groups_of(hf_dir, media=())
    model = run(pack(groups), weights_R(groups)).model
    keys = {
        tensor.key for tensor in model.language.sharded_state_dict(prefix="language.").values() if tensor is not None
    }
    # Where Transformer Engine keeps the norms that are fused into the following linear layer.
    assert "language.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "language.decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys


def test_unsupported_requests_are_refused(hf_dir: Path, one_rank: ParallelGroups) -> None:
    import dataclasses

    from megatron_ktr.distributed.groups import ParallelSizes
    from models.qwen2_5_vl.layer_specs import resolve_transformer_impl
    from models.qwen2_5_vl.model import build_model

    assert resolve_transformer_impl("auto") == "local"
    with pytest.raises(UserError, match="--transformer-impl local"):
        resolve_transformer_impl("te")
    with pytest.raises(UserError, match="must be auto, te or local"):
        resolve_transformer_impl("fast")  # type: ignore[arg-type]
    model_config = Qwen2_5_VLConfig.from_hf(hf_dir)
    with pytest.raises(UserError, match="Transformer Engine"):
        build_model(
            model_config, ranks=one_rank, options=ModelOptions.of(Config(model=ModelSection(transformer_impl="te")))
        )
    for name, message in [("te", "--transformer-impl te"), ("varlen", "CUDA only")]:
        with pytest.raises(UserError, match=message):
            build_model(
                model_config, ranks=one_rank, options=ModelOptions.of(Config(model=ModelSection(attention_impl=name)))
            )
    for sizes, message in [
        (ParallelSizes(tensor=3), "must divide the 4 attention heads"),
        (ParallelSizes(pipeline=2), "must divide the 3 layers"),
    ]:
        with pytest.raises(UserError, match=message):
            build_model(model_config, ranks=dataclasses.replace(one_rank, sizes=sizes))


def test_visual_rows_without_patches_are_refused(hf_dir: Path, run: Callable) -> None:
    import dataclasses

    groups = groups_of(hf_dir, media=MEDIA)
    batch = pack(groups)
    model = run(batch, weights_R(groups)).model
    with pytest.raises(ValueError, match="visual rows but neither patches nor features"):
        model(dataclasses.replace(batch, patches_SD=None))


@pytest.fixture
def te_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """Our subclass of Transformer Engine's attention, on top of that attention's definition."""
    import megatron.core.extensions.transformer_engine as extensions

    from models.qwen2_5_vl import layer_specs

    monkeypatch.setattr(extensions, "TEDotProductAttention", BottomRightCausal)
    layer_specs.te_modules.cache_clear()
    yield layer_specs.te_modules().PrefixCoreAttention()
    layer_specs.te_modules.cache_clear()


def test_transformer_engine_attention_asks_for_shared_prefix_attention(te_attention: torch.nn.Module) -> None:
    """Transformer Engine cannot run here; what our subclass asks of it can be computed and compared."""
    from models.qwen2_5_vl.attention import PrefixSeqParams

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(LAYOUT.num_tokens, n, 8, generator=generator) for n in (4, 2, 2))
    out = te_attention(q, k, v, None, packed_seq_params=PrefixSeqParams.from_layout(LAYOUT))
    # Two implementations of softmax over at most a dozen fp32 terms.
    expected = prefix_attention(q, k, v, plan=AttentionPlan.of_layout(LAYOUT))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_transformer_engine_attention_gets_everybodys_keys_on_a_context_rank(te_attention: torch.nn.Module) -> None:
    from megatron_ktr.ops.context_shard import shard_layout
    from models.qwen2_5_vl.attention import PrefixSeqParams

    generator = torch.Generator().manual_seed(0)
    num_real = LAYOUT.num_tokens - LAYOUT.num_padding
    q, k, v = (torch.randn(num_real, n, 8, generator=generator) for n in (4, 2, 2))
    expected = prefix_attention(q, k, v, plan=AttentionPlan.of_layout(PackedLayout(LAYOUT.groups)))
    for rank in range(2):
        shard = shard_layout(LAYOUT, size=2, rank=rank, multiple=4)
        mine = torch.zeros(shard.num_rows, 4, 8).index_copy(0, torch.arange(len(shard.rows)), q[shard.rows])
        params = PrefixSeqParams.from_shard(shard, group=None)
        params.exchange = lambda key, value: (k, v)
        out = te_attention(mine, mine[:, :2], mine[:, :2], None, packed_seq_params=params)
        torch.testing.assert_close(out[: len(shard.rows)], expected[shard.rows], rtol=0, atol=2e-6)
        assert bool((out[len(shard.rows) :] == 0).all())


def test_transformer_engine_attention_of_a_context_rank_without_rows_is_zero(te_attention: torch.nn.Module) -> None:
    """One prompt token and one response: of four ranks the first and the last have something to do."""
    from megatron_ktr.ops.context_shard import shard_layout
    from megatron_ktr.types import GroupSpan
    from models.qwen2_5_vl.attention import PrefixSeqParams

    shard = shard_layout(PackedLayout((GroupSpan(0, 1, (3,)),)), size=4, rank=1)
    assert not shard.plan.segments
    params = PrefixSeqParams.from_shard(shard, group=None)
    k, v = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(2))
    params.exchange = lambda key, value: (k, v)
    mine = torch.randn(shard.num_rows, 4, 8)
    out = te_attention(mine, mine[:, :2], mine[:, :2], None, packed_seq_params=params)
    assert out.shape == (shard.num_rows, 32) and not out.any()
    # Connected: the exchange's backward is a collective, for which the other ranks wait.
    out.sum().backward()
    assert not k.grad.any() and not v.grad.any()


def test_transformer_engine_attention_multiplies_in_the_products_dtype(te_attention: torch.nn.Module) -> None:
    from models.qwen2_5_vl.attention import PrefixSeqParams
    from models.qwen2_5_vl.products import LanguageConfig

    q, k, v = (torch.randn(LAYOUT.num_tokens, n, 8) for n in (4, 2, 2))
    params = PrefixSeqParams.from_layout(LAYOUT)
    exact = te_attention(q, k, v, None, packed_seq_params=params)
    te_attention.config = LanguageConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, product_dtype=torch.bfloat16
    )
    lowered = te_attention(q, k, v, None, packed_seq_params=params)
    assert te_attention.seen == {torch.float32, torch.bfloat16} and lowered.dtype == torch.float32
    # 8 bits of operands near 1, and of the result.
    assert 1e-5 < (lowered - exact).abs().max() < 0.05


class BottomRightCausal(torch.nn.Module):
    """What Transformer Engine does with packed segments and this mask, by its definition: query i of m may attend
    key j of n iff j <= i + n - m."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def forward(self, query, key, value, attention_mask, *, attn_mask_type, packed_seq_params) -> Tensor:
        self.seen |= {query.dtype, key.dtype, value.dtype}
        assert attn_mask_type.name == "padding_causal_bottom_right"
        bounds_q, bounds_kv = packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.cu_seqlens_kv.tolist()
        assert packed_seq_params.max_seqlen_q <= packed_seq_params.max_seqlen_kv
        repeats = query.shape[1] // key.shape[1]
        outputs = []
        for i in range(len(bounds_q) - 1):
            q = query[bounds_q[i] : bounds_q[i + 1]]
            k, v = (x[bounds_kv[i] : bounds_kv[i + 1]].repeat_interleave(repeats, dim=1) for x in (key, value))
            assert len(q) <= packed_seq_params.max_seqlen_q and len(k) <= packed_seq_params.max_seqlen_kv
            scores = torch.einsum("inh,jnh->nij", q, k) * q.shape[-1] ** -0.5
            allowed = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            outputs.append(torch.einsum("nij,jnh->inh", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v))
        return torch.cat(outputs)
