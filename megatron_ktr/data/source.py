"""The sources that a reading rank draws from: questions of a data set, with or without responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.reply import reply_group
from megatron_ktr.data.same_data import has_digests
from megatron_ktr.data.together import TogetherDraws
from megatron_ktr.types import Prompt, RolloutGroup

_log = logging.getLogger(__name__)


class DatasetSource:
    """The prompts of a data set, as groups without responses, which an engine will answer."""

    def __init__(self, dataset: PromptDataset) -> None:
        self.dataset = dataset

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        """The next ``num_prompts`` groups of this data-parallel replica."""
        return self.groups_of(self.dataset.next(num_prompts))

    def next_together(self, number: int, *, num_step: int) -> dict[int, RolloutGroup]:
        """This replica's groups among the first ``number`` draws of the step that were not returned before, by place
        (``TogetherDraws.next``)."""
        drawn = dict(self._together.next(number, num_step=num_step))
        return dict(zip(drawn, self.groups_of(list(drawn.values())), strict=True))

    def settle(self, number: int, *, accuracies: Mapping[int, float]) -> dict[str, float]:
        """The first ``number`` draws of the step are used up (``TogetherDraws.settle``). Returns metrics that are the
        same on every replica."""
        self._together.settle(number, accuracies=accuracies)
        return self._together.values

    @property
    def _together(self) -> TogetherDraws:
        assert self.dataset.together is not None, "draw_together() comes first"
        return self.dataset.together

    def groups_of(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """The groups of ``prompts``, as far as the data set has responses for them."""
        return [RolloutGroup(prompt, ()) for prompt in prompts]

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

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for a place in other data; changes nothing. A warning says where that cannot be told.
        ``load_state_dict`` refuses the same without a warning: every reading rank calls it after this."""
        self.dataset.require_same(state)
        if not has_digests(state):
            _log.warning("resume: the checkpoint does not say which records it was trained on; they are not compared")

    def close(self) -> None:
        """Ends the worker processes."""
        self.dataset.close()


class SupervisedSource(DatasetSource):
    """The responses that a data set itself contains. Each is a group of its own and ends with the end token
    (``data/reply.py``)."""

    def groups_of(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        return [reply_group(prompt, builder=self.dataset.loader_of(prompt).builder) for prompt in prompts]
