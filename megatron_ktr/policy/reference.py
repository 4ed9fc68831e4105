"""The frozen model that the KL term compares with: where its weights are, and when.

=====================  ==================================================================================
copy                   a second model beside the policy
offloaded copy         the same, in host memory but for its pass (``--offload-reference``)
policy without         the policy itself with its adapters switched off (``--lora-rank``): no second model
adapters
=====================  ==================================================================================

All three give the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from megatron_ktr.distributed.platform import Platform
from megatron_ktr.policy.offload import HostWeights
from models.qwen2_5_vl.fp8 import drop_initial_values
from models.qwen2_5_vl.lora import adapters_off


class ReferenceModel:
    """``chunks`` may be run within ``in_use()``."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        in_use: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        is_policy: bool = False,
    ) -> None:
        self.chunks = list(chunks)
        self.in_use = in_use
        self.is_policy = is_policy
        """Whether its parameters are the policy's."""

    @classmethod
    def copy(cls, chunks: Sequence[torch.nn.Module], *, offload_on: Platform | None = None) -> ReferenceModel:
        """Another model's chunks, of which no weight is trained; kept on the host of ``offload_on`` between passes."""
        for chunk in chunks:
            drop_initial_values(chunk.requires_grad_(False).parameters())
        if offload_on is None:
            return cls(chunks)
        return cls(chunks, in_use=HostWeights.on(chunks, platform=offload_on).on_device)

    @classmethod
    def without_adapters(cls, policy_chunks: Sequence[torch.nn.Module]) -> ReferenceModel:
        """The policy's bare chunks, as they were before adapters were put on them."""
        return cls(policy_chunks, in_use=lambda: adapters_off(policy_chunks), is_policy=True)
