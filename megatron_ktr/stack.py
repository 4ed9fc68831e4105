"""The two stacks of software that this code runs on, and every choice that depends on which of them is installed.

==================  ======================  ======================
                    Python 3.11             Python 3.12 and newer
==================  ======================  ======================
megatron-core       0.16.1                  0.19.2
Transformer Engine  2.11.0 (2.9 to 2.11)    2.17.1 (2.14 to 2.20)
==================  ======================  ======================

megatron-core 0.17 and newer want Python 3.12, which is why there are two. ``setup.py`` pins the same versions
(``tests/house/test_stack.py`` compares). Nothing outside this module asks for a version: it calls what is here, or
``has_core_0_19`` where a whole feature exists on the newer stack only.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from megatron_ktr.errors import UserError


@dataclass(frozen=True)
class Stack:
    """One of the two: the versions that belong together."""

    core: str
    """The pinned megatron-core."""
    transformer_engine: str
    """The pinned Transformer Engine."""
    transformer_engine_range: str
    """What works with this megatron-core. Below 2.14, 0.19 clips gradients without Transformer Engine's kernels and
    says nothing."""


OLD = Stack(core="0.16.1", transformer_engine="2.11.0", transformer_engine_range=">=2.9,<2.12")
NEW = Stack(core="0.19.2", transformer_engine="2.17.1", transformer_engine_range=">=2.14,<2.21")


@cache
def installed() -> Stack:
    """The stack whose megatron-core is installed; where none is, the one that belongs to this Python."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return NEW if sys.version_info >= (3, 12) else OLD
    return of_core(version)


def of_core(version: str) -> Stack:
    """The stack that a version of megatron-core belongs to: 0.17 began what is different."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return NEW if numbers >= [0, 17] else OLD


def has_core_0_19() -> bool:
    return installed() is NEW


def require_core_0_19(option: str) -> None:
    """
    Raises:
        UserError: ``option`` is for the newer stack, and the older one is installed.
    """
    if not has_core_0_19():
        raise UserError(f"{option} needs megatron-core {NEW.core}, which is for Python 3.12 and newer; see README")


_ADVICE = {
    # Its successor has no M-RoPE; docs/architecture.md says what of it is used.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Passing one would change nothing, and computing it needs sizes of buckets that only DDP knows.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # megatron-core's own ``dist_checkpointing.load`` calls it.
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    # Of torch, which megatron-core imports before anything of ours could say that this is a CPU machine. Where a GPU is
    # expected, the platform and the doctor say that there is none.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def silence_advice() -> None:
    """Filters what megatron-core 0.19 logs at every model, wrapper and checkpoint, message by message.

    Each is advice to whoever writes code on megatron-core; a run's console is for the run.
    """
    for name, start in _ADVICE.items():
        logging.getLogger(name).addFilter(partial(_is_not_the_advice, start=start))


def _is_not_the_advice(record: logging.LogRecord, *, start: str) -> bool:
    return not record.getMessage().startswith(start)


def mlp_submodule(column_linear: Any, row_linear: Any) -> Any:
    """A layer's MLP as ``TransformerLayerSubmodules`` wants it: 0.19 takes a builder and warns of specifications."""
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    submodules = MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear)
    if has_core_0_19():
        return partial(getattr(MLP, "as_mlp_submodule"), submodules=submodules)  # noqa: B009  # 0.16 has none
    return ModuleSpec(module=MLP, submodules=submodules)


def no_cuda_graphs() -> dict[str, Any]:
    """Settings of a ``TransformerConfig`` that uses no CUDA graphs: 0.16 warns about its own default unless it is given
    an empty list, and 0.19 warns if it is given the option at all."""
    return {} if has_core_0_19() else {"cuda_graph_scope": []}


def load_strategy(checkpoint: str) -> Any:
    """How ``dist_checkpointing.load`` reads tensors: into numbers in high precision, also where a parameter is kept in
    FP8, which our own loading then quantises once, whole.

    0.19 would stream: quantise piece by piece into the parameter, whose pieces (gate and up; the shards that another
    layout saved) share one scale. With scales taken from values the last piece's scale is then that of all of them.
    """
    if has_core_0_19():
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

        strategy: Any = TorchDistLoadShardedStrategy  # 0.16 has neither argument
        return strategy(stream_ckpt_dequant=False, checkpoint_name=checkpoint)
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy

    return get_default_load_sharded_strategy(checkpoint)


def end_at_hidden_states(model: Any) -> dict[str, Any]:
    """Makes ``forward`` of a ``GPTModel`` answer with its last hidden states instead of logits; gives the arguments to
    call it with. 0.19 has a hook for that; in 0.16 the model's own last step, which is private, is replaced."""
    if has_core_0_19():
        return {"output_processor": _answer_with_hidden_states}
    model._postprocess = _answer_with_hidden_states
    return {}


def _answer_with_hidden_states(hidden_states: Any, *_: Any, **__: Any) -> Any:
    return hidden_states
