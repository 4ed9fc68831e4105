"""``benchmarks/fp8/emulation.py`` computes what FP8 hardware would, and ``benchmarks/fp8/run.py`` measures with it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fp8 import run as fp8_attribution
from benchmarks.fp8.emulation import (
    E4M3,
    E5M2,
    DelayedScale,
    EmulatedLinear,
    Emulation,
    Recipe,
    block_amax,
    e8m0_scale,
    power_of_two_scale,
    quantise,
    round_trip,
    tensor_scale,
)
from benchmarks.fp8.measures import Observed, compare, cosine, part_of, token_gradient_errors
from megatron_ktr.types import TokenScores

NAMES = ("tensorwise", "delayed", "blockwise", "mxfp8")
RECIPES = tuple(Recipe(name, form) for name in NAMES for form in ("hybrid", "e4m3"))
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe.format}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_layer(
    linear: EmulatedLinear, x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    """y, dx, dW (and db) of one forward and backward."""
    inputs = [value.clone().requires_grad_() for value in (x, weight, bias) if value is not None]
    y = linear(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


class TestQuantisation:
    def test_round_trip_equals_the_hand_worked_case(self) -> None:
        values = torch.tensor([0.55, -1.0, 0.3, 7.0])
        # Scale 448 / 7 = 64: 35.2, -64, 19.2, 448. e4m3 has steps of 4 from 32, of 2 from 16.
        scale = tensor_scale(values.abs().amax(), E4M3)
        assert scale == 64
        assert quantise(values, scale, E4M3).float().tolist() == [36, -64, 20, 448]
        assert round_trip(values, scale, E4M3).tolist() == [0.5625, -1.0, 0.3125, 7.0]
        # Scale 57,344 / 7 = 8,192: 4505.6, .., 2457.6. e5m2 has steps of 1,024 from 4,096, of 512 from 2,048.
        scale = tensor_scale(values.abs().amax(), E5M2)
        assert quantise(values, scale, E5M2).float().tolist() == [4096, -8192, 2560, 57344]
        assert round_trip(values, scale, E5M2).tolist() == [0.5, -1.0, 0.3125, 7.0]

    def test_powers_of_two_never_let_the_largest_overflow(self) -> None:
        amax = torch.tensor([7.0, 6.0, 7.5, 448.0, 0.0])
        # 448 / amax is 64, 74.7, 59.7, 1: rounded down. Zero blocks are left alone.
        assert power_of_two_scale(amax, E4M3).tolist() == [64, 64, 32, 1, 1]
        assert e8m0_scale(amax, E4M3).tolist() == [64, 64, 32, 1, 1]
        # An exponent in 8 bits: 2**-127 .. 2**127.
        assert e8m0_scale(torch.tensor([1e-45]), E4M3).item() == 2.0**127
        many = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e3 + 1e-3
        for dtype, largest in ((E4M3, 448), (E5M2, 57344)):
            for rule in (power_of_two_scale, e8m0_scale):
                scaled = many * rule(many, dtype)
                assert (scaled <= largest).all() and (scaled > largest / 2).all()

    def test_what_exceeds_the_format_becomes_its_largest_number(self) -> None:
        huge = torch.tensor([1e6, -1e9, 3e38])
        assert not torch.tensor([1e6]).to(E5M2).float().isfinite().all(), "torch's own cast overflows"
        assert quantise(huge, 1.0, E5M2).float().tolist() == [57344, -57344, 57344]
        assert quantise(huge, 1.0, E4M3).float().tolist() == [448, -448, 448]
        assert quantise(torch.tensor([float("nan")]), 1.0, E4M3).float().isnan().all(), "damage stays visible"

    @pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 32), (32, 1), (128, 1)])
    @pytest.mark.parametrize("shape", [(3, 130), (129, 7), (128, 128), (1, 1), (200, 300)])
    def test_blocks_cover_ragged_sizes(self, shape: tuple[int, int], block: tuple[int, int]) -> None:
        values = random(*shape)
        found = block_amax(values, block)
        assert found.shape == values.shape
        for top in range(0, shape[0], block[0]):
            for left in range(0, shape[1], block[1]):
                area = (slice(top, top + block[0]), slice(left, left + block[1]))
                assert (found[area] == values[area].abs().max()).all()


class TestDelayedScaling:
    def scales(self, amaxes: list[float], *, length: int, algorithm: str) -> list[float]:
        from collections import deque

        delayed = DelayedScale(E4M3, deque(maxlen=length), algorithm)
        return [delayed.use(torch.tensor([amax, -amax / 2]), moves_on=True) for amax in [*amaxes, 1.0]]

    def test_scale_comes_from_the_passes_before(self) -> None:
        # 448 / 2 = 224, 448 / 8 = 56, 448 / 4 = 112; the first pass knows nothing and takes 1.
        assert self.scales([2, 8, 4], length=1024, algorithm="max") == [1, 224, 56, 56]
        assert self.scales([2, 8, 4], length=1, algorithm="most_recent") == [1, 224, 56, 112]
        assert self.scales([8, 4, 2], length=2, algorithm="max") == [1, 56, 56, 112]
        assert self.scales([0, 4], length=1024, algorithm="max") == [1, 1, 112]

    def test_passes_without_gradient_use_the_scale_and_leave_their_amax(self) -> None:
        linear = EmulatedLinear(Recipe("delayed"))
        weight = torch.ones(1, 1)
        with torch.no_grad():
            for amax in (2.0, 8.0, 1.0):
                linear(torch.tensor([[amax]]), weight)
        assert linear.delayed["input"].scale == 1.0, "never moved on"
        linear(torch.tensor([[4.0]]), weight.requires_grad_())
        assert linear.delayed["input"].scale == 448 / 8, "the largest since"

    def test_a_larger_value_than_ever_saturates(self) -> None:
        linear = EmulatedLinear(Recipe("delayed"))
        weight = torch.eye(2)
        dy = torch.ones(1, 2)
        run_layer(linear, torch.tensor([[1.0, 0.5]]), weight, dy)
        y, dx, _ = run_layer(linear, torch.tensor([[3.0, 0.5]]), weight, dy * 100)
        assert y.tolist() == [[1.0, 0.5]] and dx.tolist() == [[1.0, 1.0]]


class TestProducts:
    def test_equal_scaled_mm_for_tensor_wise_scales(self) -> None:
        """torch's own FP8 product, on the very operands: y, dx and dW of one layer."""
        x, weight, dy = random(32, 64), random(48, 64, seed=1), random(32, 48, seed=2)
        for form, gradient_dtype in (("hybrid", E5M2), ("e4m3", E4M3)):
            dtypes = {"x": E4M3, "w": E4M3, "dy": gradient_dtype}
            scales = {n: tensor_scale(v.abs().amax(), dtypes[n]) for n, v in dict(x=x, w=weight, dy=dy).items()}
            eight = {n: quantise(v, scales[n], dtypes[n]) for n, v in dict(x=x, w=weight, dy=dy).items()}

            def product(left: Tensor, right: Tensor, names: str, scales=scales) -> Tensor:
                """left [a, k] times right [k, b], the second operand column-major as the kernel wants it."""
                one, other = names.split()
                column_major = right.t().contiguous().t()
                options = dict(scale_a=1 / scales[one], scale_b=1 / scales[other], out_dtype=torch.float32)
                return torch._scaled_mm(left.contiguous(), column_major, **options)

            expected = [
                product(eight["x"], eight["w"].t(), "x w"),
                product(eight["dy"], eight["w"], "dy w"),
                product(eight["dy"].t(), eight["x"], "dy x"),
            ]
            found = run_layer(EmulatedLinear(Recipe("tensorwise", form)), x, weight, dy)
            for one, other in zip(found, expected, strict=True):
                # Same operands, fp32 sums of up to 64 terms in another order.
                assert torch.allclose(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))

    @every_recipe
    def test_are_exact_where_the_operands_are(self, recipe: Recipe) -> None:
        """Whole numbers up to 7 have three significant bits, which e5m2 holds too: plain linear algebra must come out,
        with bias, leading dimensions and bf16."""
        generator = torch.Generator().manual_seed(0)

        def whole(*shape: int) -> Tensor:
            values = torch.randint(-7, 8, shape, generator=generator).float()
            values.view(-1)[0] = 7.0  # tensor-wise scales are powers of two then
            return values

        x, weight, bias, dy = whole(5, 1, 40), whole(24, 40), whole(24), whole(5, 1, 24)
        linear = EmulatedLinear(recipe)
        if recipe.name == "delayed":
            run_layer(linear, x, weight, dy, bias)
        found = run_layer(linear, x, weight, dy, bias)
        inputs = [value.clone().requires_grad_() for value in (x, weight, bias)]
        y = nn.functional.linear(*inputs)
        for one, other in zip(found, [y, *torch.autograd.grad(y, inputs, dy)], strict=True):
            assert torch.equal(one, other)
        in_bf16 = run_layer(linear, *(value.bfloat16() for value in (x, weight, dy, bias)))
        for one, other in zip(in_bf16, found, strict=True):
            assert one.dtype == torch.bfloat16 and torch.equal(one, other.bfloat16())

    @every_recipe
    def test_errors_are_those_of_the_formats(self, recipe: Recipe) -> None:
        """Against fp64, 256 x 1,024 x 512. Rounding to 4 significant bits leaves each operand a relative error of 2.6%,
        to 3 bits 5.3%; operands' errors add in squares: 3.7% and 5.9%."""
        x, weight, dy = random(256, 1024), random(512, 1024, seed=1) * 0.02, random(256, 512, seed=2)
        linear = EmulatedLinear(recipe)
        run_layer(linear, x, weight, dy)
        y, dx, dw = run_layer(linear, x, weight, dy)
        truth = (x.double() @ weight.double().T, dy.double() @ weight.double(), dy.double().T @ x.double())
        errors = [float((one - exact).norm() / exact.norm()) for one, exact in zip((y, dx, dw), truth, strict=True)]
        of_gradients = 0.059 if recipe.format == "hybrid" else 0.0375
        assert errors == pytest.approx([0.0375, of_gradients, of_gradients], rel=0.02)

    @every_recipe
    def test_small_rows_of_a_gradient_are_lost_by_one_scale_in_e4m3_alone(self, recipe: Recipe) -> None:
        """Rows a million times smaller than others, as small advantages and certain tokens make them. e4m3 spans
        448 / 2**-10, less than that; e5m2 and one scale per row do not mind."""
        dy = random(256, 512, seed=2) * 10 ** (-6 * torch.linspace(0, 1, 256))[:, None]
        weight = random(512, 128, seed=1)
        linear = EmulatedLinear(recipe)
        run_layer(linear, random(256, 128), weight, dy)
        _, dx, _ = run_layer(linear, random(256, 128), weight, dy)
        exact = dy.double() @ weight.double()
        worst = float(((dx - exact).norm(dim=1) / exact.norm(dim=1)).max())
        is_lost = recipe.format == "e4m3" and recipe.name in ("tensorwise", "delayed")
        # A row may round up to a few smallest numbers as well as down to zeros: off by its own size or more.
        assert worst > 0.99 if is_lost else worst < 0.08

    @every_recipe
    def test_zeros_stay_zeros(self, recipe: Recipe) -> None:
        x, weight, dy = random(4, 256), random(8, 256, seed=1), random(4, 8, seed=2)
        zeros = [torch.zeros_like(value) for value in (x, weight, dy)]
        linear = EmulatedLinear(recipe)
        assert all(not value.any() for value in run_layer(linear, *zeros))
        x[:, :128] = 0.0  # a block of zeros beside one of numbers
        for value in run_layer(linear, x, weight, dy):
            assert value.isfinite().all() and value.any()
        _, _, dw = run_layer(linear, x, weight, dy)
        assert not dw[:, :128].any()

    @every_recipe
    def test_an_outlier_costs_no_more_than_what_shares_its_scale(self, recipe: Recipe) -> None:
        x = torch.ones(2, 256)
        x[0, 0] = 2.0**19  # 448 / 2**19 is below half of e4m3's smallest number
        linear = EmulatedLinear(recipe)
        x_for_y, _ = linear.along_rows_and_columns(x, "input", moves_on=True)
        x_for_y, _ = linear.along_rows_and_columns(x, "input", moves_on=True)
        kept = x_for_y == x
        width = {"blockwise": 128, "mxfp8": 32}.get(recipe.name)
        expected = torch.ones_like(kept) if width else torch.zeros_like(kept)
        if width:
            expected[0, :width] = False
        expected[0, 0] = True
        assert torch.equal(kept, expected)

    @every_recipe
    def test_padding_with_zeros_changes_nothing(self, recipe: Recipe) -> None:
        """Sizes that no block divides, and the same in zeros up to the next multiple of 128."""
        sizes = num_rows, num_inputs, num_outputs = 37, 130, 65
        x, weight, dy = (random(*shape) for shape in ((37, 130), (65, 130), (37, 65)))

        def padded(values: Tensor) -> Tensor:
            return nn.functional.pad(values, (0, -values.shape[1] % 128, 0, -values.shape[0] % 128))

        y, dx, dw = run_layer(EmulatedLinear(recipe), x, weight, dy)
        y_padded, dx_padded, dw_padded = run_layer(EmulatedLinear(recipe), *map(padded, (x, weight, dy)))
        assert (y.shape, dx.shape, dw.shape) == ((37, 65), (37, 130), (65, 130)) and sizes == (37, 130, 65)
        # The same up to 130 terms and zeros, summed in another order in fp32.
        options = dict(rtol=0, atol=1e-4)
        assert torch.allclose(y, y_padded[:num_rows, :num_outputs], **options)
        assert torch.allclose(dx, dx_padded[:num_rows, :num_inputs], **options)
        assert torch.allclose(dw, dw_padded[:num_outputs, :num_inputs], **options)
        assert not y_padded[num_rows:].any() and not dw_padded[num_outputs:].any()


class Plain(nn.Module):
    """The part of megatron-core's parallel layers that the emulation takes hold of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(8, 16))

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> Tensor:  # noqa: A002
        return nn.functional.linear(input, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(input=x, weight=self.weight, bias=None, tp_group=None)


def test_emulation_ends_with_its_context_and_scales_live_on() -> None:
    layer, x = Plain(), random(4, 16, seed=1)
    emulation = Emulation({"0.fc1": layer}, Recipe("delayed"))
    before = layer(x)
    with pytest.raises(RuntimeError, match="inside"), emulation.on():
        assert not torch.equal(layer(x), before)
        raise RuntimeError("inside")
    assert torch.equal(layer(x), before)
    with emulation.on():
        with emulation.on():
            pass
        assert not torch.equal(layer(x), before), "the inner one leaves the outer one alone"
    scale = emulation.products["0.fc1"].delayed["input"].scale
    assert scale != 1
    with emulation.without_memory(), emulation.on():
        layer(3 * x)
        assert emulation.products["0.fc1"].delayed["input"].scale == pytest.approx(scale / 3)
    assert emulation.products["0.fc1"].delayed["input"].scale == scale


class TestMeasures:
    def observed(self, *, visual: list[float], chosen: list[bool], gradient: list[float]) -> Observed:
        score_R, chosen_R = torch.tensor(visual), torch.tensor(chosen)
        none_R = torch.zeros_like(chosen_R)
        return Observed(
            scores=[TokenScores(policy_logprob_R=score_R, logprob_of_view={"hidden": -score_R, "shuffled": score_R})],
            signal_scores=[{"entropy": score_R, "visual": score_R, "temporal": torch.full_like(score_R, torch.nan)}],
            chosen=[{"entropy": none_R, "visual": chosen_R, "temporal": none_R}],
            gradients={"language.decoder.layers.0.w": torch.tensor(gradient)},
        )

    def test_comparison_equals_the_hand_worked_case(self) -> None:
        one = self.observed(visual=[0.0, 1.0, 2.0], chosen=[True, True, False], gradient=[3.0, 4.0])
        other = self.observed(visual=[0.5, 1.0, 4.5], chosen=[False, True, True], gradient=[4.0, 3.0])
        found = compare(one, other)
        assert (found["score_change_visual_mean"], found["score_change_visual_max"]) == (1.0, 2.5)
        assert found["score_change_visual_median"] == 0.5
        assert found["score_change_temporal_mean"] is None, "no token has a temporal score"
        assert found["agreement_visual"] == found["agreement_union"] == 1 / 3
        assert found["agreement_entropy"] is None, "neither chose any"
        assert found["gradient_cosine"] == pytest.approx(24 / 25)
        assert compare(one, one)["agreement_visual"] == 1 and compare(one, one)["logprob_error_hidden_max"] == 0

    def test_a_gradient_of_zeros_has_no_direction(self) -> None:
        assert cosine({"w": torch.zeros(2)}, {"w": torch.ones(2)}) is None

    def test_token_gradients_are_compared_by_pull(self) -> None:
        truth_RD = torch.ones(8, 4)
        found_RD = truth_RD.clone()
        found_RD[:2] = 0.0
        found_RD[6:] *= 1.1
        pull_R = torch.tensor([1e-4, 1e-4, 1.0, 1.0, 1.0, 1.0, 10.0, 10.0])
        base = self.observed(visual=[0.0], chosen=[True], gradient=[1.0])
        found, truth = (dataclasses.replace(base, token_gradients_RD=rows) for rows in (found_RD, truth_RD))
        errors = token_gradient_errors(found, truth, pull_R)
        # Quarters by linear interpolation: up to 0.75, the two small tokens, both gone; from 3.25, the two large ones.
        assert errors["token_gradient_lost_small"] == 1 and errors["token_gradient_lost_large"] == 0
        assert errors["token_gradient_error_large_p95"] == pytest.approx(0.1, rel=1e-4)

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("vision.blocks.layers.0.mlp.linear_fc1.weight", "vision"),
            ("language.embedding.word_embeddings.weight", "embedding"),
            ("language.decoder.layers.2.mlp.linear_fc1.weight", "layer 2"),
            ("language.decoder.final_layernorm.weight", "final norm"),
            ("language.output_layer.weight", "head"),
        ],
    )
    def test_parts_of_the_model(self, name: str, part: str) -> None:
        assert part_of(name) == part


def spread_rewards(groups: list) -> list:
    """Rewards 0, 1, .. over each group's responses: an untrained model earns none, and without any there is no
    gradient to compare."""
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(rollout, rewards={"accuracy": float(index)})
                for index, rollout in enumerate(group.rollouts)
            ),
        )
        for group in groups
    ]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[dict]:
    """``benchmarks/fp8/run.py`` on an untrained model, with four variants."""
    from megatron_ktr.data.synthetic import corpus, make_dataset
    from megatron_ktr.data.tiny_model import save_tiny_model

    save_tiny_model(tmp_path / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    (tmp_path / "3_guess").mkdir()
    (tmp_path / "3_guess" / "export").symlink_to(tmp_path / "model")
    make_dataset(tmp_path / "data", num_train=6, num_eval=1, seed=0)
    sample, variants = fp8_attribution.sample, fp8_attribution.VARIANTS
    names = ("tensorwise, hybrid", "blockwise, e4m3", "delayed, hybrid", "tensorwise")
    monkeypatch.setattr(fp8_attribution, "VARIANTS", tuple(v for v in variants if v.name in names))
    monkeypatch.setattr(fp8_attribution, "sample", lambda *args, **options: spread_rewards(sample(*args, **options)))
    files = ["--out", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.svg")]
    sizes = ["--quickstart", str(tmp_path), "--prompts", "3", "--warm-up", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--json", *sizes, *files])
    fp8_attribution.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a.json").read_text())
    ElementTree.parse(tmp_path / "a.svg")
    yield printed


def test_attribution_benchmark_measures_what_it_says(report: dict) -> None:
    entries = {entry["name"]: entry for entry in report["results"]}
    assert list(entries) == ["bf16", "tensorwise, hybrid", "blockwise, e4m3", "delayed, hybrid", "tensorwise"]
    bf16 = entries["bf16"]["against_fp32"]
    assert 0 < bf16["logprob_error_intact_mean"] < 0.1 and bf16["gradient_cosine_same_tokens"] > 0.99
    for name in ("tensorwise, hybrid", "blockwise, e4m3", "delayed, hybrid"):
        found = entries[name]["against_fp32"]
        # e4m3 keeps 4 significant bits, bf16 8: far noisier, but still the same gradient.
        for view in ("intact", "hidden", "shuffled"):
            assert found[f"logprob_error_{view}_mean"] > 2 * bf16[f"logprob_error_{view}_mean"]
        assert 0.8 < found["gradient_cosine_same_tokens"] < bf16["gradient_cosine_same_tokens"]
        parts = found["gradient_cosine_by_part"]["same_tokens"]
        assert set(parts) == {"embedding", "vision", "layer 0", "layer 1", "final norm", "head"}
        assert entries[name]["quantised_rows_worst_all_linears"] > 0
    scoring = entries["tensorwise"]
    against_bf16 = scoring["against_bf16"]
    assert against_bf16["logprob_error_intact_max"] == against_bf16["score_change_entropy_max"] == 0
    assert against_bf16["agreement_entropy"] == 1, "the intact pass is not in FP8"
    assert against_bf16["logprob_error_hidden_mean"] > 0 and against_bf16["logprob_error_shuffled_mean"] > 0
    assert "gradient_cosine_same_tokens" not in against_bf16
    assert {entry["name"] for entry in report["products"]} == set(entries) - {"bf16", "tensorwise"}
    assert set(report["summary"]) == {f"{entry['case']}: {name}" for name, entry in entries.items()}
