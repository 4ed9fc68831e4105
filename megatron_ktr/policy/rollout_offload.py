"""Frees device memory while an engine generates there (``--offload-during-rollout``): everything that only the update
needs leaves the device for that time.

    gradient buffers   freed: every update starts them from zero             4 bytes a trainable parameter
    main weights       copied to host memory and back (they exist only if    4 bytes / data x context ranks
                       the model is in 16 bits)
    Adam's moments     copied likewise, unless they are on the host anyway   8 bytes / data x context ranks
                       (``--offload-optimizer-states``)

The model's weights stay on the device, because they are sent to the engine. On CPU, where host and device are one, the
buffers are freed and nothing is copied.

megatron-core's ``offload_grad_buffers`` frees the gradient buffers. Its ``optimizer.offload_to_cpu`` is not used for
the rest, for three reasons (the same in 0.16 and 0.19; ``tests/policy/test_rollout_offload.py`` shows them):

1. It moves every parameter of the inner optimizer. In fp32 these are the model's own weights, or views of them. With
   the distributed optimizer this frees nothing, and from the first return on each rank has a second copy of its shard
   on the device. Without it the weights themselves are gone when they must be sent to the engine.
2. Its ``restore_from_cpu`` brings all state to the device. That includes moments that ``--offload-optimizer-states``
   keeps on the host, and torch's step counts, which belong there.
3. Its copies are in pageable memory, which is copied at a fraction of the bus's speed.

Instead, this file empties the storages, as megatron-core does with the buffers: tensors and the views of them stay the
same objects. Only storages that belong to the optimizer alone are touched.
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
    """While the context is open, the device holds no gradients of ``chunks`` (megatron-core's DDP) and no state of
    ``optimizer``. Afterwards everything is as it was, except that gradients are zero. ``phase`` is a context that is
    entered for each of the two moves.

    An error raised within the context propagates. The state is restored first, unless the device has no room for it
    because the engine has not freed its memory.
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
    """The tensors that belong to megatron-core's optimizer alone (no other part of a run reads or holds them): its main
    weights and its state.

    Before its first step an optimizer has no state. On a rank without trained parameters the inner optimizer is None.
    """
    found: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Main weights are found by attribute name. The inner optimizer's parameters would not do: the model's own fp32
        # weights are among them. The distributed optimizer has the first attribute, the plain one for 16 bits the
        # second, and the one for fp32 neither.
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            found += [main for group in getattr(part, name, ()) for main in group if main is not None]
        entries = part.optimizer.state.values() if part.optimizer is not None else ()
        found += [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    return found


class _Storages:
    """The storages of some tensors. They are either on the device, or empty there with pinned copies on the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Each storage is kept once, as bytes, because several tensors may view it. Tensors on the host stay there.
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
        """Restores the storages that are on the host. If memory runs out, it may be called again for the rest."""
        for index, copy in enumerate(self._on_host):
            if copy is not None:
                self._on_device[index].untyped_storage().resize_(copy.numel())
                self._on_device[index].copy_(copy, non_blocking=True)
                self._on_host[index] = None


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silences torch's warning that typed storages, which megatron-core asks for, are deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield
