"""Makes optimizers loadable from a distributed checkpoint. This is needed above all for those of plain torch (without
Transformer Engine and apex).

megatron-core (0.16 and 0.19) is written for FusedAdam, which keeps one step count per parameter group. torch's AdamW
keeps a step *tensor per parameter*, and loading goes wrong in three ways:

1. before the first step there is no state: ``state_dict`` asserts that it finds exactly one step count, and the
   loaded shards have no place to go;
2. the non-distributed optimizers make moments without ``step``: the next update raises ``KeyError: 'step'``;
3. the distributed optimizer gives **one** step tensor to all parameters. Each parameter then adds one to it in turn, so
   that the step jumps by the number of parameters in every update. Adam's bias correction is then silently wrong.

FusedAdam has no state before its first step either (a first step that was skipped because of its gradients does not
count). A checkpoint made at that time would have no moments to gather or to load.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer


def prepare_optimizer_for_load(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter zero moments and a step tensor of its own, and keeps step tensors separate in later loads.

    Call it once on a new optimizer, before its ``sharded_state_dict`` (for loading, or for saving at step 0). Existing
    state is kept. SGD has no state (and no distributed optimizer) and is left as it is. FusedAdam, Transformer Engine's
    or apex's, gets its moments from megatron-core's own function, and counts its steps by group.
    """
    for part in _fused_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                _fill_state(inner, parameter)
        if not getattr(inner, "_keeps_steps_apart", False):
            inner.register_load_state_dict_post_hook(_separate_steps)
            setattr(inner, "_keeps_steps_apart", True)  # noqa: B010  # a mark of ours on an object of torch


def _torch_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # A rank without trainable parameters has a megatron optimizer around None.
        if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one
            yield part.optimizer


def _fused_optimizers(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        is_torch = isinstance(part.optimizer, torch.optim.Adam)
        # SGD has no such function.
        if part.optimizer is not None and not is_torch and part.init_state_fn is not None:
            yield part


def _fill_state(inner: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    state = inner.state[parameter]
    state.setdefault("step", torch.zeros((), dtype=torch.float32))
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _separate_steps(inner: torch.optim.Optimizer) -> None:
    for state in inner.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].detach().clone()
