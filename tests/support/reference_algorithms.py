"""The published policy gradients once more, written naively from their formulas: the tests' second opinion.

One response at a time, full logits, Python loops, no packing. Like ``reference_ktr.py`` it shares nothing with
``megatron_ktr``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.reference_ktr import ReferenceResponse, token_logprobs

Groups = Sequence[Sequence[ReferenceResponse]]


@dataclass(frozen=True)
class Algorithm:
    """The choices of one algorithm, in the words of its options."""

    advantage: str = "group"
    over: str = "responses"
    mean: str = "sequence"
    constant: int = 0
    counted: str = "key"
    ratio: str = "token"
    clip: tuple[float, float] = (0.2, 0.2)
    cap: float = 5.0
    dual: float = math.inf
    beta: float = 0.0
    kl: str = "k3"
    kl_in_reward: bool = False
    kl_on: str = "key"
    entropy_bonus: float = 0.0
    sampled_entropy: float = 0.0


def rollout_advantages(groups: Groups, a: Algorithm) -> list[list[float]]:
    """By group, of the whole rollout; ``intact`` are the logits of the policy that the step starts from."""
    rewards = []
    for group in groups:
        rewards.append([])
        for response in group:
            reward = response.reward
            if a.kl_in_reward:
                reward -= a.beta * sum(float(_kl(response, t, a.kl)) for t in range(len(response.token_ids)))
            rewards[-1].append(reward)
    if a.advantage == "group":
        return [
            [(r - _mean(of)) / (_std(of) + 1e-4) if max(of) - min(of) > 1e-6 else 0.0 for r in of] for of in rewards
        ]
    if a.advantage == "group_mean":
        return [[r - _mean(of) for r in of] for of in rewards]
    if a.advantage == "leave_one_out":
        return [[r - _mean(of[:i] + of[i + 1 :]) for i, r in enumerate(of)] for of in rewards]
    if a.advantage == "batch_baseline":
        rewards = [[r - _mean(of) for r in of] for of in rewards]
    counted = []
    for of, group in zip(rewards, groups, strict=True):
        for reward, response in zip(of, group, strict=True):
            counted += [reward] * (len(response.token_ids) if a.over == "tokens" else 1)
    return [[(r - _mean(counted)) / (_std(counted) + 1e-4) for r in of] for of in rewards]


def update_loss(
    groups: Groups, advantages: Sequence[Sequence[float]], masks: Sequence[Sequence[Tensor]], a: Algorithm
) -> Tensor:
    """The loss of one optimizer step on ``groups``, differentiable in their intact logits."""
    flat = [
        (response, advantage, mask)
        for group, of_group, keys in zip(groups, advantages, masks, strict=True)
        for response, advantage, mask in zip(group, of_group, keys, strict=True)
    ]
    num_key = sum(int(mask.sum()) for *_, mask in flat)
    num_all = sum(len(response.token_ids) for response, *_ in flat)
    loss = torch.zeros(())
    for response, advantage, mask in flat:
        key_weight = _weight(a, len(flat), int(mask.sum()), num_key)
        all_weight = _weight(a, len(flat), len(response.token_ids), num_all)
        if a.counted == "all":
            key_weight = all_weight
        gains = _gains(response, advantage, a)
        rows = torch.log_softmax(response.intact, dim=-1)
        for t, token in enumerate(response.token_ids):
            if mask[t]:
                loss = loss - key_weight * gains[t]
                loss = loss + key_weight * a.entropy_bonus * (rows[t].exp() * rows[t]).sum()
            if a.beta and not a.kl_in_reward and (mask[t] or a.kl_on == "all"):
                loss = loss + (key_weight if a.kl_on == "key" else all_weight) * a.beta * _kl(response, t, a.kl)
            loss = loss - all_weight * a.sampled_entropy * rows[t, token]
    return loss


def _weight(a: Algorithm, num_responses: int, num_own: int, num_tokens: int) -> float:
    if a.mean == "constant":
        return 1 / (num_responses * a.constant)
    if a.mean == "token":
        return 1 / num_tokens
    return 1 / (num_responses * max(num_own, 1))


def _gains(response: ReferenceResponse, advantage: float, a: Algorithm) -> list[Tensor]:
    logprobs = token_logprobs(response.intact, response.token_ids)
    old = logprobs.detach()
    if response.old_policy is not None:
        old = token_logprobs(response.old_policy, response.token_ids).detach()
    if a.ratio == "sequence":
        ratios = [torch.exp((logprobs - old).mean())] * len(logprobs)
    else:
        ratios = list(torch.exp(logprobs - old))
    gains = []
    for logprob, ratio in zip(logprobs, ratios, strict=True):
        if a.ratio == "cispo":
            gains.append(min(float(ratio), a.cap) * advantage * logprob)
        elif advantage > 0 and ratio > 1 + a.clip[1]:
            gains.append(torch.tensor((1 + a.clip[1]) * advantage))
        elif advantage < 0 and ratio < 1 - a.clip[0]:
            gains.append(torch.tensor((1 - a.clip[0]) * advantage))
        elif advantage < 0 and ratio > a.dual:
            gains.append(torch.tensor(a.dual * advantage))
        else:
            gains.append(ratio * advantage)
    return gains


def _kl(response: ReferenceResponse, t: int, kind: str) -> Tensor:
    p = torch.log_softmax(response.intact[t], dim=-1)
    q = torch.log_softmax(response.reference[t], dim=-1).detach()
    if kind == "full":
        return (p.exp() * (p - q)).sum()
    delta = p[response.token_ids[t]] - q[response.token_ids[t]]
    k2 = delta**2 / 2
    k3 = torch.exp(-delta) + delta - 1
    return {"k1": delta, "k2": k2, "k3": k3, "k3_plus": k2 + (k3 - k2).detach()}[kind]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    return math.sqrt(sum((value - _mean(values)) ** 2 for value in values) / (len(values) - 1))
