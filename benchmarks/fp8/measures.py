"""What a precision does to attribution, as numbers: two runs over the same responses compared.

``Observed`` is what one precision found out: scores, key tokens, gradients. ``compare`` holds one against another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ktr.config.words import SIGNALS
from megatron_ktr.types import INTACT, Selection, TokenScores, View

VIEWS: tuple[View, ...] = (INTACT, "hidden", "shuffled")
LOST = 0.5
"""A row of a gradient whose relative error is at least this counts as lost; nearest rounding of normal numbers stays
below 0.07 in e4m3 and 0.13 in e5m2."""

Value = float | None
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Observed:
    """One precision on all micro-batches of the step, in order."""

    scores: Sequence[TokenScores]
    signal_scores: Sequence[Mapping[str, Tensor]]
    """By signal, fp32 [R], NaN where the signal does not apply."""
    chosen: Sequence[Mapping[str, Tensor]]
    """By signal, bool [R]."""
    gradients: Gradients
    """By parameter, with the key tokens that this precision chose."""
    gradients_same_tokens: Gradients = field(default_factory=dict)
    """By parameter, with the key tokens that fp32 chose."""
    token_gradients_RD: Tensor | None = None
    """[R, D] over all micro-batches: of the first language layer's input in the row that predicts the token, with the
    key tokens that fp32 chose."""
    row_errors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """By linear, of each micro-batch: relative error [T] that quantising leaves in the rows of its output's gradient;
    NaN where that is 0."""


def _logprob(scores: TokenScores, view: View) -> Tensor:
    return scores.policy_logprob_R if view == INTACT else scores.logprob_of_view[view]


def compare(found: Observed, reference: Observed) -> dict[str, Value]:
    """Changes of log-probs and scores in nats, agreement of key tokens, similarity of gradients.

    Agreement is tokens that both choose / tokens that either chooses (Jaccard); None where neither chooses any.
    """
    result: dict[str, Value] = {}
    for view in VIEWS:
        pairs = [(_logprob(one, view), _logprob(other, view)) for one, other in _pairs(found.scores, reference.scores)]
        result |= _change(f"logprob_error_{view}", pairs)
    for signal in SIGNALS:
        pairs = [(one[signal], other[signal]) for one, other in _pairs(found.signal_scores, reference.signal_scores)]
        result |= _change(f"score_change_{signal}", pairs)
        chosen = [(one[signal], other[signal]) for one, other in _pairs(found.chosen, reference.chosen)]
        result[f"agreement_{signal}"] = agreement(chosen)
    unions = [tuple(Selection.union(of).is_key_R for of in pair) for pair in _pairs(found.chosen, reference.chosen)]
    result["agreement_union"] = agreement(unions)
    result["gradient_cosine"] = cosine(found.gradients, reference.gradients)
    if found.gradients_same_tokens and reference.gradients_same_tokens:
        pair = found.gradients_same_tokens, reference.gradients_same_tokens
        result["gradient_cosine_same_tokens"] = cosine(*pair)
        result["gradient_norm_ratio_same_tokens"] = _norm_ratio(*pair)
    return result


def cosine_by_part(found: Observed, reference: Observed) -> dict[str, dict[str, Value]]:
    """Cosine of the gradients by part of the model (``part_of``)."""
    own, same = "own_tokens", "same_tokens"
    sides = {own: (found.gradients, reference.gradients)}
    if found.gradients_same_tokens and reference.gradients_same_tokens:
        sides[same] = (found.gradients_same_tokens, reference.gradients_same_tokens)
    parts = sorted({part_of(name) for name in reference.gradients})
    return {
        side: {part: cosine(*({n: g for n, g in one.items() if part_of(n) == part} for one in pair)) for part in parts}
        for side, pair in sides.items()
    }


def token_gradient_errors(found: Observed, reference: Observed, pull_R: Tensor) -> dict[str, Value]:
    """Relative error of each token's gradient at the bottom of the language model, for the tokens of the responses that
    are pulled most and least.

    Args:
        pull_R: |advantage| * weight of a key token of the token's response; 0 for tokens that are left out. Most and
            least: the upper and the lower quarter of the others.
    """
    assert found.token_gradients_RD is not None and reference.token_gradients_RD is not None
    truth_RD = reference.token_gradients_RD.float()
    norm_R = truth_RD.norm(dim=1)
    error_R = (found.token_gradients_RD.float() - truth_RD).norm(dim=1) / norm_R
    is_counted_R = (pull_R > 0) & (norm_R > 0)
    if not is_counted_R.any():
        return {}
    low, high = pull_R[is_counted_R].quantile(torch.tensor([0.25, 0.75]))
    result: dict[str, Value] = {}
    for name, is_part_R in {"small": pull_R <= low, "large": pull_R >= high}.items():
        errors = error_R[is_counted_R & is_part_R]
        result |= {
            f"token_gradient_error_{name}_median": float(errors.median()),
            f"token_gradient_error_{name}_p95": float(errors.quantile(0.95)),
            f"token_gradient_lost_{name}": float((errors >= LOST).float().mean()),
        }
    return result


def quantised_row_errors(found: Observed) -> dict[str, Value]:
    """The worst row, and the share of lost rows: over all linears, and in the last layer's fc2, where a row is still
    the gradient of its own token alone."""
    if not found.row_errors:
        return {}
    every = torch.cat([torch.cat(list(errors)) for errors in found.row_errors.values()])
    last = torch.cat(list(found.row_errors[max(name for name in found.row_errors if name.endswith("fc2"))]))
    result: dict[str, Value] = {}
    for name, errors in {"all_linears": every, "last_fc2": last}.items():
        errors = errors[~errors.isnan()]
        if len(errors):
            result[f"quantised_rows_worst_{name}"] = float(errors.max())
            result[f"quantised_rows_lost_{name}"] = float((errors >= LOST).float().mean())
    return result


def agreement(chosen: Sequence[tuple[Tensor, Tensor]]) -> Value:
    both = sum(int((one & other).sum()) for one, other in chosen)
    either = sum(int((one | other).sum()) for one, other in chosen)
    return both / either if either else None


def cosine(one: Gradients, other: Gradients) -> Value:
    """Of all tensors as one vector; None where a side is 0 or empty."""
    product = sum(float((one[name].double() * other[name].double()).sum()) for name in one if name in other)
    norms = _norm(one) * _norm(other)
    return product / norms if norms else None


def part_of(name: str) -> str:
    """The part of the model that a (bare) parameter name belongs to; layers as ``layer 0``."""
    pieces = name.split(".")
    if pieces[0] == "vision":
        return "vision"
    if "layers" in pieces:
        return f"layer {pieces[pieces.index('layers') + 1]}"
    return {"embedding": "embedding", "output_layer": "head"}.get(pieces[1], "final norm")


def _pairs(one: Sequence, other: Sequence) -> list[tuple]:
    return list(zip(one, other, strict=True))


def _change(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Value]:
    """Mean, median and largest |difference| where both are finite; a score that does not apply is NaN."""
    difference = torch.cat([(one.float() - other.float()).abs() for one, other in pairs])
    difference = difference[difference.isfinite()]
    if not len(difference):
        return {f"{name}_{kind}": None for kind in ("mean", "median", "max")}
    return {
        f"{name}_mean": float(difference.mean()),
        f"{name}_median": float(difference.median()),
        f"{name}_max": float(difference.max()),
    }


def _norm(gradients: Gradients) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5


def _norm_ratio(one: Gradients, other: Gradients) -> Value:
    return _norm(one) / _norm(other) if _norm(other) else None
