"""Groups for the trainer, the same on every rank of a replica, and errors the same on every rank of the world.

One rank of each replica (``ParallelGroups.is_source``) reads files and runs engines; the others receive its groups.
So a video is decoded once per replica, and a skipped sample is skipped everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from megatron_ktr.config import Config
from megatron_ktr.data.dataset import PromptLoader, SkipCounter
from megatron_ktr.data.video import FrameSampling
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.replay import ReplayEngine, ReplaySource
from megatron_ktr.types import RolloutGroup

T = TypeVar("T")


class GroupSource(Protocol):
    """Where groups come from: recorded rollouts, or a dataset with a rollout engine and rewards."""

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        """``num_prompts`` rewarded groups for this data-parallel replica, the same on all its ranks."""
        ...

    @property
    def num_skipped(self) -> int:
        """Samples skipped so far, each logged with its path and reason."""
        ...


class ReplicaSource:
    """Wraps the source of the replica's reading rank; ``local`` is None on all its other ranks."""

    def __init__(self, local: GroupSource | None, *, groups: ParallelGroups) -> None:
        if (local is not None) != groups.is_source:
            raise ValueError("exactly the source rank of each replica must hold a source")
        self._local = local
        self._groups = groups
        self._num_skipped = 0

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        def read() -> tuple[list[RolloutGroup], int] | None:
            if self._local is None:
                return None
            return self._local.next(num_prompts, step=step), self._local.num_skipped

        answer = on_every_rank(read, groups=self._groups)
        source = torch.distributed.get_global_rank(self._groups.model, 0)
        groups, self._num_skipped = broadcast_object(answer, group=self._groups.model, source=source)
        return groups

    @property
    def num_skipped(self) -> int:
        return self._num_skipped


def on_every_rank(action: Callable[[], T], *, groups: ParallelGroups) -> T:
    """Runs ``action`` here; if it raises ``UserError`` on any rank, every rank of the world raises it.

    Without this, ranks that did not fail would wait in their next collective for those that did.
    """
    problem, result = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * groups.world_size
    torch.distributed.all_gather_object(problems, problem, group=groups.world)
    for found in problems:
        if found is not None:
            raise UserError(found)
    return cast(T, result)


def build_local_source(config: Config, *, groups: ParallelGroups, tokenizer: Any) -> GroupSource | None:
    """The source ``config`` asks for on the reading rank of each replica; None on the others."""
    if not groups.is_source:
        return None
    data, rollout = config.data, config.rollout
    engine = ReplayEngine(
        rollout.replay_path, tokenizer=tokenizer, num_generations=rollout.num_generations, vocab_size=None
    )
    loader = PromptLoader.from_model(
        config.model.model,
        media_root=data.media_root or Path(rollout.replay_path).parent,
        sampling=FrameSampling(fps=data.video_fps, num_frames=data.video_num_frames, max_frames=data.video_max_frames),
        prompt_template=data.prompt_template,
        max_prompt_length=data.max_prompt_length,
        tokenizer=tokenizer,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        image_min_pixels=data.image_min_pixels,
        image_max_pixels=data.image_max_pixels,
    )
    return ReplaySource(
        engine,
        loader=loader,
        seed=config.trainer.seed,
        shuffle=data.shuffle_data,
        rank=groups.data_rank,
        size=groups.data_size,
        skips=SkipCounter(max_skip_share=data.max_skip_share),
    )
