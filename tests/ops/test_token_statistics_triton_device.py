"""The Triton kernels compile for three GPU generations, with no GPU at hand, and (marker gpu) are right on one.

What they compute is tested in ``test_token_statistics_triton.py``, under Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import OtherRows
from tests.support.token_statistics import (
    GRADIENTS,
    TRITON_CASES,
    Case,
    assert_as_good_as_naive,
    statistics_with,
    values_and_gradients,
    values_of,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_cpu_tensors_and_fp64_are_refused_outside_the_interpreter() -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(2, 8, 8, hidden_size=16).tensors()
    for dtype, message in ((torch.float32, "GPU"), (torch.float64, "fp32, bf16 or fp16")):
        with pytest.raises(ValueError, match=message):
            statistics_with(hidden_RD.to(dtype), weight_VD.to(dtype), target_R, impl="triton")


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
    matrices = ("hidden", "counterfactual", "weight", "counterfactual_weight", "other", "other_weight", "a", "b")
    types |= {f"{name}_ptr": f"*{dtype}" for name in matrices}
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


PRODUCTS = ("hidden_grad", "weight_grad")


def compile_cases() -> list[Any]:
    cases = []
    for capability in (80, 90, 100):
        for dtype in ("bf16", "fp16", "fp32"):
            for name in ("statistics", "counterfactual", "reference", "logit_gradient", "kl_gradient", *PRODUCTS):
                if dtype == "bf16" or (capability == 90 and name in ("reference", "kl_gradient")):
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
    own = two if dtype == "fp32" else triton_impl.HALF_SIZES_OF_TWO_WEIGHTS
    kernel, size, constants = {
        "statistics": (kernels.statistics_kernel, one[0], {"HAS_COUNTERFACTUAL": False, "HAS_OWN_WEIGHT": False}),
        "counterfactual": (kernels.statistics_kernel, two[0], {"HAS_COUNTERFACTUAL": True, "HAS_OWN_WEIGHT": False}),
        "reference": (kernels.statistics_kernel, own[0], {"HAS_COUNTERFACTUAL": True, "HAS_OWN_WEIGHT": True}),
        "logit_gradient": (kernels.logit_gradient_kernel, one[0], {"HAS_SLOPE": True, "HAS_OTHER": False}),
        "kl_gradient": (kernels.logit_gradient_kernel, two[0], {"HAS_SLOPE": True, "HAS_OTHER": True}),
        "hidden_grad": (kernels.product_kernel, one[0], {"A_TRANSPOSED": False}),
        "weight_grad": (kernels.product_kernel, one[0], {"A_TRANSPOSED": True}),
    }[name]
    names = triton_impl.PRODUCT_NAMES if name in PRODUCTS else triton_impl.TILE_NAMES
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
    hidden_RD, *others, reference_RD = normal(4, 6144, 3584).to(dtype).unbind()
    weight_VD, own_VD = ((normal(num_columns, 3584) * 2 / 3584**0.5).to(dtype) for _ in range(2))
    reference = OtherRows(reference_RD, own_VD, has_kl_gradient=True)
    target_R = torch.randint(0, num_columns, (6144,), generator=generator, device="cuda")
    gradients = normal(3, 6144).unbind()
    for grad_R in gradients:
        grad_R[::2] = 0
    results = {}
    for impl in ("triton", "chunked"):
        hidden, weight = hidden_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        result = statistics_with(
            hidden, weight, target_R, counterfactual_hidden_RD=others, reference=reference, impl=impl
        )
        torch.autograd.backward([result.logprob_R, result.entropy_R, result.reference_kl_R], gradients)
        results[impl] = values_of(result) | dict(zip(GRADIENTS, (hidden.grad, weight.grad), strict=True))
    for name, ours in results["triton"].items():
        theirs = results["chunked"][name]
        assert ours.isfinite().all(), name
        # Values: fp32 sums over 3,584 and then up to 152,064 terms, in another order. Gradients: d z and the result
        # are rounded to 8 (bf16) significant bits at slightly different numbers.
        tolerance = 4e-3 if name in GRADIENTS else 1e-5
        assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm(), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TRITON_CASES)
def test_on_a_gpu_error_is_at_most_that_of_full_logits(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype, device="cuda")
    ours = values_and_gradients(statistics_with, case, dtype=dtype, impl="triton")
    # As under the interpreter; a GPU's exp is good to 2 units, not half a one.
    assert_as_good_as_naive(ours, case, units=16)
