"""The scope ``batch``: the scores of all micro-batches of all replicas, compared with one another exactly.

Every replica gathers the scores of all, brings the tokens into one order that does not depend on how groups were shared
out (prompt's draw, response, position), makes the same choice, and keeps its own part. The choice is therefore the same
for any number of replicas and any split into micro-batches, ties included.

It costs two gathers of R x (4 bytes per signal + 32 bytes) over the data-parallel ranks: 7 MB for 32 prompts with 8
responses of 768 tokens and one signal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.attribution.combine import Choice, ChoiceRules
from megatron_ktr.transfer import send
from megatron_ktr.types import RolloutGroup

Gather = Callable[[Tensor], Tensor]


def choose_in_batch(
    rules: ChoiceRules,
    scores: Sequence[Mapping[str, Tensor]],
    groups: Sequence[Sequence[RolloutGroup]],
    *,
    gather: Gather | None = None,
) -> list[Choice]:
    """The choice of each micro-batch, with one threshold for the global batch.

    Args:
        scores: by micro-batch of this replica: fp32 [R] by signal.
        groups: by micro-batch: the groups whose tokens the scores belong to, in order.
        gather: gives the tensors of all replicas; None if these are all micro-batches there are.
    """
    names = list(scores[0])
    own_RS = torch.cat([torch.stack([of_item[name] for name in names], dim=1) for of_item in scores])
    place_R4 = send(_places([group for of_item in groups for group in of_item]), own_RS.device)
    start, every_RS = 0, own_RS
    if gather is not None:
        start = _start_of_own(groups, len(own_RS), gather=gather, device=own_RS.device)
        every_RS, place_R4 = gather(own_RS), gather(place_R4)
    order_R = _order_by_place(place_R4)
    sorted_RS = every_RS[order_R]
    found = rules.choose(
        {name: sorted_RS[:, index] for index, name in enumerate(names)},
        torch.zeros_like(order_R),
        num_scopes=1,
    )

    def own(sorted_R: Tensor) -> tuple[Tensor, ...]:
        every_R = torch.empty_like(sorted_R)
        every_R[order_R] = sorted_R
        return every_R[start : start + len(own_RS)].split([len(of_item[names[0]]) for of_item in scores])

    selected = own(found.is_selected_R)
    by_signal = {name: own(mask_R) for name, mask_R in found.by_signal.items()}
    weights = (None,) * len(scores) if found.weight_R is None else own(found.weight_R)
    return [
        Choice(selected[index], {name: masks[index] for name, masks in by_signal.items()}, weights[index])
        for index in range(len(scores))
    ]


def _places(groups: Sequence[RolloutGroup]) -> Tensor:
    """int64 [R, 4]: where each token stands in the run, whatever the layout: the number of the prompt's draw, a hash of
    its identity, the response and the position."""
    parts = []
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            place_R4 = torch.empty(len(rollout.token_ids), 4, dtype=torch.int64)
            place_R4[:, 0], place_R4[:, 1] = group.prompt.draw_number, _hash(group.prompt.identity)
            place_R4[:, 2], place_R4[:, 3] = index, torch.arange(len(rollout.token_ids))
            parts.append(place_R4)
    return torch.cat(parts) if parts else torch.zeros(0, 4, dtype=torch.int64)


def _order_by_place(place_R4: Tensor) -> Tensor:
    order_R = torch.arange(len(place_R4), device=place_R4.device)
    for column in reversed(range(4)):
        order_R = order_R[place_R4[order_R, column].argsort(stable=True)]
    return order_R


def _start_of_own(
    groups: Sequence[Sequence[RolloutGroup]], num_tokens: int, *, gather: Gather, device: torch.device
) -> int:
    """The row at which this replica's tokens begin among those of all replicas.

    A replica recognises its row by a hash of what it holds. Two replicas with equal hashes would hold equal groups.
    """
    held = [
        f"{group.prompt.identity}\x1f{[rollout.token_ids for rollout in group.rollouts]}"
        for of_item in groups
        for group in of_item
    ]
    mark = _hash("\x1e".join(held))
    rows = gather(torch.tensor([[mark, num_tokens]], dtype=torch.int64, device=device)).tolist()
    before = [held_mark for held_mark, _ in rows].index(mark)
    return sum(number for _, number in rows[:before])


def _hash(text: str) -> int:
    """63 bits; a cryptographic hash, because Python's own hash of a string differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
