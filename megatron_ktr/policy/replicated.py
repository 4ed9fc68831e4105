"""Which tensors of the policy several ranks hold alike.

===============================================  ===========================================================
tensor                                           copies on
===============================================  ===========================================================
every parameter, frozen ones and adapters too    the data-parallel and context ranks of its stage
those that tensor parallelism does not split     also the tensor ranks
an output layer tied to the embedding            the first and the last pipeline stage
fp32 main parameters of the optimizer            as their parameters; only without the distributed optimizer, which
                                                 keeps one copy in shards
===============================================  ===========================================================

What the distributed optimizer keeps once cannot be compared: a bit that flips there goes to all replicas alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.replica_checksums import Copy
from megatron_ktr.policy.policy import Policy
from models.qwen2_5_vl.conversion import named_model_parameters
from models.qwen2_5_vl.fp8 import plain_tensor


def replicated_tensors(policy: Policy) -> Iterator[Copy]:
    """This rank's copies, in the same order on all ranks that hold them. Parameters that are still being gathered must
    have arrived (``Policy.wait_for_parameters``)."""
    for adapters in (False, True):
        for name, parameter in named_model_parameters(policy.bare_chunks, adapters=adapters):
            groups = _groups_of(parameter, policy)
            tensors = {name: plain_tensor(parameter), f"{name} (fp32 main parameter)": _main_copy(parameter, policy)}
            for label, tensor in tensors.items():
                if tensor is not None:
                    yield from (Copy(label, tensor, group) for group in groups)
    yield from _tied_embedding(policy)


def _groups_of(parameter: torch.nn.Parameter, policy: Policy) -> list[ProcessGroup]:
    ranks = policy.ranks
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return [ranks.data_context] if is_split else [ranks.data_context, ranks.tensor]


def _main_copy(parameter: torch.nn.Parameter, policy: Policy) -> torch.Tensor | None:
    if policy.options.optimizer.use_distributed_optimizer:
        return None
    main = getattr(parameter, "main_param", None)
    return None if main is parameter else main


def _tied_embedding(policy: Policy) -> Iterator[Copy]:
    """The word embedding on the first stage and its copy on the last one, where there is such a copy."""
    ranks, chunks = policy.ranks, policy.bare_chunks
    if not policy.model_config.tie_word_embeddings or ranks.sizes.pipeline == 1:
        return
    group = ranks.process_groups.embd
    if group is None or torch.distributed.get_rank() not in torch.distributed.get_process_group_ranks(group):
        return
    weight = chunks[0 if ranks.is_first_stage else -1].shared_embedding_or_output_weight()
    if weight is not None:
        yield Copy("tied word embedding", weight, group)
