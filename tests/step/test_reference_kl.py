"""The KL to the reference model over the whole vocabulary inside whole training steps.

One step is compared with Hugging Face's full logits and the formula written naively; then every way of splitting the
model, and every way of keeping the reference model, must give that step.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.hf_updates import Models, gradients_of, score_responses, with_gradient
from tests.support.layouts import OVERLAPPED, SMALL, sizes_of
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.reference_ktr import ReferenceResponse, reference_update
from tests.support.steps import StepRecord, compare_steps, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

GROUPS = ("mixed", "text", "long video", "even")
BETA = 0.3
"""Large, so that the KL's part of the loss and of every gradient is not lost beside the advantages'."""
VALUES: dict[str, Any] = dict(objective="video_ktr", shift="kl", kl_kind="full", kl_beta=BETA, temperature=0.8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Models]:
    """Policy and another reference model, by whether input and output embeddings are tied."""
    found = {}
    for is_tied in (False, True):
        directories = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
        both = [
            save_tiny_hf(path, seed=seed, tie_word_embeddings=is_tied)
            for path, seed in zip(directories, (0, 7), strict=True)
        ]
        found[is_tied] = Models(*both, *directories, Qwen2_5_VLConfig.from_hf(directories[0]))
    return found


def _steps(
    ranks: ParallelGroups, *, models_dir: tuple[Path, Path | None], num_steps: int = 1, **options: Any
) -> list[StepRecord]:
    values = {**VALUES, **options.pop("values", {})}
    return run_steps(
        ranks,
        hf_dir=models_dir[0],
        reference_dir=models_dir[1],
        rollout_groups=example_groups(*GROUPS),
        values=values,
        num_steps=num_steps,
        **options,
    )


def _full_kl(response: ReferenceResponse, temperature: float) -> Tensor:
    p, q = (torch.log_softmax(logits / temperature, dim=-1) for logits in (response.intact, response.reference))
    return torch.stack([(p[t].exp() * (p[t] - q[t])).sum() for t in range(len(p))])


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_step_equals_the_formula_on_full_logits(
    models: dict[bool, Models], one_rank: ParallelGroups, is_tied: bool
) -> None:
    """loss = the policy gradient's + beta mean_i (1 / key tokens of i) sum over them of KL, at the temperature."""
    case = models[is_tied]
    (ours,) = _steps(one_rank, models_dir=(case.policy_dir, case.reference_dir), values=dict(lr=0.1))
    masks = [[torch.tensor(response) for response in ours.key_tokens[name]] for name in GROUPS]
    groups = example_groups(*GROUPS)
    responses = with_gradient(case.policy, case.config, groups, score_responses(case, groups))
    plain = reference_update(responses, masks=masks, kl_beta=0.0, temperature=0.8, shift="kl", ratios=0.3)
    terms, every, of_all_tokens = [], [], []
    for name, group, keys in zip(GROUPS, responses, masks, strict=True):
        kl_of_group = [_full_kl(response, 0.8) for response in group]
        # fp32 sums over 300 words in another order; log-probs agree to 1e-5 (``test_ktr_update_against_hf.py``).
        found_R = ours.scores[name]["reference_kl_R"]
        assert torch.allclose(found_R, torch.cat(kl_of_group).detach(), rtol=0, atol=2e-5)
        of_all_tokens += kl_of_group
        for kl, is_key in zip(kl_of_group, keys, strict=True):
            terms.append(kl[is_key].mean() if is_key.any() else kl.sum() * 0)
            every.append(kl[is_key])
    loss = plain.loss + BETA * torch.stack(terms).mean()
    (update,) = ours.updates
    assert update.loss == pytest.approx(loss.item(), abs=1e-5)
    assert ours.values["kl"] == pytest.approx(torch.cat(every).mean().item(), abs=1e-5)
    assert ours.values["kl_full"] == pytest.approx(torch.cat(of_all_tokens).mean().item(), abs=1e-5)
    assert BETA * torch.stack(terms).mean().item() > 0.01, "the term must weigh something"
    gradients = gradients_of(case.policy, loss)
    assert max_relative_difference(update.gradients, gradients) <= 1e-4  # as for plain log-probs; seen: 3e-6


def _alone(context: RankContext, **options: Any) -> list[StepRecord]:
    return _steps(context.init(ParallelSizes()), num_steps=2, **options)


@pytest.fixture(scope="module")
def expected(models: dict[bool, Models], ranks: RankPool) -> dict[bool, list[StepRecord]]:
    """Two steps of one rank."""
    return {
        is_tied: ranks(_alone, 1, models_dir=(case.policy_dir, case.reference_dir))[0]
        for is_tied, case in models.items()
    }


def _differences(context: RankContext, *, sizes: ParallelSizes, expected: list[StepRecord], **options: Any) -> Any:
    ours = _steps(context.init(sizes), num_steps=2, masks=[record.chosen for record in expected], **options)
    # Changes are compared relative to the weights, not to what the steps changed.
    zeros = {name: torch.zeros_like(weight) for name, weight in expected[0].weights.items()}
    return compare_steps(ours, expected, initial=zeros)


LAYOUTS: dict[str, tuple[int, ParallelSizes, dict[str, Any]]] = {
    "tp2, untied": (2, sizes_of(2), {}),
    "tp2 sp, two groups per micro-batch, tied": (2, sizes_of(2, sp=True), dict(micro_batch_groups=2)),
    "pp2, tied": (2, sizes_of(1, 2), {}),
    "dp2 distributed overlapped, tied": (2, ParallelSizes(), OVERLAPPED),
    "tp2 cp2 sp, tied": (4, sizes_of(2, cp=2, sp=True), {}),
    "tp2 pp2 vpp2, reference on the host, untied": (4, sizes_of(2, 2, vpp=2), dict(offload_reference=True)),
}
"""By name: ranks, sizes and options."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_the_same_in_every_layout(
    ranks: RankPool, models: dict[bool, Models], expected: dict[bool, list[StepRecord]], name: str
) -> None:
    """Two steps, so that the policy's output weight has moved away from where both models' started."""
    world_size, sizes, values = LAYOUTS[name]
    is_tied = name.endswith(", tied")
    case = models[is_tied]
    for found in ranks(
        _differences,
        world_size,
        sizes=sizes,
        expected=expected[is_tied],
        models_dir=(case.policy_dir, case.reference_dir),
        values=values,
        bucket_size=SMALL if values is OVERLAPPED else None,
    ):
        # The same fp32 sums in another order, as in ``test_head_in_training.py``.
        assert found.loss < 5e-6 and found.score < 1e-5, found
        assert found.gradient < 2e-5 and found.update < 1e-5 and found.value < 1e-4, found


def test_second_update_compares_the_policy_that_the_first_has_left(
    models: dict[bool, Models], one_rank: ParallelGroups
) -> None:
    """Two updates on one rollout give the KL that two steps on the same rollouts give; the reference's rows wait."""
    case = models[False]
    options: dict[str, Any] = dict(models_dir=(case.policy_dir, case.reference_dir))
    twice = dict(updates_per_rollout=2, clip_low=0.0, clip_high=0.0)
    (ours,) = _steps(one_rank, values=twice, **options)
    apart = _steps(one_rank, num_steps=2, masks=[ours.chosen] * 2, **options)
    assert ours.values["kl"] == pytest.approx(apart[1].values["kl"], rel=1e-5)
    assert abs(apart[1].values["kl"] - apart[0].values["kl"]) > 1e-3, "a stale KL would not be seen"


def test_kl_is_a_metric_without_being_part_of_the_loss(models: dict[bool, Models], one_rank: ParallelGroups) -> None:
    """The step is that of the same run without the metric, to the last bit; the KL is that of a loss with it."""
    options: dict[str, Any] = dict(models_dir=(models[False].policy_dir, models[False].reference_dir))
    plain = dict(kl_beta=0.0, kl_kind="k3")
    (without,), (with_metric,), (in_loss,) = (
        _steps(one_rank, values=values, **options) for values in (plain, {**plain, "measure_full_kl": True}, {})
    )
    assert with_metric.values["kl_full"] == in_loss.values["kl_full"] > 0.1
    assert "kl" not in with_metric.values and "kl_full" not in without.values
    (one,), (other,) = with_metric.updates, without.updates
    assert one.loss == other.loss
    assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in one.gradients.items())


def test_reference_without_adapters_equals_a_copy_of_the_base_model(
    models: dict[bool, Models], one_rank: ParallelGroups
) -> None:
    """With adapters the reference model's rows go through the policy's own output weight, which is frozen."""
    case = models[True]
    values = dict(lora_rank=2, lr=0.3)
    ours, copied = (
        _steps(one_rank, models_dir=(case.policy_dir, reference), num_steps=2, values=values)
        for reference in (None, case.policy_dir)
    )
    assert ours[0].values["kl"] == 0 and ours[1].values["kl"] > 1e-6
    for one, other in zip(ours, copied, strict=True):
        for record in (one, other):
            record.values.pop("vision_runs_per_prompt")  # a copy that may differ from the policy encodes by itself
        assert one.values == other.values
        (first,), (second,) = one.updates, other.updates
        assert all(torch.equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())


def test_everything_of_the_intact_view_comes_from_one_pass_over_the_vocabulary(
    models: dict[bool, Models], one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-prob, entropy, the KL to both views and the KL to the reference model; no other pass runs the head."""
    from megatron_ktr.ops import token_statistics_chunked

    implementation, compared = token_statistics_chunked.ChunkedTokenStatistics, []
    original = implementation.forward

    def forward(self, *args: Any) -> Tensor:
        compared.append([other.weight_VD is not None for other in args[-1]])
        return original(self, *args)

    monkeypatch.setattr(implementation, "forward", forward)
    _steps(one_rank, models_dir=(models[False].policy_dir, models[False].reference_dir))
    assert compared == [[False, False, True]] * len(GROUPS), "two views with the policy's weight, then the reference"


def test_an_offloaded_reference_brings_its_output_weight_alone_to_the_update(
    models: dict[bool, Models], one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies play the device's weights: how many are alive is noted in every pass of either model."""
    from megatron_ktr.policy import reference as reference_module
    from megatron_ktr.policy.offload import HostWeights
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.policy.roles import ModelRole

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    noted: dict[ModelRole, list[int]] = {role: [] for role in ModelRole}

    def to_device(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        alive.add(copied.untyped_storage())
        return copied

    def on(chunks: Any, *, platform: Any) -> HostWeights:
        return HostWeights(chunks, to_host=torch.clone, to_device=to_device)

    run = Policy._run

    def noting_run(policy: Any, *args: Any, model: ModelRole = ModelRole.POLICY, **options: Any) -> Any:
        noted[model].append(len(alive))
        return run(policy, *args, model=model, **options)

    models_dir = (models[True].policy_dir, models[True].reference_dir)
    (plain,) = _steps(one_rank, models_dir=models_dir)
    monkeypatch.setattr(HostWeights, "on", on)
    monkeypatch.setattr(reference_module, "moves", lambda platform: {"to_device": to_device})
    monkeypatch.setattr(Policy, "_run", noting_run)
    (ours,) = _steps(one_rank, models_dir=models_dir, values=dict(offload_reference=True))
    *in_scoring, in_update = noted[ModelRole.POLICY]
    assert set(in_scoring) == {0} and in_update == 1 and not alive
    assert len(noted[ModelRole.REFERENCE]) == 1 and noted[ModelRole.REFERENCE][0] > 10
    assert ours.values == plain.values
