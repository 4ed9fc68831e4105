"""What each FP8 recipe needs: rows, sizes of matrices, a device."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from megatron_ktr.config import Config
from megatron_ktr.config.fp8_rules import rows_per_rank, why_not_of_sizes, why_not_on_device
from megatron_ktr.config.part_options import row_multiple
from megatron_ktr.config.sections import ModelSection, ObjectiveSection, ParallelSection
from megatron_ktr.config.words import Fp8Recipe
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

RECIPES: tuple[str, ...] = typing.get_args(Fp8Recipe)
FP8 = ModelSection(model="m", params_dtype="bf16", fp8_format="hybrid")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tensor_size", [1, 2, 8])
def test_rows_satisfy_every_rule_of_transformer_engine_and_no_fewer_would(recipe: str, tensor_size: int) -> None:
    """The rules, read in versions 2.11 and 2.17: ``assert_dim_for_fp8_exec`` (rows by 8), ``is_quantizable`` of what is
    gathered, 16 bytes in a row of the transposed operand of the weights' gradient, whole MXFP8 blocks
    (``MXFP8Quantizer``)."""

    def is_sound(rows: int) -> bool:
        """Of one rank; all tensor ranks' rows meet in the product if they share the sequence."""
        whole = rows * tensor_size
        rules = [rows % 8 == 0, whole % 16 == 0]
        if recipe == "mxfp8":
            rules += [rows % 32 == 0]
        if recipe == "blockwise" and tensor_size > 1:
            rules += [rows % 128 == 0]
        return all(rules)

    multiple = rows_per_rank(recipe, sequence_parallel=tensor_size > 1)
    assert is_sound(multiple) and 128 % multiple == 0, "128 rows per rank serve all"
    smaller = [rows for rows in range(1, multiple) if is_sound(rows)]
    # Per-tensor scales under sequence parallelism would take 8 per rank; megatron-core aligns to 16.
    assert smaller == ([8] if recipe in ("tensorwise", "delayed") and tensor_size > 1 else [])


def test_tokens_are_padded_for_the_ranks_that_share_them_and_only_under_fp8() -> None:
    shared = ParallelSection(tensor_model_parallel_size=4, sequence_parallel=True)
    assert row_multiple(Config(parallel=shared)) == 4
    assert row_multiple(Config(parallel=dataclasses.replace(shared, sequence_parallel=False))) == 1
    blockwise = dataclasses.replace(FP8, fp8_recipe="blockwise")
    assert row_multiple(Config(model=blockwise, parallel=shared)) == 4 * 128
    assert row_multiple(Config(model=blockwise)) == 16
    scoring = Config(objective=ObjectiveSection(scoring_precision="fp8"), parallel=shared)
    assert row_multiple(scoring) == 4 * 16


@pytest.mark.parametrize(
    ("recipe", "capability", "toolkit", "part"),
    [
        ("tensorwise", None, None, "this platform is cpu"),
        ("tensorwise", (8, 0), (13, 0), "compute capability 8.9, and this GPU has 8.0"),
        ("delayed", (8, 9), (12, 4), None),
        ("blockwise", (8, 9), (13, 0), "compute capability 9.0"),
        ("blockwise", (9, 0), (12, 8), "CUDA 12.9, and torch was built with 12.8"),
        ("blockwise", (9, 0), (12, 9), None),
        ("blockwise", (9, 0), (12, 10), None),
        ("mxfp8", (9, 0), (13, 0), "compute capability 10.0, and this GPU has 9.0"),
        ("mxfp8", (10, 0), (12, 8), None),
        ("mxfp8", (12, 0), (13, 0), "does not offer it on compute capability 12.0"),
    ],
)
def test_recipes_are_checked_against_the_gpu(recipe, capability, toolkit, part) -> None:
    reason = why_not_on_device(recipe, capability=capability, toolkit=toolkit)
    assert reason is None if part is None else part in reason


def test_published_models_fit_but_for_one_layout() -> None:
    from models.qwen2_5_vl.fp8 import _language_sizes

    unfit = []
    for name, config in PUBLISHED_CONFIGS.items():
        for recipe in RECIPES:
            for tensor_size in (1, 2, 4, 8):
                if config.text.num_attention_heads % tensor_size:
                    continue
                sizes = _language_sizes(config.text, tensor_size)
                hidden = config.text.hidden_size
                if why_not_of_sizes(recipe, sizes=sizes, hidden_size=hidden, gathers=tensor_size > 1):
                    unfit.append((name, recipe, tensor_size))
    assert unfit == [("72B", "mxfp8", 8)], "its MLP of 29568 leaves 3696 = 115.5 blocks of 32 on each of 8 ranks"
