"""Says which ranks communicate over which links, and how many bytes of a message cross each link.

Ranks are numbered along the axes tensor, context, data, pipeline, where tensor varies fastest. They fill nodes of
``gpus_per_node`` in that order:

    tensor            tp ranks in a row                      inside a node (tp divides its GPUs)
    context           cp ranks, tp apart                     inside a node while tp cp fits one
    data_context      all replicas and context ranks of a    over nodes as soon as tp cp dp exceeds one
                      stage, tp apart
    next, previous    the neighbouring stage, tp cp dp away  over the network as soon as that exceeds a node

For a collective of S bytes over n ranks with the ring algorithm, a rank sends the following. (S is the tensor of an
all-reduce, the whole result of an all-gather, or the whole input of a reduce-scatter.)

    all-reduce 2 (n - 1) / n S      all-gather, reduce-scatter (n - 1) / n S      send S

In a ring with g ranks in each node, one of g edges leaves the node, and the node's g network cards share its traffic.
So each GPU sends 1 / g of those bytes over the network, and the rest inside the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ktr.accounting.layout import Layout

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
Group = Literal["tensor", "context", "tensor_context", "data_context", "next", "previous", "embedding"]


@dataclass(frozen=True)
class Machine:
    """The machine for which times are estimated.

    Bandwidths are those of one GPU in one direction, as measured rather than as advertised.
    """

    peak_tflops: float = 989.0
    """The peak of one GPU, for dense bf16."""
    efficiency: float = 0.45
    """The share of the peak that the kernels of a busy rank reach."""
    gpus_per_node: int = 8
    link_gb_per_second: float = 350.0
    """The bandwidth inside a node, in 10^9 bytes per second."""
    network_gb_per_second: float = 40.0


@dataclass(frozen=True)
class Crossed:
    """The bytes that one rank sends, by link."""

    node: float
    """Sent inside the node."""
    network: float

    def seconds(self, machine: Machine) -> float:
        """The seconds for both links, which work at the same time, because a ring moves all of its pieces at once."""
        return max(self.node / (1e9 * machine.link_gb_per_second), self.network / (1e9 * machine.network_gb_per_second))


def group_ranks(layout: Layout, rank: int, group: Group) -> tuple[int, ...]:
    """The world ranks of ``rank``'s group, in order; for ``next`` and ``previous``, this rank and its neighbour."""
    tp, cp, dp, pp = layout.tensor, layout.context, layout.data, layout.pipeline
    t, c, d, p = rank % tp, rank // tp % cp, rank // (tp * cp) % dp, rank // (tp * cp * dp)

    def number(t: int = t, c: int = c, d: int = d, p: int = p) -> int:
        return ((p * dp + d) * cp + c) * tp + t

    match group:
        case "tensor":
            return tuple(number(t=i) for i in range(tp))
        case "context":
            return tuple(number(c=i) for i in range(cp))
        case "tensor_context":
            return tuple(number(t=i, c=j) for j in range(cp) for i in range(tp))
        case "data_context":
            return tuple(number(c=i, d=j) for j in range(dp) for i in range(cp))
        case "next":
            return rank, number(p=(p + 1) % pp)
        case "previous":
            return rank, number(p=(p - 1) % pp)
        case "embedding":
            return tuple(sorted({number(p=0), number(p=pp - 1)}))


def sent_bytes(operation: Operation, num_bytes: float, *, num_ranks: int) -> float:
    """The bytes that each rank of the group sends with the ring algorithm."""
    if num_ranks == 1:
        return 0.0
    if operation == "send":
        return num_bytes
    return num_bytes * (num_ranks - 1) / num_ranks * (2 if operation == "all_reduce" else 1)


def crossed(operation: Operation, num_bytes: float, *, ranks: tuple[int, ...], gpus_per_node: int) -> Crossed:
    """The bytes that one rank sends, by link, in a group of these world ranks."""
    sent = sent_bytes(operation, num_bytes, num_ranks=len(ranks))
    nodes = {rank // gpus_per_node for rank in ranks}
    if len(nodes) == 1:
        return Crossed(node=sent, network=0.0)
    share = len(nodes) / len(ranks)
    return Crossed(node=sent * (1 - share), network=sent * share)
