"""What a reward sees of a response. Everything is plain numbers and text, so that it travels to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ktr.types import RolloutGroup


@dataclass(frozen=True)
class RewardMedium:
    """An image or video of the question as the model was shown it.

    Qwen2.5-VL writes boxes in the pixels of this picture. A box in the pixels of a file of ``w`` times ``h`` pixels is
    ``(x * width / w, y * height / h)`` here.
    """

    kind: str
    """"image" or "video"."""
    width: int
    """In pixels, after resizing."""
    height: int
    num_frames: int
    grid_thw: tuple[int, int, int]
    """Patches along time, height and width."""
    seconds_per_grid: float
    """Seconds between two temporal patches; 0 for images."""
    source: str
    """The path of the file."""


@dataclass(frozen=True)
class RewardInput:
    """One response with its question and its group.

    Worked example, the second of two responses to a text question: ``response`` "<answer>B</answer>", ``token_ids``
    (5, 6, 7), ``record`` {"problem": "Which?", "solution": "B", ...}, ``prompt_token_ids`` (1, 2), ``media`` (),
    ``index`` 1, ``group`` ("<answer>A</answer>", "<answer>B</answer>"), ``group_lengths`` (4, 3).
    """

    response: str
    record: Mapping[str, Any] = field(default_factory=dict)
    """The record of the question (docs/records.md)."""
    token_ids: tuple[int, ...] = ()
    """The tokens of the response, with the end token if it is finished."""
    is_finished: bool = True
    """False if the response was cut off at the limit of tokens."""
    prompt_token_ids: tuple[int, ...] = ()
    """The tokens of the question, every visual placeholder expanded."""
    media: tuple[RewardMedium, ...] = ()
    index: int = 0
    """The place of the response in its group."""
    group: tuple[str, ...] = ()
    """The texts of all responses to the question."""
    group_lengths: tuple[int, ...] = ()
    """Their lengths in tokens."""

    @property
    def length(self) -> int:
        """The length of the response in tokens."""
        return len(self.token_ids)

    @property
    def question(self) -> str:
        """The text of the question: ``problem``, or the text of the record's last message."""
        if isinstance(problem := self.record.get("problem"), str):
            return problem
        messages = self.record.get("messages") or [{}]
        content = messages[-1].get("content", "")
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def inputs_of(group: RolloutGroup) -> list[RewardInput]:
    """The responses of a group as rewards see them."""
    prompt, texts = group.prompt, tuple(rollout.text for rollout in group.rollouts)
    lengths = tuple(len(rollout.token_ids) for rollout in group.rollouts)
    media = tuple(
        RewardMedium(
            kind=medium.kind,
            width=int(medium.frames_FCHW.shape[-1]),
            height=int(medium.frames_FCHW.shape[-2]),
            num_frames=int(medium.frames_FCHW.shape[0]),
            grid_thw=medium.grid_thw,
            seconds_per_grid=medium.seconds_per_grid,
            source=medium.source,
        )
        for medium in prompt.media
    )
    return [
        RewardInput(
            response=rollout.text,
            record=prompt.record,
            token_ids=rollout.token_ids,
            is_finished=rollout.is_finished,
            prompt_token_ids=prompt.token_ids,
            media=media,
            index=index,
            group=texts,
            group_lengths=lengths,
        )
        for index, rollout in enumerate(group.rollouts)
    ]
