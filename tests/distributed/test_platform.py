"""One platform contract; on CPU, cuda-minded code runs and everybody else's view of the machine is untouched."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ktr.distributed.platform import current, start
from megatron_ktr.errors import UserError
from megatron_ktr.sums import Metrics
from tests.support.ranks import RankContext, RankError, RankPool
from tests.support.tiny import save_tiny_hf


@pytest.fixture(autouse=True)
def _started() -> None:
    start("cpu")


def _add_and_sum(context: RankContext, *, value: int) -> tuple[float, dict[str, float], str]:
    from megatron_ktr.distributed.collectives import all_reduce_sum, barrier, broadcast_object, reduce_metrics

    groups = context.init()
    total = all_reduce_sum(torch.tensor([float(value + groups.rank)]), groups.world)
    metrics = Metrics()
    metrics.add("shared", groups.rank, count=1)
    if groups.rank == 1:
        metrics.add("only_one", 5.0, count=2)
    message = broadcast_object("from one" if groups.rank == 1 else None, group=groups.world, source=1)
    barrier()
    torch.distributed.barrier(device_ids=[0])
    return float(total), reduce_metrics(metrics, groups.world).means(), message


def _fail_on_rank_one(context: RankContext) -> None:
    if context.rank == 1:
        raise KeyError("rank one's trouble")


def _hang_on_rank_zero(context: RankContext) -> None:
    if context.rank == 0:
        time.sleep(3600)


def test_collectives_agree_on_every_rank_and_pool_survives_failures(ranks: RankPool) -> None:
    expected = (2 * 10 + 1, {"shared": 0.5, "only_one": 2.5}, "from one")
    assert ranks(_add_and_sum, world_size=2, value=10) == [expected] * 2
    with pytest.raises(RankError, match="rank one's trouble"):
        ranks(_fail_on_rank_one, world_size=2)
    with pytest.raises(RankError, match="no answer within"):
        ranks(_hang_on_rank_zero, world_size=1, timeout=1)
    assert ranks(_add_and_sum, world_size=2, value=10) == [expected] * 2


def test_no_group_means_one_process() -> None:
    from megatron_ktr.distributed.collectives import all_reduce_sum, broadcast_object, reduce_metrics

    metrics = Metrics()
    metrics.add("x", 3.0)
    assert float(all_reduce_sum(torch.tensor(2.0), None)) == 2.0
    assert broadcast_object({"a": 1}, group=None, source=0) == {"a": 1}
    assert reduce_metrics(metrics, None).means() == {"x": 3.0}


def test_cuda_devices_read_as_cpu_in_every_spelling() -> None:
    spellings: list[Tensor] = [
        torch.zeros(2, device="cuda"),
        torch.arange(3, device="cuda:1"),
        torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
        torch.ones(2, device=0),
        torch.ones(2, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.ones(2).cuda(0, non_blocking=True),
        torch.ones(2).to("cuda", torch.float64),
        torch.ones(2).to(device="cuda", non_blocking=True),
        torch.ones(2).to(torch.cuda.current_device()),
        torch.ones(2).new_empty(3, device="cuda"),
        torch.ones(2).pin_memory(),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2, device="cuda").to("cuda").weight,
    ]
    assert {tensor.device.type for tensor in spellings} == {"cpu"}
    assert torch.ones(2).to(torch.ones(2, dtype=torch.float16)).dtype is torch.float16
    assert torch.ones(2).to("meta").device.type == "meta"


def test_other_libraries_still_see_a_machine_without_cuda() -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert not torch.cuda.is_initialized()
    tensor = torch.ones(2, device="cuda")
    assert not tensor.is_cuda
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype is torch.float64
    with torch.device("meta"):
        assert torch.ones(2).device.type == "meta"
    assert torch.ones(2).device.type == "cpu"
    assert torch.utils.checkpoint.checkpoint(lambda x: x * 2, torch.ones(1), use_reentrant=False).item() == 2
    torch.manual_seed(3)
    seeded = torch.rand(4)
    with torch.random.fork_rng():
        torch.rand(10)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), seeded)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build for GPUs imports megatron-core as it is")
def test_megatron_core_is_imported_without_the_compiler() -> None:
    """Also here, where test modules imported it before any platform was started."""
    from megatron.core import jit
    from megatron.core.fusions import fused_bias_swiglu

    function = fused_bias_swiglu.swiglu
    assert torch.compile(function) is not function and hasattr(torch.compile(function), "_torchdynamo_orig_callable")
    assert not hasattr(function, "_torchdynamo_orig_callable")
    assert jit.jit_fuser(function) is function


def test_only_megatron_callers_are_told_cuda_tensor_types() -> None:
    scope = {"__name__": "megatron.core.pretend", "tensor": torch.ones(2, dtype=torch.bfloat16)}
    assert eval("tensor.type()", scope) == "torch.cuda.BFloat16Tensor"
    assert scope["tensor"].type() == "torch.BFloat16Tensor"


class _AsksForCudaInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.full((1,), 2.0, device="cuda")


def test_redirects_hold_inside_backward_and_in_other_threads_that_start() -> None:
    x = torch.ones(3, requires_grad=True)
    _AsksForCudaInBackward.apply(x).sum().backward()
    (grad,) = torch.autograd.grad(_AsksForCudaInBackward.apply(x).sum(), x)
    assert x.grad.tolist() == grad.tolist() == [2.0] * 3

    devices: list[str] = []

    def work() -> None:
        start("cpu")
        devices.append(torch.zeros(1, device="cuda").device.type)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert devices == ["cpu"]


def test_streams_events_and_memory_reports_do_nothing_quietly() -> None:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    time.sleep(0.01)
    end.record()
    assert begin.elapsed_time(end) >= 10.0
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    torch.cuda.reset_peak_memory_stats()
    platform = current()
    platform.synchronize()
    platform.empty_cache()


def test_peak_memory_sees_a_large_tensor() -> None:
    platform = current()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    tensor = torch.ones(64 * 2**20 // 4)
    # Peak resident set of the process: 64 MiB more, less what the allocator reuses of freed pages.
    assert platform.peak_memory_bytes() - before > 32 * 2**20
    del tensor


def test_random_states_survive_pickling(one_rank: object) -> None:
    import random

    import numpy
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    def draw() -> tuple[float, ...]:
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        return random.random(), float(numpy.random.rand()), torch.rand(()).item(), tracked

    platform = current()
    platform.seed(11)
    state = pickle.loads(pickle.dumps(platform.rng_state()))
    first = draw()
    assert draw() != first
    platform.set_rng_state(state)
    assert draw() == first


def test_start_refuses_unknown_absent_and_second_platforms() -> None:
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        start("tpu")
    with pytest.raises(UserError, match="already runs on cpu"):
        start("cuda")
    assert start("cpu") is start("auto") is current()


def test_bad_sizes_are_refused_in_one_line_naming_the_option() -> None:
    from megatron_ktr.distributed.groups import ParallelSizes, check_sizes

    with pytest.raises(UserError, match="world size 6 .*--tensor-model-parallel-size 2 x .* 2 .* = 4"):
        check_sizes(ParallelSizes(tensor=2, pipeline=2), world_size=6)
    with pytest.raises(UserError, match="--sequence-parallel needs"):
        check_sizes(ParallelSizes(sequence_parallel=True), world_size=1)
    with pytest.raises(UserError, match="--num-layers-per-virtual-pipeline-stage needs"):
        check_sizes(ParallelSizes(virtual_pipeline=2), world_size=1)
    with pytest.raises(UserError, match="--context-parallel-size must be at least 1, got 0"):
        check_sizes(ParallelSizes(context=0), world_size=1)


def _describe(context: RankContext) -> list[tuple[int, ...]]:
    from megatron_ktr.distributed.groups import ParallelSizes

    rows = []
    for sizes in (ParallelSizes(tensor=2, pipeline=2), ParallelSizes(context=2, pipeline=2), ParallelSizes(context=2)):
        groups = context.init(sizes)
        members = tuple(torch.distributed.get_process_group_ranks(groups.model))
        rows.append((groups.tensor_rank, groups.pipeline_rank, groups.context_rank, groups.data_rank, *members))
        assert groups.process_groups.tp is groups.tensor
        assert groups.is_source == (groups.tensor_rank == groups.pipeline_rank == groups.context_rank == 0)
    return rows


def test_groups_hold_the_ranks_they_say(ranks: RankPool) -> None:
    results = ranks(_describe, world_size=4)
    # (tensor, pipeline, context, data rank, ranks of the replica) of rank 3, by hand.
    assert results[3] == [(1, 1, 0, 0, 0, 1, 2, 3), (0, 1, 1, 0, 0, 1, 2, 3), (0, 0, 1, 1, 2, 3)]
    assert results[0][2] == (0, 0, 0, 0, 0, 1)


def count_threads(context, *, num_splits: int) -> int:
    from megatron_ktr.distributed.groups import ParallelSizes

    for _ in range(num_splits):
        context.init(ParallelSizes(tensor=2))
    return len(os.listdir("/proc/self/task"))


def test_splitting_again_closes_the_groups_of_the_split_before(ranks) -> None:
    """Forgotten groups keep their threads, which wake up for ever: hundreds of them stall a small machine."""
    few, many = (ranks(count_threads, world_size=2, num_splits=number)[0] for number in (2, 8))
    assert many <= few + 2


def train_and_leave(context: RankContext, *, hf_dir: Path) -> bool:
    from tests.support.accounting import Harness, video_group
    from tests.support.steps import DISTRIBUTED_SGD

    groups = [video_group(seed=0, grid=(2, 4, 4), lengths=(5, 7))]
    harness = Harness(context.init(), hf_dir=hf_dir, groups=groups, values=DISTRIBUTED_SGD)
    harness.backward(harness.items())
    policy, chunk = harness.policy, weakref.ref(harness.policy.chunks[0])
    assert policy.options.optimizer.use_distributed_optimizer and policy.dtype is torch.float32
    del harness, policy
    gc.collect()
    return chunk() is None


def test_a_dropped_policy_is_freed_and_its_groups_with_it(ranks: RankPool, tmp_path: Path) -> None:
    """The distributed optimizer's views of fp32 parameters would keep everything: a cycle that no collector sees."""
    save_tiny_hf(tmp_path)
    assert ranks(train_and_leave, world_size=2, hf_dir=tmp_path) == [True, True]
