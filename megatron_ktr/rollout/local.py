"""What one reading rank draws: questions of a data set, with or without responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, Rollout, RolloutGroup


class DatasetSource:
    """The prompts of a data set as groups without responses, for an engine to answer."""

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
        """What the data loader met so far, by metric name: decoder/<name>, repeated_frames, skipped/<kind>, ..."""
        return self.dataset.counts

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dataset.load_state_dict(state)


class SupervisedSource(DatasetSource):
    """A data set's own responses, each a group of one, with the end token.

    The response is the record's ``response``, or ``process`` followed by ``solution`` (Video-R1's chain-of-thought
    files).
    """

    def __init__(self, dataset: PromptDataset, *, tokenizer: Any) -> None:
        super().__init__(dataset)
        self.tokenizer = tokenizer

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        return [self._group(prompt) for prompt in self.dataset.next(num_prompts)]

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
