"""Divides the operations of a real step by its time: the metrics ``tflops_per_gpu`` and ``mfu``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_ktr.accounting.flops import count_step
from megatron_ktr.accounting.work import GroupWork, StepSettings, view_costs
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.objectives.base import Objective
from megatron_ktr.types import RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

NOT_TRAINING = frozenset({"seconds/rollout", "seconds/weights", "seconds/offload"})


def settings_of(options: StepOptions, objective: Objective, *, key_share: float = 1.0) -> StepSettings:
    """The passes that a run's steps need. No work is done twice, and recomputation does not count."""
    section = options.objective
    is_measured = section.noise_every and objective.signals
    return StepSettings(
        views=view_costs(section, objective.views),
        noise_passes=noise_passes_of(objective) / section.noise_every if is_measured else 0.0,
        has_reference=objective.needs_reference,
        compares_reference=objective.needs_reference_kl,
        has_reference_kl_gradient=objective.needs_reference_kl_gradient,
        has_selection=objective.selects_before_update(section.num_updates),
        num_updates=section.updates_per_rollout,
        mini_batches=section.mini_batches,
        frozen=options.frozen,
        has_adapters=options.has_adapters,
        key_share=1.0 if objective.reaches_every_token else key_share,
        has_streamed_head=False,
    )


def noise_passes_of(objective: Objective) -> int:
    """The passes of one measurement of the noise (``step/noise.py``)."""
    return 3 if objective.needs_kl else 2


def step_rates(
    model_config: Qwen2_5_VLConfig,
    groups: Sequence[RolloutGroup],
    *,
    options: StepOptions,
    objective: Objective,
    seconds: Mapping[str, float],
    num_ranks: int,
    global_sum: Callable[[float], float],
    key_share: float = 1.0,
) -> dict[str, float]:
    """The metrics ``tflops_per_gpu`` and, if ``--peak-tflops`` is given, ``mfu``. Collective: every rank calls this.

    ``tflops_per_gpu`` is the operations of the step's passes / seconds of training / ranks; ``mfu`` is its share of
    ``--peak-tflops``. Only operations that the step needs count, not those that a layout repeats or recomputes. The
    seconds are those of all phases except sampling, offloading and handing weights to the sampler.

    ``groups`` are this replica's groups, and ``global_sum`` sums over replicas. ``key_share`` is the share of response
    tokens that have a gradient.
    """
    works = [GroupWork.of(group, config=model_config) for group in groups]
    flops = count_step(model_config, works, settings=settings_of(options, objective, key_share=key_share)).total
    duration = sum(value for name, value in seconds.items() if name not in NOT_TRAINING)
    rate = global_sum(flops) / max(duration, 1e-9) / num_ranks / 1e12
    peak = options.trainer.peak_tflops
    return {"tflops_per_gpu": rate} | ({"mfu": rate / peak} if peak else {})
