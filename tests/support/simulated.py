"""One rank of a large world, alone in its process: the product's own policy and schedule on groups that only pretend.

Every message leaves through torch's ``c10d`` operators, from Python or from C++, at once or later, alone or in batches;
``MessageRecorder`` sees them all there, with their bytes and their ranks. Nothing is sent: what would arrive is made up
(this rank's own share in everybody's place, zeros from a neighbour), which no size depends on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Key = tuple[str, tuple[int, ...]]
"""Operation, and the ranks that take part; of a send, both ends in order."""


@dataclass
class Sum:
    calls: int = 0
    num_bytes: int = 0


class MessageRecorder(TorchDispatchMode):
    """Calls and bytes of all communication within it, by operation and ranks.

    Bytes: what an all-reduce or a send carries, the whole that an all-gather makes or a reduce-scatter takes. Receiving
    is somebody else's send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[Key, Sum] = {}
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in _READERS:
                _READERS[name](self, *args)
            elif name not in ("barrier", "monitored_barrier_"):
                self.unknown.add(name)
        return result

    def add(self, operation: str, group: Any, tensors: Sequence[torch.Tensor], *, to: int | None = None) -> None:
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        if len(ranks) == 1:
            return
        if to is not None:
            ranks = [dist.get_rank(), ranks[to]]
        found = self.sums.setdefault((operation, tuple(ranks)), Sum())
        found.calls += 1
        found.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _all_reduce(recorder: MessageRecorder, tensors: Any, group: Any, *_: Any) -> None:
    recorder.add("all_reduce", group, tensors)


def _all_gather(recorder: MessageRecorder, outputs: Any, inputs: Any, group: Any, *_: Any) -> None:
    outputs, inputs = ([x] if isinstance(x, torch.Tensor) else x for x in (outputs, inputs))
    for whole, part in zip(outputs, inputs, strict=True):
        # Its own share in everybody's place; buffers of parameters hold the share themselves.
        whole.view(-1, part.numel()).copy_(part.clone().flatten().expand(whole.numel() // part.numel(), -1))
    recorder.add("all_gather", group, outputs)


def _reduce_scatter(recorder: MessageRecorder, outputs: Any, inputs: Any, group: Any, *_: Any) -> None:
    outputs, inputs = ([x] if isinstance(x, torch.Tensor) else x for x in (outputs, inputs))
    for part, whole in zip(outputs, inputs, strict=True):
        part.copy_(whole.flatten()[: part.numel()].view_as(part).clone())
    recorder.add("reduce_scatter", group, inputs)


def _send(recorder: MessageRecorder, tensors: Any, group: Any, to: int, *_: Any) -> None:
    recorder.add("send", group, tensors, to=to)


def _receive(recorder: MessageRecorder, tensors: Any, *_: Any) -> None:
    for tensor in tensors:
        tensor.zero_()


_READERS: dict[str, Callable[..., None]] = {
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "_allgather_base_": _all_gather,
    "allgather_into_tensor_coalesced_": _all_gather,
    "_reduce_scatter_base_": _reduce_scatter,
    "reduce_scatter_tensor_coalesced_": _reduce_scatter,
    "send": _send,
    "recv_": _receive,
}


@dataclass(frozen=True)
class Simulation:
    """One layout, and the step that is run in it."""

    hf_dir: Path
    world_size: int
    sizes: Mapping[str, Any]
    """Of ``ParallelSizes``."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration."""
    grid: tuple[int, int, int] = (4, 8, 8)
    text_length: int = 12
    lengths: tuple[int, ...] = (20, 31, 26)
    num_micro_batches: int = 4


def simulate(case: Simulation, *, rank: int) -> dict[Key, tuple[int, int]]:
    """(calls, bytes) by operation and ranks, as ``rank`` would send them in one step: scoring passes, forward and
    backward, gradients, optimizer."""
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start

    platform = start("cpu")
    with _world_of(case.world_size, rank):
        parallel = init_parallel(ParallelSizes(**case.sizes), platform=platform)
        try:
            return _step(case, parallel)
        finally:
            destroy_parallel()


@contextlib.contextmanager
def _world_of(size: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _step(case: Simulation, parallel: Any) -> dict[Key, tuple[int, int]]:
    from megatron_ktr.config.part_options import StepOptions
    from megatron_ktr.policy import policy as policy_module
    from megatron_ktr.step.scoring import ScoringPasses
    from models.qwen2_5_vl import transformer_config
    from tests.support import accounting

    # Lengths that travel with the activations would have to be received: here every batch is as long as the last.
    settings = transformer_config.pipeline_comm_settings
    schedule = policy_module.get_forward_backward_func
    num_rows = {"now": 0}

    def fixed_schedule() -> Callable[..., Any]:
        run = schedule()
        return lambda **options: run(**{**options, "seq_length": num_rows["now"]})

    groups = [
        accounting.video_group(grid=case.grid, text_length=case.text_length, lengths=case.lengths, seed=seed)
        for seed in range(case.num_micro_batches)
    ]
    with (
        patch.object(
            transformer_config, "pipeline_comm_settings", lambda sizes: settings(sizes, variable_lengths=False)
        ),
        patch.object(policy_module, "get_forward_backward_func", fixed_schedule),
        # Objects of other ranks cannot be made up.
        patch.object(policy_module, "reduce_metrics", lambda metrics, group: metrics),
    ):
        harness = accounting.Harness(parallel, hf_dir=case.hf_dir, groups=groups, values=dict(case.values))
        policy = harness.policy
        run = policy._run

        def run_fixed(chunks: Any, items: Any, *, batch_of: Callable[[Any], Any], **options: Any) -> Any:
            num_rows["now"] = _num_rows(batch_of(items[0]), parallel)
            return run(chunks, items, batch_of=batch_of, **options)

        policy._run = run_fixed
        if harness.objective.needs_reference:
            policy.add_reference()
        scoring = ScoringPasses(
            options=StepOptions.of(harness.config), policy=policy, objective=harness.objective, media=harness.media
        )
        with MessageRecorder() as recorder:
            items = scoring.with_counterfactuals(harness.items(), step=0)
            harness.backward(scoring.with_reference(items))
            policy.optimizer.step()
            policy.wait_for_parameters()
    assert not recorder.unknown, recorder.unknown
    return {key: (value.calls, value.num_bytes) for key, value in recorder.sums.items()}


def _num_rows(batch: Any, parallel: Any) -> int:
    """Rows of the sequence as megatron-core counts them: over all context ranks, padding included."""
    from megatron_ktr.ops.context_shard import shard_layout

    size = parallel.sizes.context
    multiple = parallel.sizes.tensor if parallel.sizes.sequence_parallel else 1
    if size == 1:
        return batch.layout.num_tokens
    return size * shard_layout(batch.layout, size=size, rank=parallel.context_rank, multiple=multiple).num_rows
