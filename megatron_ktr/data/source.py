"""The sources that a reading rank draws from: questions of a data set, with or without responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.reply import reply_group
from megatron_ktr.types import RolloutGroup


class DatasetSource:
    """The prompts of a data set, as groups without responses, which an engine will answer."""

    def __init__(self, dataset: PromptDataset) -> None:
        self.dataset = dataset

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        """The next ``num_prompts`` groups of this data-parallel replica."""
        return [RolloutGroup(prompt, ()) for prompt in self.dataset.next(num_prompts)]

    @property
    def num_skipped(self) -> int:
        """Samples skipped so far, each logged with its path and reason."""
        return self.dataset.num_skipped

    @property
    def counts(self) -> Mapping[str, int]:
        """The data loader's counts so far, by metric name: decoder/<name>, repeated_frames, skipped/<kind>, ..."""
        return self.dataset.counts

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as plain numbers and text."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dataset.load_state_dict(state)

    def close(self) -> None:
        """Ends the worker processes."""
        self.dataset.close()


class SupervisedSource(DatasetSource):
    """The responses that a data set itself contains. Each is a group of its own and ends with the end token
    (``data/reply.py``)."""

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        prompts = self.dataset.next(num_prompts)
        return [reply_group(prompt, builder=self.dataset.loader_of(prompt).builder) for prompt in prompts]
