"""The frozen reference model that the KL term compares with. Its weights can be kept in three ways:

=====================  ==================================================================================
copy                   a second model beside the policy
offloaded copy         the same, but in host memory except during its pass (``--offload-reference``)
policy without         the policy itself with its adapters switched off (``--lora-rank``): no second model
adapters
=====================  ==================================================================================

All three give the same numbers.

Where the KL is taken over the whole vocabulary, the update compares the reference's distributions with its own in its
own pass over the vocabulary. It then needs the reference's hidden rows, from the reference's pass, and its output
weight, from ``output_weight``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_ktr.distributed.platform import Platform
from megatron_ktr.policy.offload import HostWeights, moves
from models.qwen2_5_vl.conversion import unwrap_model
from models.qwen2_5_vl.fp8 import drop_initial_values
from models.qwen2_5_vl.lora import adapters_off


class ReferenceModel:
    """The chunks of the reference model. They may be run only while the context ``in_use()`` is open."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        in_use: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        is_policy: bool = False,
        to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.chunks = list(chunks)
        self.in_use = in_use
        self.is_policy = is_policy
        """Whether its parameters are the policy's."""
        self._to_device = to_device

    @contextlib.contextmanager
    def output_weight(self) -> Iterator[Tensor | None]:
        """This rank's shard of the output weight, on the device while the context is open.

        It is the only weight that is needed outside ``in_use()``: an offloaded copy moves this one alone. None on every
        stage but the last, and where it is the policy's own.
        """
        model = unwrap_model(self.chunks[-1])
        if self.is_policy or not model.post_process:
            yield None
        else:
            yield self._to_device(model.output_weight().detach())

    @classmethod
    def copy(cls, chunks: Sequence[torch.nn.Module], *, offload_on: Platform | None = None) -> ReferenceModel:
        """A reference made of a second model's chunks; their weights are frozen here. With ``offload_on`` they are kept
        in host memory between passes."""
        for chunk in chunks:
            drop_initial_values(chunk.requires_grad_(False).parameters())
        if offload_on is None:
            return cls(chunks)
        in_use = HostWeights.on(chunks, platform=offload_on).on_device
        return cls(chunks, in_use=in_use, to_device=moves(offload_on)["to_device"])

    @classmethod
    def without_adapters(cls, policy_chunks: Sequence[torch.nn.Module]) -> ReferenceModel:
        """A reference that is the policy itself with its adapters switched off: the model as it was before training."""
        return cls(policy_chunks, in_use=lambda: adapters_off(policy_chunks), is_policy=True)
