"""The data that flows through one training step, and the legend of tensor shapes for the whole project.

A tensor's name ends with its shape, one letter per dimension. Sizes are logical sizes, never those of a rank's shard,
unless a docstring says otherwise:

    P  prompts, or groups of a packed sequence   V  vocabulary
    G  responses per prompt                      D  hidden size
    T  tokens of a packed sequence               N  attention heads
    R  response tokens (all responses of all     K  heads of keys and values (N is a multiple of K)
       groups in the packed sequence)            H  size of one attention head
    L  query rows of one block of attention      M  images and videos of a packed sequence
    J  key rows (of a block, or of all ranks)    S  patches (ViT tokens before merging)
    Q  positions of responses: place t in its    E  visual tokens (patches after merging)
       group, over all groups                    F  decoded frames of a video
    B  rows that are generated together          C, H, W  channels, height and width of a picture
    X  parts of the vocabulary, or words of one

A digit is a dimension of that size: 3 axes of M-RoPE in ``position_ids_3T``, megatron-core's batch dimension of 1 in
``hidden_T1D``. H is a height only where C, F or W stand beside it (``frames_FCHW``). The files
``ops/token_statistics*.py`` have no attention: there N counts the statistics of a row, and K counts the hidden rows
that are compared (the intact one first).

``logprob_R[r]`` belongs to ``target_ids_R[r]``: the log-probability of response token ``r``, computed from
the hidden row ``predicting_rows_R[r]``, which is the row *before* that token.

Flow of one step (``trainer.py``):

    Prompt -> RolloutGroup -> PackedBatch (one per view) -> TokenScores -> TokenStreams -> loss
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send

View = str
"""The name of a view: ``INTACT``, or a counterfactual one (``config/view_registry.py``)."""
INTACT: View = "intact"
MediaKind = Literal["image", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = get_args(MediaKind)


@dataclass(frozen=True)
class VisualInput:
    """One image or video after decoding and resizing; patches are made from it on demand.

    Worked example: 8 frames of 56 x 84 sampled at 2 frames a second, patch 14, merge 2, temporal patch 2:
    ``grid_thw == (4, 4, 6)``, 4 * 2 * 3 = 24 visual tokens, ``seconds_per_grid == 1.0``.
    """

    kind: MediaKind
    frames_FCHW: Tensor
    """uint8 [F, C, H, W] at the final size (H and W multiples of patch * merge). An image has F == 1. Only the view
    ``noise`` has fp32 frames; their unit is the same."""
    grid_thw: tuple[int, int, int]
    """Patches along time, height and width, before merging. F frames give ceil(F / temporal_patch) in time."""
    seconds_per_grid: float = 0.0
    """Seconds between two temporal patches (temporal_patch_size / sampled fps). 0 for images."""
    source: str = ""
    """The path of the file, for logs only."""
    features: Tensor | None = None
    """[visual tokens, D] in host memory, computed by the trainer's vision encoder with its current weights. Set only in
    prompts that are sent to a rollout engine without a vision encoder of its own (``rollout/features.py``)."""


@dataclass(frozen=True)
class Prompt:
    """One question with its media, tokenised.

    ``token_ids`` holds every visual placeholder already expanded: a video of 24 visual tokens appears as 24
    times ``video_token_id``. ``media`` is in order of occurrence.
    """

    problem_id: str
    token_ids: tuple[int, ...]
    media: tuple[VisualInput, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    """The dataset record (problem_type, solution, options, path ...), read by rewards and reports."""
    draw_number: int = 0
    """Which draw of the run's data this is: its position in the endless sequence of records that all replicas
    walk through (``data/dataset.py``). Prompts that do not come from a data set have 0; their ``problem_id`` then tells
    them apart."""
    source: str = ""
    """The name of the file in a mixture of several; "" in a run with one file. Rewards and metrics go by it."""
    other_media: tuple[VisualInput, ...] = ()
    """The media of another question, one for each of ``media`` and with its frames and size; only for the view that
    shows them (``attribution/views/other_video.py``), else empty."""
    variant: str = ""
    """How this prompt differs from the one that was drawn: "shuffled" for one with its frames in random order
    (``rollout/second_prompt.py``). "" for the prompt as it was drawn."""

    @property
    def identity(self) -> str:
        """A string that identifies this draw of this record in the whole run. Seeds are derived from it, and kept
        responses are found by it.

        ``problem_id`` alone is not enough: published files repeat ids, and a small data set may give one record several
        times in a step. The number of a draw never repeats in a run. It is the same for every number of replicas, in
        every engine, and after a resume. The variant stands before the problem id, which may contain anything.
        """
        draw = f"{self.draw_number}/{self.variant}" if self.variant else f"{self.draw_number}"
        return f"{draw} {self.problem_id}"


@dataclass(frozen=True)
class Rollout:
    """One sampled response. ``token_ids`` includes the end token when ``is_finished``."""

    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...] | None = None
    """The engine's log-softmax(logits / temperature) of each token, over the full vocabulary and before top-p; None if
    not recorded."""
    text: str = ""
    is_finished: bool = True
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, e.g. {"accuracy": 1.0, "format": 1.0}; their weighted sum is the reward."""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """The weights of parts, where they are not 1."""
    is_trained: tuple[bool, ...] | None = None
    """For each token, whether it may carry loss. It is False in the user's turns of a conversation that was given as
    training data. None: every token may."""

    @property
    def reward(self) -> float:
        return float(sum(self.reward_weights.get(name, 1.0) * value for name, value in self.rewards.items()))


@dataclass(frozen=True)
class RolloutGroup:
    """G responses to one prompt. A group is packed, scored and selected as a whole; it is never split."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    shuffled: tuple[Rollout, ...] = ()
    """Responses to the same question with its frames in random order, with rewards, which a bonus compares with
    ``rollouts`` (``objectives/bonuses/temporal.py``). They are never trained on and in no mean and no standard
    deviation. Empty where the objective asks for none, or the prompt has no order to lose."""

    @property
    def num_response_tokens(self) -> int:
        return sum(len(rollout.token_ids) for rollout in self.rollouts)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the packed group: the prompt counts once, and so does every response."""
        return len(self.prompt.token_ids) + self.num_response_tokens


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies in a packed sequence: prompt rows, then its responses back to back.

    Example: ``GroupSpan(start=0, prompt_length=5, response_lengths=(2, 3))`` covers rows 0..9; response 1 is
    rows 5, 6 and response 2 rows 7, 8, 9.
    """

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.response_lengths)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class PackedLayout:
    """Attention structure of a packed sequence: groups back to back, then padding rows.

    Row i may attend row j <= i iff both are in the same group and j is in the group's prompt or in i's own
    response. Padding rows (``num_padding`` at the end, to make T divisible for sequence parallelism or FP8)
    attend causally among themselves and are never read by anybody.
    """

    groups: tuple[GroupSpan, ...]
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        return (self.groups[-1].end if self.groups else 0) + self.num_padding


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch in one view, with everything that the model and the loss need on any pipeline stage."""

    view: View
    layout: PackedLayout
    token_ids_T: Tensor
    """int64 [T]"""
    position_ids_3T: Tensor
    """int64 [3, T]: M-RoPE positions (time, height, width)."""
    predicting_rows_R: Tensor
    """int64 [R]: row of T whose hidden state predicts response token r. The prompt's last row appears once
    per response of its group; its gradient therefore sums over the group."""
    target_ids_R: Tensor
    """int64 [R]"""
    response_R: Tensor
    """int64 [R]: index of the response, counted over the whole batch (group-major)."""
    group_R: Tensor
    """int64 [R]: index of the group in ``layout.groups``."""
    visual_rows: Tensor
    """int64 [number of visual tokens]: rows of T that receive vision features, in order of occurrence."""
    patches_SD: Tensor | None
    """float32 [S, C * temporal_patch * patch * patch], the patches of all media in order of occurrence. None if the
    view has no media or brings ``features_ED`` instead. Only the first pipeline stage reads it."""
    grid_thw_M3: Tensor
    """int64 [M, 3]; empty where the view has no media."""
    media: tuple[VisualInput, ...] = ()
    """The media as this view shows them, in order of occurrence; empty except on the first pipeline stage."""
    features_ED: Tensor | None = None
    """[visual tokens, D]: the vision encoder's output for ``media``, if the encoder has run before the model does
    (``policy/vision_pass.py``)."""
    is_trained_R: Tensor | None = None
    """bool [R]: False on tokens that are context inside a response (``Rollout.is_trained``). None: there are none."""
    left_behind: PackedBatch | None = field(default=None, repr=False, compare=False)
    """The batch in host memory that this batch, on a device, was copied from; None if this batch is not such a copy."""

    @property
    def num_responses(self) -> int:
        return sum(len(group.response_lengths) for group in self.layout.groups)

    @property
    def on_host(self) -> PackedBatch:
        """The same tokens and rows in host memory. Code that plans on the host reads this batch, because reading a
        tensor on the device would wait for the device."""
        return self.left_behind or self

    def to(self, device: torch.device) -> PackedBatch:
        """Sends every tensor to ``device``; the host does not wait for the copies."""
        moved = {
            f.name: send(value, device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved, left_behind=self.on_host)


@dataclass(frozen=True)
class TokenScores:
    """What is known about the response tokens of one PackedBatch. Each field is fp32 [R], without gradient unless its
    docstring says otherwise.

    A field is None when no enabled part of the objective asked for it. On tokens whose prompt has nothing to hide or to
    shuffle, counterfactual values have no meaning; ``attribution/signals.py`` discards them.
    """

    policy_logprob_R: Tensor
    entropy_R: Tensor | None = None
    logprob_of_view: Mapping[View, Tensor] = field(default_factory=dict)
    """Log-probs [R] of the same tokens in each counterfactual view."""
    kl_of_view: Mapping[View, Tensor] = field(default_factory=dict)
    """KL(p_intact || p_view) [R] over the whole vocabulary; only where the objective compares whole distributions
    (``Objective.needs_kl``)."""
    divergence_R: Tensor | None = None
    """The divergence between the G next-token distributions at the token's position in its group
    (``ops/group_divergence.py``). It has a gradient if the objective asks for one (``needs_divergence_gradient``)."""
    reference_logprob_R: Tensor | None = None
    reference_kl_R: Tensor | None = None
    """KL(policy || reference) over the whole vocabulary, never negative. In an update it is that of the current policy,
    with a gradient if the objective asks for one (``needs_reference_kl_gradient``)."""
    behaviour_logprob_R: Tensor | None = None
    """Log-probs of the old policy, for a clipped ratio. None means one update per rollout; then the current policy is
    the old one, and ratio = exp(logp - stopgrad(logp))."""
    sampler_logprob_R: Tensor | None = None
    """Log-probs as the rollout engine recorded them (``Rollout.sampler_logprobs``); None if any response has none."""

    def detach(self) -> TokenScores:
        """These scores without the autograd graphs that ``divergence_R`` and ``reference_kl_R`` may hold."""
        held = {"divergence_R": self.divergence_R, "reference_kl_R": self.reference_kl_R}
        return dataclasses.replace(self, **{name: value.detach() for name, value in held.items() if value is not None})


@dataclass(frozen=True)
class ScoredBatch:
    """One micro-batch with everything that is known about its tokens: what an objective computes streams from."""

    batch: PackedBatch
    """The intact view, on any device."""
    scores: TokenScores
    groups: Sequence[RolloutGroup]
    """The groups packed in ``batch``, in order, with rewards."""

    @property
    def response_R(self) -> Tensor:
        """int64 [R]: index of each token's response in the batch, on the device of the scores."""
        return send(self.batch.response_R, self.scores.policy_logprob_R.device)

    @property
    def group_R(self) -> Tensor:
        """int64 [R]: index of each token's group in the batch, on the device of the scores."""
        return send(self.batch.group_R, self.scores.policy_logprob_R.device)

    @property
    def num_groups(self) -> int:
        return len(self.batch.layout.groups)


@dataclass(frozen=True)
class BatchFacts:
    """What one update knows about the global batch, over all micro-batches and replicas; the same on every rank."""

    num_responses: int
    num_tokens: int | None = None
    """The number of tokens that the loss is divided by; None for a mean over responses, or if not known yet."""
    num_response_tokens: int | None = None
    """The number of tokens of all responses, whether they carry the loss or not."""
    rewards: Sequence[Sequence[float]] | None = None
    """The rewards of the rollout by group, bonuses included, group after group of every replica; only if the objective
    compares responses over the whole rollout (``Objective.needs_batch_rewards``). With several mini-batches they are
    those of all mini-batches."""
    lengths: Sequence[Sequence[int]] | None = None
    """The responses' lengths in tokens, likewise."""
    step: int = 0
    seed: int = 0
    """The run's seed. What is drawn at random depends on seed, step and the prompt's identity alone."""
    noise_floor: Mapping[str, float] = field(default_factory=dict)
    """By signal: the size of score that rounding alone explains (``attribution/noise_floor.py``)."""


@dataclass(frozen=True)
class Selection:
    """Which tokens of one micro-batch carry the loss, and how much; the result of ``Objective.select``."""

    is_key_R: Tensor
    """bool [R]: the key tokens."""
    by_signal: Mapping[str, Tensor] = field(default_factory=dict)
    """bool [R] by name of the signal: the tokens that each signal alone selects."""
    weight_R: Tensor | None = None
    """fp32 [R]: a constant factor of each token's whole weight in the loss; None: 1."""
    advantage_factor_R: Tensor | None = None
    """fp32 [R]: a constant factor of each token's advantage alone; None: 1."""
    kl_of_response: Tensor | None = None
    """fp64 [responses of the micro-batch]: the old policy's KL to the reference model, summed over each response; only
    where rewards contain it (``kl_in_reward``)."""
    metrics: Metrics = field(default_factory=Metrics)

    @classmethod
    def union(cls, by_signal: Mapping[str, Tensor]) -> Selection:
        """The tokens that any signal selects."""
        return cls(torch.stack(list(by_signal.values())).any(dim=0), by_signal)


@dataclass(frozen=True)
class TokenStreams:
    """What an objective hands to the loss; the policy consumes these without knowing the algorithm.

    loss = -sum_r weight_R[r] * (ratio_r * advantage_R[r] - kl_beta * k3_r)        GRPO; others: objectives/loss.py

    ``weight_R`` already contains mask, per-response denominator and the global denominator, so that summing
    the loss over micro-batches and data-parallel ranks gives the loss of the global batch.
    """

    advantage_R: Tensor
    """The advantage of each token; multiplied by the importance weight if a mismatch of sampler and trainer is
    corrected."""
    weight_R: Tensor
    """The weight of each token in the loss. It is 0 on every token that gets no gradient, whether key token or not."""
    is_key_token_R: Tensor
    """bool [R]: True on tokens that were chosen to carry the loss."""
    all_weight_R: Tensor | None = None
    """What ``weight_R`` would be if every token of the responses carried the loss, for terms that all tokens have. None
    where the loss has no such term."""
    is_selected_R: Mapping[str, Tensor] = field(default_factory=dict)
    """bool [R] by name of the signal: the tokens that the signal selected. How they make ``is_key_token_R`` together is
    the selection's matter (``attribution/combine.py``); normally it is their union."""
    response_R: Tensor | None = None
    """int64 [R]: index of each token's response in the micro-batch, on the device of the scores; read by losses that
    work by response."""
    num_responses: int = 0
    """The number of responses that ``response_R`` counts."""
    metrics: Metrics = field(default_factory=Metrics)
    """Numbers that the objective counted along the way; the loss passes them on."""

    def detach(self) -> TokenStreams:
        """These streams without the autograd graph that ``weight_R`` has if the objective differentiates weights."""
        return dataclasses.replace(self, weight_R=self.weight_R.detach())


@dataclass(frozen=True)
class ResponseSelection:
    """Which tokens of one response carried the loss, for logs and reports; each tuple has the response's length."""

    is_key_token: tuple[bool, ...]
    is_selected: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """The tokens that each signal selected, by name of the signal."""
    policy_logprobs: tuple[float, ...] = ()
