"""The Triton kernels: right under the interpreter, compilable for three GPU generations, and (marker gpu) on one.

Triton decides when a kernel is decorated whether it will be interpreted. The interpreter tests therefore run in one
process of their own, started with TRITON_INTERPRET=1, so that this process can compile the same kernels and no other
test sees the variable. The interpreter's tiles are 32 x 64 x 32 with splits of 128 columns: the small problems below
have many tiles, splits and chunks, ragged in every direction.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.ops.token_statistics_interface import LogitGradient, ShardPlan
from megatron_ktr.ops.token_statistics_reference import token_statistics_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

VALUES = ("logprob_R", "entropy_R", "counterfactual_logprob_R", "kl_R")
GRADIENTS = ("hidden_grad", "weight_grad")

Interpreter = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """Runs a function of this module where Triton interprets; an exception there is raised here."""
    version = tuple(int(part) for part in importlib.metadata.version("triton").split("+")[0].split(".")[:2])
    if version < (3, 9):
        pytest.skip("the interpreter of triton before 3.9 cannot loop up to a runtime bound with numpy 2.4")
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # inherited by the process that the first call spawns
            pool.submit(_start_interpreting).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _start_interpreting() -> None:
    torch.set_num_threads(1)
    from megatron_ktr.ops import token_statistics_triton

    assert token_statistics_triton.IS_INTERPRETED


@dataclass(frozen=True)
class Case:
    num_rows: int
    hidden_size: int
    vocab_size: int
    padded_size: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    has_entropy_grad: bool = True
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Logits with a standard deviation of about 2. Padding rows of the weight are NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight_VD = (normal(self.padded_size, self.hidden_size) * 2 / self.hidden_size**0.5).to(self.dtype)
        weight_VD[self.vocab_size :] = float("nan")
        target_R = torch.randint(0, self.vocab_size, (self.num_rows,), generator=generator)
        target_R[-1:] = self.vocab_size - 1  # its neighbours in the tile are repeats of this very column
        hidden_RD = normal(self.num_rows, self.hidden_size)
        return {
            "hidden": hidden_RD.to(self.dtype),
            # Near the intact rows, as a counterfactual pass is: KL is then a small difference.
            "counterfactual": (hidden_RD + 0.3 * normal(self.num_rows, self.hidden_size)).to(self.dtype),
            "weight": weight_VD,
            "target": target_R,
            "logprob_grad": normal(self.num_rows),
            "entropy_grad": normal(self.num_rows),
        }


def evaluate(op: Callable, case: Case, *, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Values and gradients; with a counterfactual, so that both kinds of forward are seen over the cases."""
    tensors = case.tensors()
    hidden_RD, weight_VD = (tensors[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight"))
    result = op(
        hidden_RD,
        weight_VD,
        tensors["target"],
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        counterfactual_hidden_RD=tensors["counterfactual"].to(dtype),
        **options,
    )
    outputs, gradients = [result.logprob_R], [tensors["logprob_grad"]]
    if case.has_entropy_grad:
        outputs, gradients = outputs + [result.entropy_R], gradients + [tensors["entropy_grad"]]
    torch.autograd.backward(outputs, [gradient.to(result.logprob_R.dtype) for gradient in gradients])
    values = {name: getattr(result, name).detach() for name in VALUES}
    return values | {"hidden_grad": hidden_RD.grad, "weight_grad": weight_VD.grad}


def error(value: Tensor, truth: Tensor, *, least: float = 1e-3) -> float:
    """Largest error as a share of the largest true number, or of ``least`` if that is larger."""
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(least))


def triangle(case: Case) -> dict[str, tuple[Tensor, float, float]]:
    """Name -> (ours, error of ours, error of full logits in the working precision)."""
    truth = evaluate(token_statistics_reference, case, dtype=torch.float64)
    naive = evaluate(token_statistics_reference, case, dtype=case.dtype)
    ours = evaluate(linear_token_statistics, case, dtype=case.dtype, impl="triton")
    # KL is a difference of numbers of the entropy's size; its errors are theirs.
    least = {"kl_R": max(float(truth["entropy_R"].max()), 1e-3)}
    return {
        name: (ours[name], *(error(op[name], truth[name], least=least.get(name, 1e-3)) for op in (ours, naive)))
        for name in truth
    }


CASES = [
    pytest.param(Case(37, 48, 101, 101), id="primes"),
    pytest.param(Case(1, 16, 61, 64, seed=1), id="one-row"),
    pytest.param(Case(40, 80, 389, 448, temperature=0.7, seed=2), id="padding"),
    pytest.param(Case(8, 32, 128, 128, temperature=2.5, seed=3), id="full-tiles"),
    pytest.param(Case(3, 64, 1, 8, seed=4), id="one-token-vocabulary"),
    pytest.param(Case(33, 64, 300, 320, has_entropy_grad=False, seed=5), id="logprob-gradient-only"),
    pytest.param(Case(5, 24, 129, 129, seed=6), id="one-column-over"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_that_of_full_logits(interpreter: Interpreter, case: Case, dtype: torch.dtype) -> None:
    for name, (ours, our_error, naive_error) in interpreter(triangle, replace(case, dtype=dtype)).items():
        assert ours.dtype == (torch.float32 if name in VALUES else dtype), name
        assert ours.isfinite().all(), name
        # Both sum the same terms in another order, worth some units in the last place; d z is rounded to 16 bits by
        # both too, but at other values, since only naive also rounds the logits.
        assert our_error <= naive_error + 8 * torch.finfo(ours.dtype).eps, name
        if name == "weight_grad":
            assert not ours[case.vocab_size :].any(), "padding rows are not parameters"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_16_bit_inputs_are_exact_to_fp32(interpreter: Interpreter, dtype: torch.dtype) -> None:
    results = interpreter(triangle, Case(40, 64, 509, 512, dtype))
    # 16-bit products are exact in fp32, so only fp32 sums are left: 1e-6 is 8 units.
    for name in VALUES:
        assert results[name][1] < 1e-6, name


def shards(case: Case, shard_size: int) -> dict[str, Tensor]:
    """As ``evaluate``, from shards as tensor-parallel ranks have them, joined here in fp64."""
    from megatron_ktr.ops.token_statistics_triton import IMPLEMENTATION

    tensors = case.tensors()
    scale = 1 / case.temperature
    plans = [
        ShardPlan(first, min(max(case.vocab_size - first, 0), shard_size), case.vocab_size, scale)
        for first in range(0, case.padded_size, shard_size)
    ]
    weights = tensors["weight"].split(shard_size)
    partial = torch.stack(
        [
            IMPLEMENTATION.forward(tensors["hidden"], weight, tensors["target"], plan, tensors["counterfactual"])
            for weight, plan in zip(weights, plans, strict=True)
        ],
        dim=1,
    )
    m, s, u, t, m2, s2, w, t2 = partial.double()
    top, top2 = m.amax(0), m2.amax(0)
    decay = (m - top).exp()
    total, total2 = (decay * s).sum(0), ((m2 - top2).exp() * s2).sum(0)
    mean = (decay * (u + s * (m - top))).sum(0) / total
    difference = (decay * (w + s * ((m - top) - (m2 - top2)))).sum(0) / total
    g, e = tensors["logprob_grad"].double(), tensors["entropy_grad"].double()
    gradient = LogitGradient(
        target=tensors["target"],
        grad=g.float(),
        maximum=top.float(),
        offset=(-(g - e * mean) / total).float(),
        slope=(-e / total).float(),
    )
    weight_grad = torch.zeros_like(tensors["weight"], dtype=torch.float32)
    hidden_grads = [
        IMPLEMENTATION.backward(
            tensors["hidden"], weight, gradient, plan, needs_hidden_grad=True, weight_grad_VD=weight_grad_part
        )
        for weight, plan, weight_grad_part in zip(weights, plans, weight_grad.split(shard_size), strict=True)
    ]
    return {
        "logprob_R": t.sum(0) - top - total.log(),
        "entropy_R": total.log() - mean,
        "counterfactual_logprob_R": t2.sum(0) - top2 - total2.log(),
        "kl_R": difference - total.log() + total2.log(),
        "hidden_grad": sum(hidden_grads),
        "weight_grad": weight_grad,
    }


# 300 real columns of 400: a shard boundary inside, padding at the end of one shard, and shards of padding alone.
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_join_to_the_whole_vocabulary(interpreter: Interpreter, num_shards: int) -> None:
    case = Case(20, 32, 300, 400, temperature=1.3, seed=7)
    joined = interpreter(shards, case, case.padded_size // num_shards)
    truth = evaluate(token_statistics_reference, case, dtype=torch.float64)
    for name in VALUES + GRADIENTS:
        assert error(joined[name], truth[name]) < 2e-6, name  # fp32: 16 units


def extreme_logits(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows: uniform at 0, uniform at 1e4, uniform at -1e4, one at +1e4 on the target, the same off the target."""
    vocab_size = 150
    hidden_RD = torch.eye(16)[[0, 1, 2, 3, 3]] * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    weight_VD = torch.zeros(vocab_size, 16)
    weight_VD[:, 1], weight_VD[:, 2], weight_VD[11, 3] = 1e4, -1e4, 1e4
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    result = linear_token_statistics(
        hidden_RD,
        weight_VD,
        torch.tensor([0, 139, 7, 11, 12]),
        counterfactual_hidden_RD=hidden_RD.detach().flip(0),
        impl="triton",
    )
    (result.logprob_R.sum() + result.entropy_R.sum()).backward()
    values = tuple(getattr(result, name).detach() for name in VALUES)
    return (*values, hidden_RD.grad, weight_VD.grad, weight_VD.detach()[11, 3].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits(interpreter: Interpreter, dtype: torch.dtype) -> None:
    logprob, entropy, other_logprob, kl, hidden_grad, weight_grad, top = interpreter(extreme_logits, dtype)
    log_size = torch.tensor(150.0).log()
    assert torch.equal(entropy, torch.stack([log_size] * 3 + [torch.tensor(0.0)] * 2)), "uniform: exactly log V"
    assert torch.equal(logprob, torch.stack([-log_size] * 3 + [torch.tensor(0.0), -top]))
    # Row 0 against row 4 (all mass on one token), row 2 against itself, row 4 against row 0 (uniform).
    assert kl[0] == pytest.approx(float(top) * 149 / 150 - float(log_size), rel=1e-5)  # fp32 sums of 150 terms
    assert kl[2] == 0 and kl[4] == log_size
    assert other_logprob[0] == -top and other_logprob[3] == -log_size
    assert hidden_grad.isfinite().all() and weight_grad.isfinite().all()
    assert not hidden_grad[3].any(), "p(target) == 1: nothing left to learn"


def main_grad(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(main_grad before, after, what autograd received) for a 16-bit weight."""
    tensors = case.tensors()
    weight_VD = torch.nn.Parameter(tensors["weight"].nan_to_num())
    before = torch.randn(weight_VD.shape, generator=torch.Generator().manual_seed(1))
    weight_VD.main_grad = before.clone()
    result = linear_token_statistics(
        tensors["hidden"],
        weight_VD,
        tensors["target"],
        vocab_size=case.vocab_size,
        accumulate_into_main_grad=True,
        impl="triton",
    )
    result.logprob_R.backward(tensors["logprob_grad"])
    assert weight_VD.grad_added_to_main_grad
    return before, weight_VD.main_grad, weight_VD.grad


def test_weight_gradient_is_added_to_main_grad_unrounded(interpreter: Interpreter) -> None:
    case = Case(40, 48, 300, 320, torch.bfloat16, has_entropy_grad=False)
    before, after, returned = interpreter(main_grad, case)
    truth = evaluate(token_statistics_reference, case, dtype=torch.float64)["weight_grad"]
    assert not returned.any()
    # d z is rounded to 8 significant bits, at most 2^-9 of each term; the terms of the largest element, either sign
    # counted, are less than twice it.
    assert error((after - before)[:300], truth[:300]) < 2**-8
    assert torch.equal(after[300:], before[300:]), "padding rows are not parameters"
    assert not torch.equal(after, after.bfloat16().float())


def key_rows(case: Case, is_key_row: Tensor) -> list[Tensor]:
    """Gradients with a zero incoming gradient at all other rows."""
    tensors = case.tensors()
    hidden_RD, weight_VD = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    result = linear_token_statistics(
        hidden_RD, weight_VD, tensors["target"], vocab_size=case.vocab_size, temperature=case.temperature, impl="triton"
    )
    result.logprob_R.backward(tensors["logprob_grad"] * is_key_row)
    return [hidden_RD.grad, weight_VD.grad]


@pytest.mark.parametrize("num_key_rows", [0, 1, 17])
def test_rows_without_weight_get_no_gradient(interpreter: Interpreter, num_key_rows: int) -> None:
    case = Case(40, 32, 150, 160)
    is_key_row = torch.arange(40) % 2 == 0
    is_key_row &= is_key_row.cumsum(0) <= num_key_rows
    hidden_grad, weight_grad = interpreter(key_rows, case, is_key_row)
    tensors = case.tensors()
    hidden_RD, weight_VD = (tensors[name].double().requires_grad_() for name in ("hidden", "weight"))
    truth = token_statistics_reference(hidden_RD, weight_VD, tensors["target"], vocab_size=150)
    truth.logprob_R.backward((tensors["logprob_grad"] * is_key_row).double())
    assert not hidden_grad[~is_key_row].any()
    assert error(hidden_grad, hidden_RD.grad) < 2e-6 and error(weight_grad, weight_VD.grad) < 2e-6  # fp32: 16 units


def unusual_calls() -> None:
    """No rows; targets outside the vocabulary; one gradient only; a hidden matrix that is a view."""
    from megatron_ktr.ops.token_statistics_triton import IMPLEMENTATION

    case = Case(6, 32, 90, 90)
    tensors = case.tensors()
    plan = ShardPlan(first_id=0, num_columns=90, vocab_size=90, scale=1.0)
    hidden_RD, weight_VD, target_R = tensors["hidden"], tensors["weight"], tensors["target"]

    empty = linear_token_statistics(hidden_RD[:0].requires_grad_(), weight_VD, target_R[:0], impl="triton")
    assert empty.logprob_R.shape == (0,)
    empty.logprob_R.sum().backward()

    usual = IMPLEMENTATION.forward(hidden_RD, weight_VD, target_R, plan)
    unknown = IMPLEMENTATION.forward(hidden_RD, weight_VD, torch.tensor([-100, 90, *target_R[2:]]), plan)
    assert unknown[3].isnan().tolist() == [True, True, False, False, False, False]
    assert torch.equal(unknown[:3], usual[:3]) and torch.equal(unknown[3, 2:], usual[3, 2:])

    assert torch.equal(IMPLEMENTATION.forward(hidden_RD.t().contiguous().t(), weight_VD, target_R, plan), usual)
    # The same intact numbers, in the same bits, whether or not a counterfactual is there.
    assert torch.equal(IMPLEMENTATION.forward(hidden_RD, weight_VD, target_R, plan, hidden_RD)[:4], usual)

    gradient = LogitGradient(target_R, tensors["logprob_grad"], usual[0], -tensors["logprob_grad"] / usual[1], None)
    both = torch.zeros_like(weight_VD)
    hidden_grad = IMPLEMENTATION.backward(
        hidden_RD, weight_VD, gradient, plan, needs_hidden_grad=True, weight_grad_VD=both
    )
    alone = IMPLEMENTATION.backward(hidden_RD, weight_VD, gradient, plan, needs_hidden_grad=True, weight_grad_VD=None)
    assert torch.equal(alone, hidden_grad)
    weight_alone = torch.zeros_like(weight_VD)
    result = IMPLEMENTATION.backward(
        hidden_RD, weight_VD, gradient, plan, needs_hidden_grad=False, weight_grad_VD=weight_alone
    )
    assert result is None and torch.equal(weight_alone, both)


def test_unusual_calls(interpreter: Interpreter) -> None:
    interpreter(unusual_calls)


def test_cpu_tensors_and_fp64_are_refused_outside_the_interpreter() -> None:
    tensors = Case(2, 16, 8, 8).tensors()
    for dtype, message in ((torch.float32, "GPU"), (torch.float64, "fp32, bf16 or fp16")):
        with pytest.raises(ValueError, match=message):
            linear_token_statistics(
                tensors["hidden"].to(dtype), tensors["weight"].to(dtype), tensors["target"], impl="triton"
            )


def test_tiles_of_a_call_bound_its_memory() -> None:
    from megatron_ktr.ops import token_statistics_triton as triton_impl

    assert triton_impl.choose_chunk_columns(6144, 152064, itemsize=2) * 6144 * 2 <= triton_impl.CHUNK_BUDGET_BYTES
    assert triton_impl.choose_chunk_columns(10, 1000, itemsize=2) == 1024
    assert triton_impl.choose_chunk_columns(10**7, 152064, itemsize=2) == triton_impl.MAX_BLOCK_COLUMNS
    assert triton_impl.choose_split_columns(6144, 152064) == 4096  # 48 row blocks x 38 splits
    assert triton_impl.choose_split_columns(64, 152064) == 512  # one row block x 297 splits
    sizes = triton_impl.HALF_SIZES + triton_impl.HALF_SIZES_OF_TWO_PRODUCTS + triton_impl.FP32_SIZES
    assert all(triton_impl.MAX_BLOCK_COLUMNS % size[1] == 0 for size in sizes)


MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_MEMORY_BYTES = {80: 163 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}


def compiled(kernel: Any, capability: int, dtype: str, constants: dict[str, Any], size: tuple[int, ...]) -> Any:
    """The kernel for hidden size 3,584 on a GPU that need not be here; ptxas has accepted it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"target_ptr": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("hidden_ptr", "counterfactual_ptr", "weight_ptr", "a_ptr", "b_ptr"), f"*{dtype}")
    types |= {"out_ptr": f"*{dtype}"} if kernel.__name__ == "logit_gradient_kernel" else {}
    constants = {"D": 3584, "UPCAST": False, "PRECISION": "ieee"} | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        if name.endswith(("_ptr", "_stride")):  # as a launch finds them: divisible by 16
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": size[4], "num_stages": size[5]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_cases() -> list[Any]:
    cases = []
    for capability in (80, 90, 100):
        for dtype in ("bf16", "fp16", "fp32"):
            for name in ("statistics", "counterfactual", "logit_gradient", "hidden_grad", "weight_grad"):
                if dtype == "bf16" or (capability == 90 and name in ("counterfactual", "logit_gradient")):
                    cases.append(pytest.param(capability, dtype, name, id=f"sm_{capability}-{dtype}-{name}"))
    return cases


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("capability", "dtype", "name"), compile_cases())
def test_kernel_compiles(capability: int, dtype: str, name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, whatever an earlier run left
    from megatron_ktr.ops import token_statistics_triton as triton_impl
    from megatron_ktr.ops import token_statistics_triton_kernels as kernels

    one, two = (
        (triton_impl.FP32_SIZES, triton_impl.FP32_SIZES_OF_TWO_PRODUCTS)
        if dtype == "fp32"
        else (triton_impl.HALF_SIZES, triton_impl.HALF_SIZES_OF_TWO_PRODUCTS)
    )
    kernel, size, names, constants = {
        "statistics": (kernels.statistics_kernel, one[0], triton_impl.TILE_NAMES, {"HAS_COUNTERFACTUAL": False}),
        "counterfactual": (kernels.statistics_kernel, two[0], triton_impl.TILE_NAMES, {"HAS_COUNTERFACTUAL": True}),
        "logit_gradient": (kernels.logit_gradient_kernel, one[0], triton_impl.TILE_NAMES, {"HAS_SLOPE": True}),
        "hidden_grad": (kernels.product_kernel, one[0], triton_impl.PRODUCT_NAMES, {"A_TRANSPOSED": False}),
        "weight_grad": (kernels.product_kernel, one[0], triton_impl.PRODUCT_NAMES, {"A_TRANSPOSED": True}),
    }[name]
    constants |= {"SPLIT_COLUMNS": 4096} | dict(zip(names, size[:4], strict=True))
    result = compiled(kernel, capability, dtype, constants, size)
    assert f".target sm_{capability}" in result.asm["ptx"]
    assert len(result.asm["cubin"]) > 0
    # "ieee" fp32 products have no matrix instruction: they are exact, and slow.
    assert (MATRIX_INSTRUCTION[capability] in result.asm["ptx"]) == (dtype != "fp32")
    assert result.metadata.shared <= SHARED_MEMORY_BYTES[capability], "the first configuration must launch"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_join_kernel_compiles(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from megatron_ktr.ops import token_statistics_triton_kernels as kernels

    constants = {"HAS_COUNTERFACTUAL": True, "BLOCK_S": 64, "BLOCK_R": 16}
    result = compiled(kernels.join_kernel, capability, "fp32", constants, (0, 0, 0, 0, 4, 2))
    assert f".target sm_{capability}" in result.asm["ptx"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_on_a_gpu_equals_chunked_at_7b_size(num_shards: int, dtype: torch.dtype) -> None:
    """The first shard of Qwen2.5-VL-7B's head with 6,144 rows: eight responses of 768 tokens."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    num_columns = 152064 // num_shards
    hidden_RD, counterfactual_RD = normal(2, 6144, 3584).to(dtype).unbind()
    weight_VD = (normal(num_columns, 3584) * 2 / 3584**0.5).to(dtype)
    target_R = torch.randint(0, num_columns, (6144,), generator=generator, device="cuda")
    logprob_grad_R, entropy_grad_R = normal(2, 6144).unbind()
    logprob_grad_R[::2], entropy_grad_R[::2] = 0, 0
    results = {}
    for impl in ("triton", "chunked"):
        hidden, weight = hidden_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        result = linear_token_statistics(
            hidden, weight, target_R, counterfactual_hidden_RD=counterfactual_RD, impl=impl
        )
        torch.autograd.backward([result.logprob_R, result.entropy_R], [logprob_grad_R, entropy_grad_R])
        results[impl] = [getattr(result, name).detach() for name in VALUES] + [hidden.grad, weight.grad]
    for name, ours, theirs in zip(VALUES + GRADIENTS, results["triton"], results["chunked"], strict=True):
        assert ours.isfinite().all(), name
        # Values: fp32 sums over 3,584 and then up to 152,064 terms, in another order. Gradients: d z and the result
        # are rounded to 8 (bf16) significant bits at slightly different numbers.
        tolerance = 1e-5 if name in VALUES else 4e-3
        assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm(), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_error_is_at_most_that_of_full_logits(case: Case, dtype: torch.dtype, monkeypatch) -> None:
    case = replace(case, dtype=dtype)
    tensors = {name: tensor.cuda() for name, tensor in case.tensors().items()}
    monkeypatch.setattr(Case, "tensors", lambda self: tensors)
    for name, (ours, our_error, naive_error) in triangle(case).items():
        # As under the interpreter; a GPU's exp is good to 2 units, not half a one.
        assert our_error <= naive_error + 16 * torch.finfo(ours.dtype).eps, name
