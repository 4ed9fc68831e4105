"""Groups with videos, steps on them, and counters of what really ran: operations and live bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_ktr.attribution.views.base import ViewDraw
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.objectives import build_objective
from megatron_ktr.types import INTACT, BatchFacts, Prompt, Rollout, RolloutGroup, VisualInput
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec
from tests.support.steps import make_config
from tests.support.tiny import FIRST_SPECIAL_ID, VIDEO_TOKEN_ID, VISION_END_ID, VISION_START_ID


def video_group(
    *,
    grid: tuple[int, int, int] = (4, 8, 8),
    text_length: int = 12,
    lengths: Sequence[int] = (20, 31, 26),
    seed: int = 0,
) -> RolloutGroup:
    """A video of ``grid``, random text and responses of ``lengths``, no two rewards alike."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    frames = torch.randint(0, 256, (2 * t, 3, 14 * h, 14 * w), generator=generator, dtype=torch.uint8)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, FIRST_SPECIAL_ID, (length,), generator=generator).tolist())

    media = (VIDEO_TOKEN_ID,) * (t * h * w // 4)
    tokens = (*text(text_length - 2), VISION_START_ID, *media, VISION_END_ID)
    rollouts = tuple(Rollout(text(n), rewards={"accuracy": float(i * i)}) for i, n in enumerate(lengths))
    return RolloutGroup(Prompt(f"video {seed}", tokens, (VisualInput("video", frames, grid, 1.0),)), rollouts)


class Harness:
    """A policy on one rank of a layout, and the passes of a step on given groups, one micro-batch a group."""

    def __init__(
        self, parallel: Any, *, hf_dir: Path, groups: Sequence[RolloutGroup], values: dict[str, Any] | None = None
    ) -> None:
        from megatron_ktr.distributed.platform import current
        from megatron_ktr.policy.policy import Policy

        self.config = make_config(
            hf_dir,
            # The estimates are of this implementation; others read keys in other ways.
            {"objective": "grpo", "kl_beta": 0.0, "attention_impl": "torch", **(values or {})},
            num_prompts=len(groups) * parallel.data_size,
            sizes=parallel.sizes,
        )
        self.policy = Policy(
            hf_dir, options=PolicyOptions.of(self.config), ranks=parallel, platform=current(), num_steps=10
        )
        self.objective = build_objective(self.config.objective, reward=self.config.reward)
        self.media = media_spec(Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings().patchify)
        self.groups = list(groups)

    def pack(self, view: str = "intact") -> list[Any]:
        sizes = self.policy.ranks.sizes
        # A seed that keeps no pair of frames together: such a pair would not be encoded again.
        draw = ViewDraw(self.config.objective, sizes=self.media, seed=1, step=0)
        shown = [g.prompt.media if view == INTACT else load_view(view).shown(g.prompt, draw) for g in self.groups]
        return [
            pack_groups(
                [group],
                view=view,
                media=self.media,
                pad_to_multiple=sizes.tensor if sizes.sequence_parallel else 1,
                shown=[media],
                vision="media" if self.policy.ranks.is_first_stage else "none",
            )
            for group, media in zip(self.groups, shown, strict=True)
        ]

    def items(self) -> list[MicroBatch]:
        return [MicroBatch((group,), batch) for group, batch in zip(self.groups, self.pack(), strict=True)]

    def backward(self, items: Sequence[MicroBatch]) -> None:
        num_responses = sum(len(group.rollouts) for group in self.groups)
        self.policy.backward(
            items,
            objective=self.objective,
            facts=BatchFacts(num_responses=num_responses * self.policy.ranks.data_size),
        )


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Counts matrix products. Fused attention on CPU would count as none: the plain one runs instead."""
    counter = FlopCounterMode(display=False)
    # It hooks modules to tell their shares apart, and fails where a module is called inside a checkpoint.
    counter.mod_tracker = _NoModules()
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


class _NoModules(nullcontext):
    parents = frozenset({"Global"})


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has dropped yet, and their peak.

    What an operation allocates and frees inside itself is not seen. Storages from before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Does not count these, also where an operation returns them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = 0
                # Once it is gone, its address may be another's.
                weakref.finalize(storage, self._drop, storage._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.ignore(value)
        result = func(*args, **kwargs)
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def storage_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
