"""Packing: the groups of a micro-batch become one sequence, in which every prompt is stored once.

The rows of a packed sequence are the groups back to back, then padding:

    [prompt 1 | response 1.1 | .. | response 1.G | prompt 2 | response 2.1 | .. | padding]

This is planning only; no model runs. Every ``PackedBatch`` made here has these properties, in every view (the tests
assert them):

1. the groups' spans tile rows 0 .. T - num_padding; T is a multiple of ``pad_to_multiple``, reached with the fewest
   padding rows;
2. ``target_ids_R`` is the responses' tokens in order, the same in every view: token r of one view is token r of the
   others, so scores subtract element by element;
3. ``predicting_rows_R[r]`` is the row before target r in its own response; for the first token of a response it is
   the prompt's last row. The row holding target r itself is never its predictor;
4. every response of a group starts at the same position, the one after the prompt, and counts up on all three axes;
5. ``visual_rows`` are the prompts' visual placeholder rows in order, as many as the media have visual tokens;
   placeholder ids inside a *response* (a sampler may emit them) are plain text;
6. a view that does not keep rows (``hidden``) has no visual rows and no media, and its positions are those of the
   remaining text;
7. every other view differs from the intact one in ``patches_SD`` and ``media`` only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ktr.config.view_registry import load_view
from megatron_ktr.types import (
    INTACT,
    GroupSpan,
    PackedBatch,
    PackedLayout,
    Prompt,
    RolloutGroup,
    View,
    VisualInput,
)

PAD_TOKEN_ID = 0
"""The token of padding rows. Any valid id would do: padding rows are computed but never read."""


@dataclass(frozen=True)
class MediaSpec:
    """What packing must know about a model family's images and videos."""

    image_token_id: int
    video_token_id: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    """A square of merge x merge patches becomes one visual token."""
    positions: Callable[..., tuple[Tensor, int]]
    """``positions(token_ids, *, grid_thw, kinds, seconds_per_grid) -> (int64 [3, T], next_position)``."""
    patchify: Callable[[Tensor, VisualInput], Tensor]
    """``patchify(frames_FCHW, visual_input) -> float32 [S, C * temporal_patch * patch * patch]``, normalised;
    ``visual_input`` gives kind and grid only; its own frames are not read."""

    @property
    def pixels_per_unit_C(self) -> Tensor:
        """fp32 [C]: the difference of a pixel's value that is 1 in a patch, found by cutting a white and a black
        picture into patches. (Normalisation is linear, and ``patchify`` alone knows its scale.)"""
        side = self.merge_size * self.patch_size
        grid = (1, self.merge_size, self.merge_size)
        picture = VisualInput("image", torch.zeros(1, 3, side, side, dtype=torch.uint8), grid)
        black_SD, white_SD = (self.patchify(picture.frames_FCHW + value, picture) for value in (0, 255))
        return 255 / (white_SD - black_SD)[0].reshape(3, -1)[:, 0]

    def token_id(self, medium: VisualInput) -> int:
        return self.image_token_id if medium.kind == "image" else self.video_token_id

    def num_visual_tokens(self, medium: VisualInput) -> int:
        return math.prod(medium.grid_thw) // self.merge_size**2

    def is_visual(self, token_id: int) -> bool:
        return token_id in (self.image_token_id, self.video_token_id)


def pack_groups(
    groups: Sequence[RolloutGroup],
    *,
    view: View,
    media: MediaSpec,
    pad_to_multiple: int = 1,
    shown: Sequence[Sequence[VisualInput]] | None = None,
    seconds_per_grid: float | None = None,
    vision: Literal["patches", "media", "none"] = "patches",
) -> PackedBatch:
    """Packs one micro-batch of whole groups in one view.

    Args:
        groups: at least one; every response has at least one token.
        view: ``intact``, or a counterfactual view by its name (``config/view_registry.py``).
        pad_to_multiple: T becomes a multiple of it (sequence parallelism, FP8).
        shown: only for counterfactual views that keep rows: the media that the view shows, by group
            (``CounterfactualView.shown``). They may be left out with ``vision`` "none".
        seconds_per_grid: overrides every video's own value; only the sampler check's experiments set it.
        vision: what the batch holds of its media. ``patches``: patches, which the model encodes itself. ``media``: the
            media alone, because a ``VisionPass`` computes features. ``none``: nothing, for ranks without the encoder.

    Raises:
        ValueError: there is no group, a response is empty, media do not match the prompt's placeholders, the media of
            the view are missing, or a view without visual tokens would keep nothing of a prompt.
        UserError: there is no such view.
    """
    keeps_rows = view == INTACT or load_view(view).keeps_rows
    _check_request(groups, pad_to_multiple=pad_to_multiple)
    if view != INTACT and keeps_rows and vision != "none":
        _check_shown(groups, shown, view=view)
    builder = _Builder()
    for index, group in enumerate(groups):
        prompt = group.prompt
        _check_placeholders(prompt, media)
        kept = prompt.media if keeps_rows else ()
        tokens = [token for token in prompt.token_ids if keeps_rows or not media.is_visual(token)]
        if not tokens:
            raise ValueError(
                f"prompt {prompt.problem_id!r} has no text token left in view {view!r}; something must predict the "
                "first token of its responses"
            )
        positions_3P, next_position = media.positions(
            tokens,
            grid_thw=[medium.grid_thw for medium in kept],
            kinds=[medium.kind for medium in kept],
            seconds_per_grid=[_seconds(medium, seconds_per_grid) for medium in kept],
        )
        builder.add_group(group, tokens, positions_3P, next_position, media)
        builder.grids += [medium.grid_thw for medium in kept]
        if vision == "none":
            continue
        for medium in kept if shown is None or not keeps_rows else shown[index]:
            builder.media.append(medium)
            if vision == "patches":
                builder.patches.append(media.patchify(medium.frames_FCHW, medium))
    return builder.finish(view, pad_to_multiple)


def with_media(intact: PackedBatch, view: View, shown: Sequence[Sequence[VisualInput]]) -> PackedBatch:
    """A view that keeps rows, made from the intact view of the same groups without packing them again.

    The result equals ``pack_groups(groups, view=view, shown=shown)``. It shares the tensors of rows, tokens and
    positions with ``intact``, which must have been packed with ``vision`` "media" or "none".

    Raises:
        ValueError: the intact view holds patches, or has another number of media.
    """
    media = tuple(medium for of_group in shown for medium in of_group)
    if intact.patches_SD is not None or (intact.media and len(intact.media) != len(media)):
        raise ValueError(
            f"with_media: expected no patches and {len(media)} media, got {len(intact.media)} media"
            f"{'' if intact.patches_SD is None else ' and patches'}"
        )
    return dataclasses.replace(intact, view=view, media=media if intact.media else ())


def plan_micro_batches(
    groups: Sequence[RolloutGroup], *, groups_per_micro_batch: int
) -> list[tuple[RolloutGroup, ...]]:
    """Splits the groups, in order, into micro-batches of at most ``groups_per_micro_batch`` whole groups.
    (``step/balance.py`` splits them under a bound on tokens instead.)"""
    if groups_per_micro_batch < 1:
        raise ValueError(f"micro_batch_groups must be at least 1, got {groups_per_micro_batch}")
    return [
        tuple(groups[start : start + groups_per_micro_batch]) for start in range(0, len(groups), groups_per_micro_batch)
    ]


class _Builder:
    """Collects rows group by group. Python lists are fast enough: sequences are thousands of tokens, not millions."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[Tensor] = []
        self.spans: list[GroupSpan] = []
        self.predicting_rows: list[int] = []
        self.targets: list[int] = []
        self.response_index: list[int] = []
        self.group_index: list[int] = []
        self.is_trained: list[bool] = []
        self.visual_rows: list[int] = []
        self.grids: list[tuple[int, int, int]] = []
        self.patches: list[Tensor] = []
        self.media: list[VisualInput] = []
        self.num_responses = 0

    def add_group(
        self, group: RolloutGroup, prompt_tokens: list[int], positions_3P: Tensor, next_position: int, media: MediaSpec
    ) -> None:
        start = len(self.tokens)
        lengths = tuple(len(rollout.token_ids) for rollout in group.rollouts)
        span = GroupSpan(start=start, prompt_length=len(prompt_tokens), response_lengths=lengths)
        self.visual_rows += [start + row for row, token in enumerate(prompt_tokens) if media.is_visual(token)]
        self.tokens += prompt_tokens
        self.positions.append(positions_3P)
        last_prompt_row = len(self.tokens) - 1
        for rollout, length in zip(group.rollouts, lengths, strict=True):
            first_row = len(self.tokens)
            self.predicting_rows += [last_prompt_row, *range(first_row, first_row + length - 1)]
            self.tokens += rollout.token_ids
            self.targets += rollout.token_ids
            self.positions.append(next_position + _counting_3n(length))
            self.response_index += [self.num_responses] * length
            self.group_index += [len(self.spans)] * length
            self.is_trained += [True] * length if rollout.is_trained is None else rollout.is_trained
            self.num_responses += 1
        self.spans.append(span)

    def finish(self, view: View, pad_to_multiple: int) -> PackedBatch:
        num_padding = -len(self.tokens) % pad_to_multiple
        tokens = self.tokens + [PAD_TOKEN_ID] * num_padding
        return PackedBatch(
            view=view,
            layout=PackedLayout(groups=tuple(self.spans), num_padding=num_padding),
            token_ids_T=_int64(tokens),
            position_ids_3T=torch.cat([*self.positions, _counting_3n(num_padding)], dim=1),
            predicting_rows_R=_int64(self.predicting_rows),
            target_ids_R=_int64(self.targets),
            response_R=_int64(self.response_index),
            group_R=_int64(self.group_index),
            is_trained_R=torch.tensor(self.is_trained, dtype=torch.bool),
            visual_rows=_int64(self.visual_rows),
            patches_SD=torch.cat(self.patches) if self.patches else None,
            grid_thw_M3=_int64(self.grids).reshape(-1, 3),
            media=tuple(self.media),
        )


def _counting_3n(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.int64).expand(3, length)


def _int64(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _seconds(medium: VisualInput, override: float | None) -> float:
    return override if override is not None and medium.kind == "video" else medium.seconds_per_grid


def _check_request(groups: Sequence[RolloutGroup], *, pad_to_multiple: int) -> None:
    if not groups:
        raise ValueError("pack_groups needs at least one group")
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
    for group in groups:
        lengths = [len(rollout.token_ids) for rollout in group.rollouts]
        if not lengths or min(lengths) == 0:
            raise ValueError(
                f"prompt {group.prompt.problem_id!r}: expected responses of at least one token (the end token "
                f"counts), got lengths {lengths}"
            )


def _check_shown(groups: Sequence[RolloutGroup], shown: Sequence[Sequence[VisualInput]] | None, *, view: View) -> None:
    expected = [[medium.grid_thw for medium in group.prompt.media] for group in groups]
    got = None if shown is None else [[medium.grid_thw for medium in of_group] for of_group in shown]
    if got != expected:
        raise ValueError(f"view {view!r} must show media of the prompts' grids, {expected} by group, got {got}")


def _check_placeholders(prompt: Prompt, media: MediaSpec) -> None:
    """Refuses a prompt unless its placeholders are exactly the visual tokens of its media, in order."""
    found = [token for token in prompt.token_ids if media.is_visual(token)]
    expected = [media.token_id(medium) for medium in prompt.media for _ in range(media.num_visual_tokens(medium))]
    if found != expected:
        grids = [(medium.kind, medium.grid_thw) for medium in prompt.media]
        raise ValueError(
            f"prompt {prompt.problem_id!r} has {len(found)} visual placeholders, but its media {grids} need "
            f"{len(expected)} (merge {media.merge_size}), each medium's own kind of placeholder in order"
        )
