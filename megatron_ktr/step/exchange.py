"""Moves groups between replicas after the rollout, so that no replica waits for the one with the longest videos.

All replicas tell each other what their groups cost (a few numbers), and each works out the same placement
(``step/balance.py``). A group that moves is sent once, with its frames: from the reading rank of its old replica to the
reading rank of its new one, and from there to the other ranks of that replica. Groups that stay are on every rank of
their replica already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.object_bytes import pack_object, unpack_object
from megatron_ktr.distributed.platform import current
from megatron_ktr.step.balance import Placement, balance_replicas
from megatron_ktr.transfer import send
from megatron_ktr.types import RolloutGroup


def agree_on_placement(costs: Sequence[float], *, ranks: ParallelGroups, keep_counts: bool) -> Placement:
    """The placement of all replicas' groups, given the costs of this replica's groups. Collective; every rank gets the
    same placement."""
    of_replica: list[list[float]] = [[] for _ in range(ranks.data_size)]
    torch.distributed.all_gather_object(of_replica, list(costs), group=ranks.data)
    return balance_replicas(of_replica, keep_counts=keep_counts)


def exchange_groups(
    groups: Sequence[RolloutGroup], placement: Placement, *, ranks: ParallelGroups
) -> list[RolloutGroup]:
    """The groups that this replica trains on, given those it drew. Every rank calls it, and every rank of a replica
    gets the same groups."""
    replica = ranks.data_rank
    known = dict(zip(placement.drawn[replica], groups, strict=True))
    moves = placement.moves
    # Replicas that neither send nor receive a group take no part.
    arrived: dict[int, list[RolloutGroup]] = {}
    if ranks.is_source:
        outgoing = {
            to: [known[index] for index in indices] for (origin, to), indices in moves.items() if origin == replica
        }
        sources = [origin for origin, to in moves if to == replica]
        arrived = _send_and_receive(outgoing, sources=sources, ranks=ranks)
    if incoming := {origin: indices for (origin, to), indices in moves.items() if to == replica}:
        source = torch.distributed.get_global_rank(ranks.model, 0)
        arrived = broadcast_object(arrived, group=ranks.model, source=source)
        for origin, indices in incoming.items():
            known |= dict(zip(indices, arrived[origin], strict=True))
    return [known[index] for index in placement.groups_of[replica]]


def _send_and_receive(
    outgoing: Mapping[int, list[RolloutGroup]], *, sources: Sequence[int], ranks: ParallelGroups
) -> dict[int, list[RolloutGroup]]:
    """Sends ``outgoing`` groups and returns the received ones, by the replica they came from. Only reading ranks call
    it; their data-parallel group consists of the reading ranks of all replicas."""
    device = current().device
    sent = {to: send(pack_object(groups), device) for to, groups in outgoing.items()}
    sizes = {to: torch.tensor([len(payload)], device=device) for to, payload in sent.items()}
    lengths = {origin: torch.zeros(1, dtype=torch.int64, device=device) for origin in sources}
    _transfer(sizes, lengths, ranks=ranks)
    received = {
        origin: torch.empty(int(length), dtype=torch.uint8, device=device) for origin, length in lengths.items()
    }
    _transfer(sent, received, ranks=ranks)
    return {origin: unpack_object(payload.cpu()) for origin, payload in received.items()}


def _transfer(sent: Mapping[int, Tensor], received: Mapping[int, Tensor], *, ranks: ParallelGroups) -> None:
    """Runs all point-to-point messages in one batch. One by one they could deadlock, since a rank may wait for a
    partner that waits for a third rank."""
    group = ranks.data
    operations = [
        torch.distributed.P2POp(function, tensor, torch.distributed.get_global_rank(group, replica), group)
        for function, tensors in ((torch.distributed.isend, sent), (torch.distributed.irecv, received))
        for replica, tensor in tensors.items()
    ]
    for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
