"""What an update alone needs leaves the device while an engine generates there (``--offload-during-rollout``).

    gradient buffers   freed: every update starts them from zero             4 bytes a trainable parameter
    main weights       copied to host memory and back; in 16 bits only       4 bytes / data x context ranks
    Adam's moments     likewise, unless ``--offload-optimizer-states`` has   8 bytes / data x context ranks
                       them there anyway

The weights stay: the engine is sent them. On CPU, where host and device are one, the buffers are freed and nothing is
copied.

The buffers are megatron-core's ``offload_grad_buffers``. Its ``optimizer.offload_to_cpu`` is not used (0.16 and 0.19
are the same; ``tests/policy/test_rollout_offload.py`` shows it):

1. It moves every parameter of the inner optimizer. In fp32 these are the model's own weights, or views of them: with
   the distributed optimizer nothing is freed, and from the first return on each rank has a second copy of its shard on
   the device; without it the weights themselves are gone when the engine is to be sent them.
2. Its ``restore_from_cpu`` brings all state to the device, also moments that ``--offload-optimizer-states`` keeps on
   the host, and torch's step counts, which belong there.
3. Its copies are in pageable memory, at a fraction of the bus's speed.

So storages are emptied here, as megatron-core does with the buffers: tensors, and whatever views them, stay the objects
they were. Only storages that belong to the optimizer alone are touched.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.distributed.platform import Platform
from megatron_ktr.policy.offload import pinned_copy


@contextlib.contextmanager
def optimizer_off_device(
    chunks: Sequence[Any],
    optimizer: Any,
    *,
    platform: Platform,
    phase: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[None]:
    """Within it the device holds no gradients of ``chunks`` (megatron-core's DDP) and no state of ``optimizer``;
    afterwards all is as it was, gradients zero. ``phase`` is entered for each of the two moves.

    If what runs within it raises, that error goes on. The state is restored first, unless the device has no room for it
    because the engine has not freed its own.
    """
    state = _Storages(optimizer_tensors(optimizer))

    def restore() -> None:
        state.restore()
        with _without_advice():
            for chunk in chunks:
                chunk.restore_grad_buffers()

    try:
        with phase():
            with _without_advice():
                for chunk in chunks:
                    # Waits for the device, so that no reduction still reads them; the cache is emptied once, below.
                    chunk.offload_grad_buffers(empty_cache=False)
            state.move_to_host()
            # The engine's memory comes from the driver, not from this process's allocator.
            platform.empty_cache()
        yield
    except BaseException:
        with contextlib.suppress(torch.OutOfMemoryError):
            restore()
        raise
    with phase():
        restore()


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Main weights and state of megatron-core's optimizer: what no other part of a run reads or holds.

    Before its first step an optimizer has no state; a rank without trained parameters has one around None.
    """
    found: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # By name, and not the inner optimizer's parameters: among these fp32 weights of the model are, too. The first
        # name is the distributed optimizer's, the second the other's for 16 bits; the one for fp32 has neither.
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            found += [main for group in getattr(part, name, ()) for main in group if main is not None]
        entries = part.optimizer.state.values() if part.optimizer is not None else ()
        found += [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    return found


class _Storages:
    """The storages of some tensors, on the device or, emptied there, as pinned copies on the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Each storage once, as bytes: several tensors may view it. What is on the host stays there.
        seen: dict[int, Tensor] = {}
        for tensor in tensors:
            if tensor.device.type != "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen[storage._cdata] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._on_device = list(seen.values())
        self._on_host: list[Tensor | None] = [None] * len(self._on_device)

    def move_to_host(self) -> None:
        for index, whole in enumerate(self._on_device):
            self._on_host[index] = pinned_copy(whole)
            whole.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Of those that are away; may be called again where memory was lacking."""
        for index, copy in enumerate(self._on_host):
            if copy is not None:
                self._on_device[index].untyped_storage().resize_(copy.numel())
                self._on_device[index].copy_(copy, non_blocking=True)
                self._on_host[index] = None


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """megatron-core asks for typed storages, of which torch says every time that they will go one day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield
