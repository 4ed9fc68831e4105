"""Controls of a study of token selection: what a chosen set of tokens is compared with.

    random      as many tokens of each prompt's responses as the signals select there, drawn by chance. In the scope
                ``response`` the number is that of each response
    complement  exactly the tokens that the signals do not select
    all         every token: the same loss without selection

``random`` draws one number per token, from a seed of (run's seed, step, prompt's identity, response), and takes the
tokens with the largest numbers. The draw does not depend on the rank, on the micro-batch or on how many tokens are
taken, so that every layout trains on the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.attribution.scopes import count_in_scopes
from megatron_ktr.attribution.selection import select_highest
from megatron_ktr.transfer import send
from megatron_ktr.types import RolloutGroup

MEANINGS = {
    "random": "drawn by chance, as many as the signals would have selected",
    "complement": "that the signals did not select",
    "weighted": "with the largest weighted sum of the signals' ranks",
}
"""What a token is that each kind of selection marks, to be read after "tokens"."""


def random_tokens(
    is_selected_R: Tensor, groups: Sequence[RolloutGroup], *, scope_R: Tensor, num_scopes: int, seed: int, step: int
) -> Tensor:
    """bool [R]: in each scope as many tokens as ``is_selected_R`` has there, drawn by chance."""
    uniform_R = send(uniform_by_token(groups, seed=seed, step=step), is_selected_R.device)
    count_P = count_in_scopes(is_selected_R.to(torch.int64), scope_R, num_scopes)
    return select_highest(uniform_R, scope_R, count_P=count_P)


def uniform_by_token(groups: Sequence[RolloutGroup], *, seed: int, step: int) -> Tensor:
    """A uniform number in [0, 1) for every response token of ``groups``, fp64 [R]."""
    parts = []
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            # A cryptographic hash, because Python's own hash of a string differs between processes.
            key = "\x1f".join(("random tokens", str(seed), str(step), group.prompt.identity, str(index)))
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            parts.append(torch.rand(len(rollout.token_ids), generator=generator, dtype=torch.float64))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
