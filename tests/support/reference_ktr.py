"""Video-KTR and GRPO once more, written naively from the formulas: the tests' second opinion.

One response at a time, full logits, Python loops, no packing, no streams. It shares nothing with
``megatron_ktr``; give it logits of any model (Hugging Face's, say) in any precision and compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ReferenceResponse:
    """One response. Row t of every logits tensor [n, V] predicts token t (see ``predicting_logits``)."""

    token_ids: Sequence[int]
    intact: Tensor
    """May require grad: ``ReferenceUpdate.loss`` is differentiable through it."""
    hidden: Tensor | None = None
    """None: the prompt has nothing to hide."""
    shuffled: Tensor | None = None
    """None: the prompt has nothing to shuffle."""
    reference: Tensor | None = None
    old_policy: Tensor | None = None
    """Logits of the policy that a clipped ratio is taken against; None: one update per rollout."""
    reward: float = 0.0
    accuracy: float = 0.0


@dataclass
class ReferenceUpdate:
    """Indexed [group][response] throughout; scores and masks by signal."""

    loss: Tensor
    kl_mean: float
    """Over key tokens."""
    advantages: list[list[float]]
    scores: list[dict[str, list[Tensor]]] = field(default_factory=list)
    selected: list[dict[str, list[Tensor]]] = field(default_factory=list)
    key_tokens: list[list[Tensor]] = field(default_factory=list)


def predicting_logits(logits_LV: Tensor, *, prompt_length: int) -> Tensor:
    """From the logits of a whole sequence [prompt | response]: the rows that predict the response's tokens."""
    return logits_LV[prompt_length - 1 : -1]


def token_logprobs(logits: Tensor, token_ids: Sequence[int], *, temperature: float = 1.0) -> Tensor:
    rows = torch.log_softmax(logits / temperature, dim=-1)
    return torch.stack([rows[t, token] for t, token in enumerate(token_ids)])


def token_scores(
    response: ReferenceResponse, signal: str, *, shift: str = "signed", temperature: float = 1.0
) -> Tensor | None:
    """Scores [n] of one response, or None where the signal does not apply to its prompt."""
    with torch.no_grad():
        intact = torch.log_softmax(response.intact / temperature, dim=-1)
        if signal == "entropy":
            return torch.stack([-(row.exp() * row).sum() for row in intact])
        other_logits = {"visual": response.hidden, "temporal": response.shuffled}[signal]
        if other_logits is None:
            return None
        other = torch.log_softmax(other_logits / temperature, dim=-1)
        scores = []
        for t, token in enumerate(response.token_ids):
            difference = intact[t, token] - other[t, token]
            if shift == "absolute":
                difference = abs(difference)
            elif shift == "kl":
                difference = (intact[t].exp() * (intact[t] - other[t])).sum()
            scores.append(difference)
        return torch.stack(scores)


def select_in_group(
    scores: Sequence[Tensor | None], ratio: float, *, original_compat: bool = False
) -> list[Tensor] | None:
    """Masks of the G responses of one prompt; None where the signal does not apply."""
    if any(values is None for values in scores):
        return None
    pooled = torch.cat(list(scores))
    if (pooled == pooled[0]).all() and not original_compat:
        return [torch.zeros_like(values, dtype=torch.bool) for values in scores]
    threshold = torch.quantile(pooled, 1 - ratio)
    return [values >= threshold for values in scores]


def group_advantage(rewards: Sequence[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if max(rewards) - min(rewards) <= 1e-6:
        return [0.0 for _ in rewards]
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return [(reward - mean) / (variance**0.5 + 1e-4) for reward in rewards]


def reference_update(
    groups: Sequence[Sequence[ReferenceResponse]],
    *,
    signals: Sequence[str] = ("entropy", "visual", "temporal"),
    ratios: Mapping[str, float] | float = 0.2,
    shift: str = "signed",
    kl_beta: float = 0.04,
    clip: tuple[float, float] = (0.2, 0.2),
    temperature: float = 1.0,
    aggregation: str = "sequence",
    length_bonus: tuple[float, int, int] | None = None,
    original_compat: bool = False,
    masks: Sequence[Sequence[Tensor]] | None = None,
) -> ReferenceUpdate:
    """One update on all groups of the global batch. No ``signals``: GRPO. ``masks`` replaces the key tokens."""
    update = ReferenceUpdate(loss=torch.zeros(()), kl_mean=0.0, advantages=[])
    for index, group in enumerate(groups):
        scores, selected = {}, {}
        for signal in signals:
            scores[signal] = [token_scores(r, signal, shift=shift, temperature=temperature) for r in group]
            ratio = ratios if isinstance(ratios, float) else ratios[signal]
            found = select_in_group(scores[signal], ratio, original_compat=original_compat)
            # The original scores prompts without media with 0, all of them equal: it selects all.
            mark = original_compat and signal == "visual"
            selected[signal] = found or [torch.full((len(r.token_ids),), mark) for r in group]
        keys = []
        for i, response in enumerate(group):
            if masks is not None:
                keys.append(masks[index][i])
            elif not signals:
                keys.append(torch.ones(len(response.token_ids), dtype=torch.bool))
            else:
                keys.append(torch.stack([selected[signal][i] for signal in signals]).any(dim=0))
        rewards = []
        num_correct = sum(response.accuracy > 0.1 for response in group)
        for i, response in enumerate(group):
            length = int(keys[i].sum()) if original_compat else len(response.token_ids)
            reward = response.reward
            if length_bonus is not None and num_correct > 1 and response.accuracy > 0.1:
                bonus, shortest, longest = length_bonus
                reward += bonus if shortest <= length <= longest else 0.0
            rewards.append(reward)
        update.scores.append(scores)
        update.selected.append(selected)
        update.key_tokens.append(keys)
        update.advantages.append(group_advantage(rewards))
    _add_loss(update, groups, kl_beta, clip, temperature, aggregation, original_compat)
    return update


def _add_loss(
    update: ReferenceUpdate,
    groups: Sequence[Sequence[ReferenceResponse]],
    kl_beta: float,
    clip: tuple[float, float],
    temperature: float,
    aggregation: str,
    original_compat: bool,
) -> None:
    response_losses, all_terms, all_kl = [], [], []
    for group, keys, advantages in zip(groups, update.key_tokens, update.advantages, strict=True):
        for response, is_key, advantage in zip(group, keys, advantages, strict=True):
            logprobs = token_logprobs(response.intact, response.token_ids, temperature=temperature)
            old = logprobs.detach()
            if response.old_policy is not None:
                old = token_logprobs(response.old_policy, response.token_ids, temperature=temperature).detach()
            terms = []
            for t in range(len(response.token_ids)):
                if not is_key[t]:
                    continue
                ratio = torch.exp(logprobs[t] - old[t])
                gain = ratio * advantage
                if response.old_policy is not None:
                    lowest, highest = 1 - clip[0], 1 + clip[1]
                    # The pessimistic one of ratio and clipped ratio: a constant where the clip lowers the gain.
                    if advantage > 0 and ratio > highest:
                        gain = torch.tensor(highest * advantage)
                    elif advantage < 0 and ratio < lowest:
                        gain = torch.tensor(lowest * advantage)
                if kl_beta > 0:
                    reference = token_logprobs(response.reference, response.token_ids, temperature=temperature)
                    x = (reference[t].detach() - logprobs[t]).clamp(-10, 10)
                    kl = torch.exp(x) - x - 1
                    all_kl.append(float(kl.detach()))
                    gain = gain - kl_beta * kl
                terms.append(-gain)
            all_terms += terms
            zero = logprobs.sum() * 0
            if terms or original_compat:
                response_losses.append((zero + sum(terms)) / torch.tensor(float(len(terms))))
            else:
                response_losses.append(zero)
    if aggregation == "sequence":
        update.loss = sum(response_losses) / len(response_losses)
    else:
        anchor = sum(response_losses) * 0
        update.loss = (anchor + sum(all_terms)) / max(len(all_terms), 1)
    update.kl_mean = sum(all_kl) / max(len(all_kl), 1)
