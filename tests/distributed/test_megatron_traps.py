"""megatron-core on CPU: every layout gives one process's numbers, and each known trap is held shut.

Sums are in another order in another layout, so equality is up to float32 rounding: losses and gradient norms agree
to 1e-5 relative (seen: 3e-7); a wrong message, scale or missing reduction is off by 1e-2 at the very least.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.distributed.groups import ParallelSizes, pipeline_comm_settings
from megatron_ktr.distributed.platform import start
from megatron_ktr.errors import UserError
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ranks import RankContext, RankPool

ROUNDING = 1e-5
BF16 = 2e-2
"""bf16 keeps 8 bits (4e-3 relative per operation); several layers' worth."""
LENGTHS = [5, 9, 16, 7]

Row = list[tuple[float, float]]


def _train_all(
    context: RankContext, *, cases: dict[str, tuple[ParallelSizes, dict[str, Any]]], num_steps: int = 2
) -> dict[str, Row]:
    from tests.support.gpt import make_trainee, train

    return {
        name: train(make_trainee(context.init(sizes), **options), num_steps=num_steps)
        for name, (sizes, options) in cases.items()
    }


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> dict[str, Row]:
    """One process: the truth for fixed lengths, variable lengths and bf16."""
    one = ParallelSizes()
    cases = {
        "fixed": (one, {}),
        "variable": (one, {"lengths": LENGTHS}),
        "bf16": (one, {"bf16": True}),
        "no bias": (one, {"add_bias_linear": False}),
    }
    return ranks(_train_all, world_size=1, cases=cases)[0]


def _assert_equal(rows: Row, expected: Row, *, name: str, tolerance: float = ROUNDING) -> None:
    for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(zip(rows, expected, strict=True)):
        # Adam divides by the gradient's own size: rounding moves an element by up to lr, the next loss by 1e-4.
        widened = tolerance if step == 0 else max(tolerance, 5e-4)
        assert loss == pytest.approx(expected_loss, rel=widened), (name, step)
        assert norm == pytest.approx(expected_norm, rel=widened), (name, step)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TWO_RANKS: dict[str, tuple[ParallelSizes, dict[str, Any], str]] = {
    "tensor": (ParallelSizes(tensor=2), {}, "fixed"),
    "sequence": (ParallelSizes(tensor=2, sequence_parallel=True), {}, "fixed"),
    "pipeline": (ParallelSizes(pipeline=2), {}, "fixed"),
    "data": (ParallelSizes(), {}, "fixed"),
    "data without distributed optimizer": (ParallelSizes(), {"distributed_optimizer": False}, "fixed"),
    "data, overlapped": (ParallelSizes(), {"overlap": True}, "fixed"),
    "interleaved pipeline": (ParallelSizes(pipeline=2, virtual_pipeline=2), {}, "fixed"),
    "pipeline, variable lengths": (ParallelSizes(pipeline=2), {"lengths": LENGTHS}, "variable"),
    "interleaved, variable lengths": (ParallelSizes(pipeline=2, virtual_pipeline=2), {"lengths": LENGTHS}, "variable"),
    "sequence, full recompute": (ParallelSizes(tensor=2, sequence_parallel=True), FULL, "fixed"),
    "norm and activation recompute": (
        ParallelSizes(tensor=2),
        {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "layernorm", "mlp"],
            "add_bias_linear": False,
        },
        "no bias",
    ),
    "bf16": (ParallelSizes(tensor=2), {"bf16": True}, "bf16"),
}


def test_every_layout_of_two_ranks_equals_one_process(ranks: RankPool, reference: dict[str, Row]) -> None:
    cases = {name: (sizes, options) for name, (sizes, options, _) in TWO_RANKS.items()}
    for results in ranks(_train_all, world_size=2, cases=cases):
        for name, rows in results.items():
            kind = TWO_RANKS[name][2]
            _assert_equal(rows, reference[kind], name=name, tolerance=BF16 if kind == "bf16" else ROUNDING)


def test_tensor_by_pipeline_and_data_equal_one_process(ranks: RankPool, reference: dict[str, Row]) -> None:
    cases = {
        "tensor x pipeline": (ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), {}),
        "tensor x data": (ParallelSizes(tensor=2), {}),
        "pipeline x data": (ParallelSizes(pipeline=2), {}),
    }
    for results in ranks(_train_all, world_size=4, cases=cases):
        for name, rows in results.items():
            _assert_equal(rows, reference["fixed"], name=name)


# Pipeline messages


def test_interleaved_stages_with_batched_messages_are_wrong_and_refused(
    ranks: RankPool, reference: dict[str, Row]
) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ktr.distributed.checks import check_transformer_config

    sizes = ParallelSizes(pipeline=2, virtual_pipeline=2)
    wrong = {"batch_p2p_comm": True, "overlap_p2p_comm": False}
    rows = ranks(_train_all, world_size=2, cases={"wrong": (sizes, wrong)}, num_steps=1)[0]["wrong"]
    # If this fails, megatron-core has mended it: the refusal can go.
    assert abs(rows[0][1] / reference["fixed"][0][1] - 1) > 0.1

    settings = dict(num_layers=4, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32)
    layout = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(UserError, match="overlap_p2p_comm=True, batch_p2p_comm=False"):
        check_transformer_config(TransformerConfig(**settings, **layout, **wrong))
    check_transformer_config(TransformerConfig(**settings, **layout, **pipeline_comm_settings(sizes)))
    check_transformer_config(TransformerConfig(**settings))

    endless = dict(recompute_granularity="selective", recompute_modules=["mlp"])
    with pytest.raises(UserError, match="add_bias_linear=False"):
        check_transformer_config(TransformerConfig(**settings, **endless))


def test_variable_lengths_need_the_dispatcher_that_the_helper_names() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = dict(num_layers=2, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ValueError, match="variable sequence length"):
        TransformerConfig(**settings, variable_seq_lengths=True)
    assert TransformerConfig(**settings, **pipeline_comm_settings(ParallelSizes())).variable_seq_lengths


# Sequence parallelism


def _norm_gradients(context: RankContext) -> list[list[float]]:
    from tests.support.gpt import accumulate_gradients, make_trainee

    sequence = context.world_size > 1
    groups = context.init(ParallelSizes(tensor=context.world_size, sequence_parallel=sequence))
    trainee = make_trainee(groups)
    accumulate_gradients(trainee)
    parameters = trainee.chunks[0].named_parameters()
    return [parameter.main_grad.tolist() for name, parameter in parameters if "layernorm" in name]


def test_norm_gradients_under_sequence_parallelism_are_whole_after_finalising(ranks: RankPool) -> None:
    (expected,) = ranks(_norm_gradients, world_size=1)
    for gradients in ranks(_norm_gradients, world_size=2):
        torch.testing.assert_close(torch.tensor(gradients), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_torch_norm_wrapper_still_refuses_sequence_parallelism() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    start("cpu")
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2, sequence_parallel=True
    )
    # The reason our layer specs bring their own norm.
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config, 8)


# Recomputation draws the same dropout


def _dropout_gradients(context: RankContext, *, recompute: dict[str, Any]) -> float:
    from tests.support.gpt import make_trainee, train

    trainee = make_trainee(
        context.init(ParallelSizes(), seed=5), hidden_dropout=0.2, attention_dropout=0.2, **recompute
    )
    return train(trainee, num_steps=1)[0][1]


def test_recomputed_forward_repeats_its_dropout(ranks: RankPool) -> None:
    (plain,) = ranks(_dropout_gradients, world_size=1, recompute={})
    (recomputed,) = ranks(_dropout_gradients, world_size=1, recompute=FULL)
    # Same masks, same operations; another mask moves the norm by tens of percent.
    assert recomputed == pytest.approx(plain, rel=1e-5)


# Optimizer state


def _continue_from_checkpoint(context: RankContext, *, folder: str, **options: Any) -> tuple[Row, Row, int]:
    from megatron.core import dist_checkpointing

    from megatron_ktr.distributed.checks import check_checkpoint_packages
    from megatron_ktr.distributed.optimizer_checkpoint import (
        agreed_steps,
        load_optimizer_state,
        optimizer_sharded_state,
        optimizer_shards,
    )
    from tests.support.gpt import Trainee, make_trainee, train

    def sharded(trainee: Trainee, *, is_loading: bool) -> dict[str, Any]:
        weights = trainee.chunks[0].module.sharded_state_dict()
        state = optimizer_sharded_state(
            trainee.optimizer, weights, num_steps=agreed_steps(trainee.optimizer), is_loading=is_loading
        )
        return {"model": weights, "optimizer": state}

    check_checkpoint_packages()
    groups = context.init()
    trainee = make_trainee(groups, **options)
    train(trainee, num_steps=2)
    if groups.rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded(trainee, is_loading=False), folder)
    uninterrupted = train(trainee, num_steps=3)

    resumed = make_trainee(groups, **options)
    state = sharded(resumed, is_loading=True)
    shards = optimizer_shards(resumed.optimizer, state["model"])
    loaded = dist_checkpointing.load(state, folder)
    resumed.chunks[0].module.load_state_dict(loaded["model"])
    load_optimizer_state(resumed.optimizer, loaded["optimizer"], shards=shards, checkpoint=Path(folder))
    inner = getattr(resumed.optimizer, "chained_optimizers", [resumed.optimizer])[0].optimizer
    step_tensors = {state["step"].data_ptr() for state in inner.state.values()}
    assert {float(state["step"]) for state in inner.state.values()} == {2.0}
    return uninterrupted, train(resumed, num_steps=3), len(inner.state) - len(step_tensors)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
def test_run_continued_from_a_checkpoint_equals_the_uninterrupted_one(
    ranks: RankPool, tmp_path: Path, distributed: bool
) -> None:
    folder = str(tmp_path / "checkpoint")
    results = ranks(_continue_from_checkpoint, world_size=2, folder=folder, distributed_optimizer=distributed)
    for uninterrupted, continued, num_shared_steps in results:
        assert num_shared_steps == 0
        # Bit for bit: the same layout does the same sums.
        assert continued == uninterrupted


def _steps_after_plain_load(context: RankContext) -> tuple[str, list[float]]:
    """What happens without ``optimizer_state.py``: the error, and the steps after one update."""
    from tests.support.gpt import make_trainee, train

    groups = context.init()
    try:
        make_trainee(groups).optimizer.state_dict()
        error = ""
    except AssertionError:
        error = "AssertionError"
    trainee = make_trainee(groups)
    train(trainee, num_steps=1)
    trainee.optimizer.load_state_dict(trainee.optimizer.state_dict())
    train(trainee, num_steps=1)
    inner = getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer])[0].optimizer
    return error, [float(state["step"]) for state in inner.state.values()]


def test_without_preparation_the_step_count_jumps(ranks: RankPool) -> None:
    error, steps = ranks(_steps_after_plain_load, world_size=1)[0]
    # If this fails, megatron-core has mended it: optimizer_state.py can go.
    assert error == "AssertionError"
    assert max(steps) > 2


def test_optimizers_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer import OptimizerConfig

    from megatron_ktr.distributed.checks import check_checkpoint_packages, check_optimizer_config

    platform = start("cpu")
    check_optimizer_config(OptimizerConfig(optimizer="adam", lr=1.0), platform=platform)
    precision_aware = OptimizerConfig(optimizer="adam", lr=1.0)
    precision_aware.use_precision_aware_optimizer = True
    with pytest.raises(UserError, match="Transformer Engine"):
        check_optimizer_config(precision_aware, platform=platform)
    with pytest.raises(UserError, match="--no-use-distributed-optimizer"):
        check_optimizer_config(
            OptimizerConfig(optimizer="sgd", lr=1.0, use_distributed_optimizer=True), platform=platform
        )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "psutil" else find(name))
    with pytest.raises(UserError, match="psutil"):
        check_checkpoint_packages()


COMPILED_FORMS = """
import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu

forms = dict.fromkeys(("bias_dropout_add_fused_train", "swiglu", "bias_swiglu", "swiglu_back", "bias_swiglu_back"), 0)

def compiled(name, module):
    def count(graph, _):
        forms[name] += 1
        return graph.forward
    function = getattr(module, name)
    plain = getattr(function, "_torchdynamo_orig_callable", function)
    setattr(module, name, torch.compile(plain, backend=count))

for name in forms:
    compiled(name, fused_bias_dropout if "dropout" in name else fused_bias_swiglu)
# What is trained: x, residual, bias. Scored; in the graph; the first layer of a run again; all frozen.
VISION = [(False, False, True), (True, True, True), (False, True, True), (False, False, False)]
LANGUAGE = [(False, False, None), (True, True, None), (False, True, None), (True, False, None)]
torch._dynamo.config.recompile_limit = 64
for rows in (12, 20, 28):
    for width, kinds in ((8, VISION), (16, LANGUAGE)):
        for x_grad, residual_grad, bias_grad in kinds:
            x = torch.randn(rows, 1, width, requires_grad=x_grad)
            residual = torch.randn(rows, 1, width, requires_grad=residual_grad)
            bias = None if bias_grad is None else torch.randn(width, requires_grad=bias_grad)
            fused_bias_dropout.bias_dropout_add_fused_train((x, bias), residual, 0.0)
            out = fused_bias_swiglu.bias_swiglu_impl(x, bias)
            if out.requires_grad:
                out.sum().backward()
print(forms)
"""


@pytest.mark.slow
def test_of_the_compiled_fusions_only_bias_and_dropout_would_pass_torchs_limit() -> None:
    """It stops at 8 forms of a function, and runs the rest as they are written: hence ``residual.py``. In a process of
    its own, where nothing has replaced ``torch.compile``."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_FORMS], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    forms = ast.literal_eval(done.stdout.splitlines()[-1])
    assert forms.pop("bias_dropout_add_fused_train") > 8
    assert max(forms.values()) <= 8 and min(forms.values()) > 0, forms
