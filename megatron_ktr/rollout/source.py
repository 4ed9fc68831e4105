"""Where the trainer's groups come from.

    ReplaySource       recorded rollouts                                (``replay.py``)
    SupervisedSource   a data set's own responses, groups of one        (supervised fine-tuning)
    OnlineSource       a data set's prompts, an engine's responses, rewards

One rank of each replica (``ParallelGroups.is_source``) reads files and runs engines; ``ReplicaSource`` hands its groups
to the others. So a video is decoded once per replica, a skipped sample is skipped everywhere, and an error on one rank
is the same error on every rank of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from megatron_ktr.config import Config
from megatron_ktr.data.dataset import PromptDataset, PromptLoader, SkipCounter
from megatron_ktr.data.records import Record, read_records
from megatron_ktr.data.video import FrameSampling
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.packing import MediaSpec
from megatron_ktr.rewards import load_rewards, reward_groups
from megatron_ktr.rewards.accuracy import ACCURACY_BY_TYPE
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.replay import ReplayEngine, ReplaySource
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

T = TypeVar("T")
DEFAULT_REWARDS = ("accuracy", "format")


class GroupSource(Protocol):
    """What the trainer draws from; ``state_dict`` is plain numbers and text."""

    @property
    def needs_weights(self) -> bool:
        """Whether responses are sampled from the policy: its weights are then loaded before every step."""
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's exported weights and exhausts the iterator, which is collective."""
        ...

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        """``num_prompts`` rewarded groups for this data-parallel replica, the same on all its ranks."""
        ...

    @property
    def num_skipped(self) -> int:
        """Samples skipped so far, each logged with its path and reason."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What the data loader met so far, by metric name: decoder/<name>, repeated_frames, skipped/<kind>, ..."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class OnlineSource:
    """Prompts of a data set, responses of an engine, rewards by name (``rewards.load_reward``)."""

    needs_weights = True

    def __init__(self, dataset: PromptDataset, engine: RolloutEngine, *, rewards: Sequence[str]) -> None:
        self.dataset, self.engine, self.rewards = dataset, engine, tuple(rewards)

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        groups = self.engine.generate(self.dataset.next(num_prompts), step=step)
        return reward_groups(groups, names=self.rewards)

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.engine.load_weights(named_tensors)

    @property
    def num_skipped(self) -> int:
        return self.dataset.num_skipped

    @property
    def counts(self) -> Mapping[str, int]:
        return self.dataset.counts

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dataset.load_state_dict(state)


class SupervisedSource:
    """A data set's own responses, each a group of one, with the end token.

    The response is the record's ``response``, or ``process`` followed by ``solution`` (Video-R1's chain-of-thought
    files).
    """

    needs_weights = False

    def __init__(self, dataset: PromptDataset, *, tokenizer: Any) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        return [self._group(prompt) for prompt in self.dataset.next(num_prompts)]

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        raise AssertionError("given responses need no weights")

    @property
    def num_skipped(self) -> int:
        return self.dataset.num_skipped

    @property
    def counts(self) -> Mapping[str, int]:
        return self.dataset.counts

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dataset.load_state_dict(state)

    def _group(self, prompt: Prompt) -> RolloutGroup:
        text = response_text(prompt.record)
        token_ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)
        return RolloutGroup(prompt, (Rollout(token_ids=token_ids, text=text),))


def response_text(record: Mapping[str, Any]) -> str:
    """The response to imitate; raises UserError naming the record if it has none."""
    if record.get("response"):
        return str(record["response"])
    if record.get("process") and record.get("solution"):
        return f"{record['process']}{record['solution']}"
    raise UserError(
        f"data_path: record {record['problem_id']} has no response to imitate: expected 'response', or 'process' and "
        "'solution'"
    )


class ReplicaSource:
    """Wraps the source of the replica's reading rank; ``local`` is None on all its other ranks."""

    def __init__(self, local: GroupSource | None, *, groups: ParallelGroups) -> None:
        if (local is not None) != groups.is_source:
            raise ValueError("exactly the source rank of each replica must hold a source")
        self.local = local
        self._groups = groups
        self._num_skipped = 0
        self._counts: Mapping[str, int] = {}
        self.needs_weights: bool = self._from_local(None if local is None else local.needs_weights)

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        def load() -> None:
            try:
                if self.local is not None:
                    self.local.load_weights(named_tensors)
            finally:
                # The other ranks take part in the gathering and are given nothing; also where the reading rank has
                # failed, which they learn only after the last tensor.
                for _ in named_tensors:
                    pass

        on_every_rank(load, groups=self._groups)

    def next(self, num_prompts: int, *, step: int) -> list[RolloutGroup]:
        def read() -> tuple[list[RolloutGroup], int, dict[str, int]] | None:
            if self.local is None:
                return None
            return self.local.next(num_prompts, step=step), self.local.num_skipped, dict(self.local.counts)

        groups, self._num_skipped, self._counts = self._from_local(on_every_rank(read, groups=self._groups))
        return groups

    @property
    def num_skipped(self) -> int:
        return self._num_skipped

    @property
    def counts(self) -> Mapping[str, int]:
        """The reading rank's, as of the last ``next``."""
        return self._counts

    def state_dict(self) -> dict[str, Any]:
        """The reading rank's state, on every rank of the replica."""
        return self._from_local(None if self.local is None else self.local.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        on_every_rank(lambda: self.local and self.local.load_state_dict(state), groups=self._groups)

    def _from_local(self, value: Any) -> Any:
        source = torch.distributed.get_global_rank(self._groups.model, 0)
        return broadcast_object(value, group=self._groups.model, source=source)


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
            error = UserError(found)
            error.is_on_every_rank = True
            raise error
    return cast(T, result)


def build_local_source(
    config: Config, *, groups: ParallelGroups, tokenizer: Any, media: MediaSpec, vocab_size: int
) -> GroupSource | None:
    """The source ``config`` asks for on the reading rank of each replica; None on the others.

    ``vocab_size`` is the model's: it has more ids than its tokenizer knows, and a sampler may have drawn them.
    """
    if not groups.is_source:
        return None
    data, trainer = config.data, config.trainer
    order = dict(
        seed=trainer.seed,
        shuffle=data.shuffle_data,
        rank=groups.data_rank,
        size=groups.data_size,
        skips=SkipCounter(max_skip_share=data.max_skip_share),
    )
    if config.objective.objective != "sft" and config.rollout.engine == "replay":
        engine = ReplayEngine(
            config.rollout.replay_path,
            tokenizer=tokenizer,
            num_generations=config.rollout.num_generations,
            vocab_size=vocab_size,
            required_rewards=("accuracy",) if config.reward.length_bonus > 0 else (),
            required_because="the length bonus goes to correct responses: record it, or set --length-bonus 0",
        )
        return ReplaySource(engine, loader=prompt_loader(config, tokenizer=tokenizer), **order)
    is_supervised = config.objective.objective == "sft"
    records = read_records(data.data_path, problem_types=data.problem_types, needs_solution=not is_supervised)
    rewards = config.reward.reward_functions or DEFAULT_REWARDS
    if not is_supervised and "accuracy" in load_rewards(rewards):
        _check_problem_types(records, data_path=data.data_path)
    dataset = PromptDataset(records, loader=prompt_loader(config, tokenizer=tokenizer), **order)
    if is_supervised:
        return SupervisedSource(dataset, tokenizer=tokenizer)
    engine = build_engine(config, tokenizer=tokenizer, media=media)
    return OnlineSource(dataset, engine, rewards=rewards)


def _check_problem_types(records: Sequence[Record], *, data_path: str) -> None:
    """Before the first step rather than in the middle of the run, where the record is drawn."""
    for record in records:
        if record["problem_type"] not in ACCURACY_BY_TYPE:
            raise UserError(
                f"data_path: {data_path}, record {record['record_number']} (problem_id {record['problem_id']}): the "
                f"reward accuracy does not know problem_type {record['problem_type']!r}, only "
                f"{sorted(ACCURACY_BY_TYPE)}; choose with --problem-types, or name other --reward-functions"
            )


def build_engine(config: Config, *, tokenizer: Any, media: MediaSpec) -> RolloutEngine:
    """The engine ``rollout.engine`` names, with the run's sampling settings."""
    from megatron_ktr.rollout.hf import HFEngine, SamplingSettings

    rollout = config.rollout
    sampling = SamplingSettings(
        num_generations=rollout.num_generations,
        max_response_length=rollout.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=config.trainer.seed,
    )
    return HFEngine(config.model.model, tokenizer=tokenizer, media=media, sampling=sampling)


def prompt_loader(config: Config, *, tokenizer: Any) -> PromptLoader:
    """Loads records as the data options say; media below ``media_root``, or beside the file that names them.

    With ``original_compat`` a question whose media are unusable is asked without them, as the authors' code does.
    """
    data = config.data
    is_replay = config.objective.objective != "sft" and config.rollout.engine == "replay"
    file = config.rollout.replay_path if is_replay else data.data_path
    return PromptLoader.from_model(
        config.model.model,
        media_root=data.media_root or Path(file).parent,
        sampling=FrameSampling(fps=data.video_fps, num_frames=data.video_num_frames, max_frames=data.video_max_frames),
        prompt_template=data.prompt_template,
        max_prompt_length=data.max_prompt_length,
        tokenizer=tokenizer,
        cache_bytes=round(data.media_cache_gb * 1e9),
        text_only_fallback=config.objective.original_compat,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        image_min_pixels=data.image_min_pixels,
        image_max_pixels=data.image_max_pixels,
    )
