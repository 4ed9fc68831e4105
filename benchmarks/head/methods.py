"""The ways to get log-probs and entropies of response tokens that ``run.py`` compares.

Each method is a function ``(hidden_RD, weight_VD, target_R) -> (logprob_R, entropy_R | None)``, differentiable in the
log-prob; the entropy is a score, without gradient. The weight is one shard of the vocabulary; joining shards is left
out for every method (a few floats a row), so that one process measures one rank of any tensor-parallel size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.ops.token_statistics_interface import HeadOptions, OtherRows

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Method:
    label: str
    run: Callable[[Tensor, Tensor, Tensor], Result]
    package: str | None = None
    """Must be installed, and runs on a GPU only."""


def _ours(impl: str) -> Callable[[Tensor, Tensor, Tensor], Result]:
    def run(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
        found = linear_token_statistics(hidden_RD, weight_VD, target_R, head=HeadOptions(impl=impl))
        return found.logprob_R, found.entropy_R.detach()

    return run


def _naive(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """The original's formula: product, log-softmax in fp32, gather; entropy from the same log-probs."""
    logprobs_RV = (hidden_RD @ weight_VD.t()).float().log_softmax(dim=-1)
    with torch.no_grad():
        entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(dim=-1)
    return logprobs_RV.gather(1, target_R[:, None]).squeeze(1), entropy_R


def _megatron(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """Megatron's vocabulary-parallel cross entropy, and an entropy that reads the same fp32 logits before it."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_RV = (hidden_RD @ weight_VD.t()).float()
    with torch.no_grad():
        # The cross entropy writes into its fp32 logits, so the entropy comes first, each shard by the usual trick.
        shifted_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
        exp_RV = shifted_RV.exp()
        sum_R = exp_RV.sum(dim=-1)
        entropy_R = sum_R.log() - (exp_RV * shifted_RV).sum(dim=-1) / sum_R
        del shifted_RV, exp_RV
    return -vocab_parallel_cross_entropy(logits_RV[:, None], target_R[:, None])[:, 0], entropy_R


def _liger(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """No entropy. Its forward already computes the gradients, of every row."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_RD, target_R), None


def _cut_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """No entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_RD, weight_VD, target_R, reduction="none"), None


def _k3(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """The reference's log-probs in a pass of their own, and k3 of the sampled tokens as a second term of the loss."""
    reference = linear_token_statistics(hidden_RD.detach().flip(0), weight_VD.detach(), target_R)
    found = linear_token_statistics(hidden_RD, weight_VD, target_R)
    x_R = (reference.logprob_R - found.logprob_R).clamp(-10, 10)
    return found.logprob_R + x_R.exp() - x_R - 1, found.entropy_R.detach()


def _full_kl(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Result:
    """The KL over the whole vocabulary as a second term of the loss.

    The reference's rows are the policy's in another order. Its weight is the policy's, but handed over as a weight of
    its own, which is then read and multiplied like one.
    """
    reference = OtherRows(hidden_RD.detach().flip(0), weight_VD.detach(), has_kl_gradient=True)
    found = linear_token_statistics(hidden_RD, weight_VD, target_R, reference=reference)
    assert found.reference_kl_R is not None
    return found.logprob_R + found.reference_kl_R, found.entropy_R.detach()


METHODS: dict[str, Method] = {
    "naive": Method("full logits", _naive),
    "megatron": Method("Megatron cross entropy + entropy", _megatron),
    "chunked": Method("this project, chunked", _ours("chunked")),
    "triton": Method("this project, Triton", _ours("triton"), package="triton"),
    "k3": Method("this project, k3 to a reference model", _k3),
    "full_kl": Method("this project, full KL to a reference model", _full_kl),
    "liger": Method("Liger fused linear cross entropy", _liger, package="liger_kernel"),
    "cut_cross_entropy": Method("cut-cross-entropy", _cut_cross_entropy, package="cut_cross_entropy"),
}


def why_not(name: str, *, is_gpu: bool) -> str | None:
    """Why a method cannot run here, or None."""
    package = METHODS[name].package
    if package is None:
        return None
    if not is_gpu:
        return "needs a GPU"
    return None if importlib.util.find_spec(package) else f"package {package} is not installed"
