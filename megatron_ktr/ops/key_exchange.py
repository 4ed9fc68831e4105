"""Collectives of context parallelism: keys and values are exchanged before attention, statistics after the head.

``KeyExchange``        forward   all-gather of this rank's keys and values, put into the row order of the whole layout
                       backward  reduce-scatter: a row's gradient is the sum over the ranks whose queries attended it
``gather_statistics``  forward   all-gather of this rank's R_c numbers of each kind into R, the same on every rank
                       backward  this rank's entries of the incoming gradient, nothing summed

Every rank computes the same loss from the gathered statistics, so every rank gets the full gradient of them. Each rank
propagates only its own rows' part of it. The ranks' parameter gradients are then parts of a sum over the context
group, as they are over the data-parallel group. Summing the statistics' gradient as well would count everything c
times.

A rank runs these collectives even if it has no row or no token; otherwise the other ranks would wait forever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ktr.ops.context_shard import ContextShard
from megatron_ktr.transfer import send


class KeyExchange:
    """Exchanges keys and values of one packed sequence whose rows are distributed over ``group`` as ``shard`` says.

    ``exchange(k, v)`` is differentiable; the gathered keys and values stay in memory for as long as backward needs
    them. To save memory, an attention can call ``gather`` and ``reduce`` itself, keep only this rank's rows and gather
    the rest again in backward.
    """

    def __init__(self, shard: ContextShard, *, group: dist.ProcessGroup) -> None:
        self._place = shard.place
        self._group = group

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _GatherKeys.apply(k, v, self)

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[local rows, K, H] each -> [rows of the whole layout without padding, K, H] each."""
        local = torch.stack([k, v], dim=1)  # rows come first, because the all-gather concatenates the ranks' rows
        gathered = local.new_empty(self._group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=self._group)
        # The first layer of a forward sends the index to the device; all other layers and backward reuse it.
        self._place = place = send(self._place, k.device)
        return gathered[:, 0].index_select(0, place), gathered[:, 1].index_select(0, place)

    def reduce(self, grad_k: Tensor, grad_v: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
        """Sums the gradients of keys and values over the ranks.

        The input is this rank's part of the gradients of all rows, which comes from its own queries. The result is the
        full gradient, from all ranks' queries, of this rank's ``num_rows`` rows.
        """
        gathered = grad_k.new_zeros(self._group.size() * num_rows, 2, *grad_k.shape[1:])
        gathered[self._place, 0], gathered[self._place, 1] = grad_k, grad_v
        local = gathered.new_empty(num_rows, *gathered.shape[1:])
        dist.reduce_scatter_tensor(local, gathered, group=self._group)
        return local[:, 0], local[:, 1]


def gather_statistics(*values_R: Tensor, owner_R: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Gathers this rank's numbers [R_c] of each kind into all ranks' numbers [R]; differentiable (see the module).

    ``owner_R``, in host memory and equal on all ranks, is the rank of ``group`` that holds each number. A rank's
    numbers keep their order. One collective gathers all kinds. A kind must need a gradient on all ranks or on none.
    """
    return _GatherStatistics.apply(owner_R, group, *values_R)


@torch.no_grad()
def gather_rows(rows_RD: Tensor, *, owner_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers this rank's rows [R_c, D] into all ranks' rows [R, D], without gradient.

    ``owner_R`` is as in ``gather_statistics``.
    """
    place_R, longest = _places(owner_R, group)
    padded = torch.nn.functional.pad(rows_RD, (0, 0, 0, longest - rows_RD.shape[0])).contiguous()
    gathered = padded.new_empty(group.size() * longest, *rows_RD.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered.index_select(0, send(place_R, rows_RD.device))


def _places(owner_R: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """Returns each token's place in the gathered tensor, and the length of the longest share.

    A share holds the tokens of one rank. The gathered tensor is the concatenation of the ranks' shares, each padded to
    the length of the longest.
    """
    mine_of = [(owner_R == rank).nonzero()[:, 0] for rank in range(group.size())]
    longest = max(len(index_R) for index_R in mine_of)
    place_R = torch.empty_like(owner_R)
    for rank, index_R in enumerate(mine_of):
        place_R[index_R] = rank * longest + torch.arange(len(index_R))
    return place_R, longest


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: KeyExchange) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.num_rows = exchange, k.shape[0]
        return exchange.gather(k, v)

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.exchange.reduce(grad_k, grad_v, num_rows=ctx.num_rows), None


class _GatherStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner_R: Tensor, group: dist.ProcessGroup, *values_R: Tensor) -> tuple[Tensor, ...]:
        place_R, longest = _places(owner_R, group)
        mine = torch.stack(values_R)
        padded = torch.nn.functional.pad(mine, (0, longest - mine.shape[1])).contiguous()
        gathered = padded.new_empty(group.size() * len(values_R), longest)
        dist.all_gather_into_tensor(gathered, padded, group=group)
        by_kind = gathered.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)
        ctx.mine_R = send((owner_R == group.rank()).nonzero()[:, 0], mine.device)
        # An unused output then gets the gradient None instead of zeros, and the head skips the entropy's gradient.
        ctx.set_materialize_grads(False)
        outputs = by_kind.index_select(1, send(place_R, mine.device)).unbind()
        outputs = tuple(row.clone() for row in outputs)
        needs_grad = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(out for out, needs in zip(outputs, needs_grad, strict=True) if not needs))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients_R: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *(None if grad_R is None else grad_R.index_select(0, ctx.mine_R) for grad_R in gradients_R)
