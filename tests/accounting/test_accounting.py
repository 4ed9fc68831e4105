"""FLOPs and memory on paper against counters on real runs, brute force and published figures."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ktr.accounting.flops import (
    EXECUTED,
    AttentionCount,
    count_step,
    count_vision,
    language_pairs,
    window_pairs,
)
from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.memory import estimate_memory
from megatron_ktr.accounting.objective_costs import with_table
from megatron_ktr.accounting.pipeline import peak_in_flight, schedule
from megatron_ktr.accounting.rates import settings_of, step_rates
from megatron_ktr.accounting.saved import TORCH_CPU
from megatron_ktr.accounting.work import EACH_ONCE, ORIGINAL, GroupWork, StepSettings, video_grid, view_costs
from megatron_ktr.config import config_from_values
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.objectives import build_objective
from megatron_ktr.stack import has_core_0_19
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from models.qwen2_5_vl.vision_layout import plan_vision
from tests.support.accounting import Harness, LiveBytes, counted_flops, storage_bytes, video_group
from tests.support.paths import REPOSITORY
from tests.support.steps import DISTRIBUTED_SGD, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
FLOP_TOLERANCE = 0.002
"""The only product the model leaves out is that of rotary angles, 8 x 1 numbers a row; 2% is asked."""
MEMORY_TOLERANCE = 0.07
"""Unmodelled: statistics of norms, indices, buffers of messages; when exactly those are freed differs from run to run
by up to 2%. 10% is asked, the largest seen is 5.5% (interleaved stages), elsewhere 3.5%."""


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_hf(directory)
    return directory


# FLOPs on paper


@pytest.mark.parametrize(
    ("num_frames", "tokens_per_frame", "original", "once"),
    [(32, 128, 3.06, 0.89), (64, 128, 5.43, 1.17), (128, 256, 21.6, 3.05)],
)
def test_7b_prompt_group_costs_the_published_petaflops(num_frames, tokens_per_frame, original, once):
    config = PUBLISHED_CONFIGS["7B"]
    grid = video_grid(num_frames, tokens_per_frame=tokens_per_frame, vision=config.vision)
    group = GroupWork(text_length=200, response_lengths=(768,) * 8, video_grids=(grid,))
    recomputed = dataclasses.replace(EACH_ONCE, recompute="full")
    found = {
        name: count_step(config, [group], settings=settings).total / 1e15
        for name, settings in (("original", ORIGINAL), ("recomputed", recomputed), ("once", EACH_ONCE))
    }
    # Published with two or three digits and without the text's length; 200 tokens, as in our benchmarks, fits to 1.4%.
    assert found["original"] == pytest.approx(original, rel=0.015)
    assert found["recomputed"] == pytest.approx(once, rel=0.015)
    assert 1 - found["once"] / found["recomputed"] == pytest.approx(0.15, abs=0.01)


def test_language_pairs_equal_a_mask_drawn_row_by_row():
    prompt, lengths = 5, (3, 1, 4)
    rows = [("prompt", i) for i in range(prompt)] + [(r, i) for r, n in enumerate(lengths) for i in range(n)]
    pairs = {"prompt": 0, "response": 0}
    for a, (segment, i) in enumerate(rows):
        for other, j in rows[: a + 1]:
            if other == "prompt" or (other == segment and j <= i):
                pairs["prompt" if segment == "prompt" else "response"] += 1
    assert language_pairs(prompt, lengths, settings=EACH_ONCE) == (pairs["prompt"], pairs["response"])
    repeated = sum((prompt + n) * (prompt + n + 1) / 2 for n in lengths)
    assert sum(language_pairs(prompt, lengths, settings=ORIGINAL)) == repeated
    assert sum(language_pairs(prompt, lengths, settings=ORIGINAL, attention=EXECUTED)) == sum(
        (prompt + n) ** 2 for n in lengths
    )


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 18, 22), (2, 16, 32)])
def test_window_pairs_equal_the_encoders_own_segments(grid):
    vision = PUBLISHED_CONFIGS["7B"].vision
    lengths = plan_vision([grid], config=vision).window_bounds.long().diff()
    assert window_pairs(vision, grid) == int((lengths**2).sum())


def test_each_pass_costs_what_its_settings_say():
    config = PUBLISHED_CONFIGS["3B"]
    group = GroupWork(100, (50, 60), video_grids=((4, 8, 8),), image_grids=((1, 12, 12),))
    video, everything = (count_vision(config.vision, grids).total for grids in (group.video_grids, group.grids))
    frozen = frozenset({"vision", "merger"})

    def vision(**changes: Any) -> dict[str, float]:
        flops = count_step(config, [group], settings=dataclasses.replace(EACH_ONCE, **changes))
        return {name: flops.of(name, parts=("vision",)) for name in flops.by_pass()}

    def views(**options: Any) -> dict[str, Any]:
        return {"views": view_costs(ObjectiveSection(**options))}

    once = vision(**views(num_shuffles=3))
    assert once["policy_forward"] == once["reference"] == everything
    assert once["shuffled"] == 3 * video and once["hidden"] == 0
    assert vision(frozen=frozen)["reference"] == vision(frozen=frozen)["policy_backward"] == 0
    assert vision(**views(shuffle_unit="temporal_patch"))["shuffled"] == 0
    backwards = vision(**views(visual_view="patches", temporal_view="reversed", num_shuffles=3))
    assert backwards["patches"] == 3 * everything and backwards["reversed"] == video, "one order is the reverse"
    assert vision(**views(visual_view="other_video", num_shuffles=3))["other_video"] == everything
    assert vision(noise_passes=0.5)["noise"] == everything / 4, "two passes share one run of the encoder"
    assert vision(noise_passes=0.5, frozen=frozen)["noise"] == 0
    assert vision(has_vision_once=False, frozen=frozen)["reference"] == everything

    text_only = count_step(config, [GroupWork(100, (50,))]).by_pass()
    assert "hidden" not in text_only and "shuffled" not in text_only, "nothing to hide, nothing to shuffle"
    masked, plain = (
        count_step(config, [group], settings=dataclasses.replace(EACH_ONCE, views=v))
        for v in (ORIGINAL.views, EACH_ONCE.views)
    )
    rows = [flops.of("hidden", parts=("prompt",)) for flops in (masked, plain)]
    assert rows[0] / rows[1] == group.prompt_length(config) / group.text_length
    fused = AttentionCount(backward_products=5)
    part = ("attention_prompt",)
    assert count_step(config, [group], attention=fused).of("policy_backward", parts=part) == 2.5 * count_step(
        config, [group]
    ).of("policy_forward", parts=part)


def test_kl_to_the_reference_over_the_vocabulary_costs_a_product_in_every_intact_pass():
    """With two updates and a selection before them, three passes compare; the reference's own pass runs no head."""
    config = PUBLISHED_CONFIGS["7B"]
    group = GroupWork(100, (50, 60))
    logits = 2 * 3584 * 152064 * 110  # of all response rows
    settings = dataclasses.replace(EACH_ONCE, num_updates=2, has_selection=True, key_share=0.4)
    full = dataclasses.replace(settings, compares_reference=True, has_reference_kl_gradient=True)

    def head(settings: StepSettings) -> dict[str, float]:
        flops = count_step(config, [group], settings=settings)
        return {name: flops.of(name, parts=("head",)) / logits for name in flops.by_pass()}

    before, after = head(settings), head(full)
    assert (before["policy_forward"], before["selection"], before["reference"]) == (2, 1, 1)
    assert (after["policy_forward"], after["selection"], after["reference"]) == (4, 2, 0)
    assert after["policy_recompute"] == pytest.approx(2 * 2 * 0.4), "both models' logits of key rows, in each update"
    assert after["policy_backward"] == before["policy_backward"] == pytest.approx(2 * 2 * 0.4)
    assert head(dataclasses.replace(full, has_reference_kl_gradient=False))["policy_recompute"] == pytest.approx(0.8)

    sizes = [
        estimate_memory(config, [group], Layout(pipeline=2), rank=rank, num_micro_batches=5, settings=found)
        for rank in (0, 1)
        for found in (settings, full)
    ]
    rows = 5 * 110 * 3584 * 2  # of all micro-batches, in 16 bits
    assert sizes[1] == sizes[0], "the first stage has no hidden rows"
    assert sizes[3].head - sizes[2].head == rows
    assert sizes[3].working - sizes[2].working == pytest.approx(0.4 * rows / 5), "key rows of one, in backward"


# FLOPs of real runs


def test_scoring_passes_and_encoder_run_the_counted_operations(one_rank, hf_dir):
    groups = [video_group(), video_group(grid=(3, 6, 10), seed=1)]
    harness = Harness(one_rank, hf_dir=hf_dir, groups=groups)
    config = harness.policy.model_config
    works = [GroupWork.of(group, config=config) for group in groups]
    expected = count_step(config, works, attention=EXECUTED)
    for view, name in (("intact", "reference"), ("hidden", "hidden"), ("shuffled", "shuffled")):
        batches = harness.pack(view)
        with counted_flops() as counter:
            harness.policy.score(batches)
        assert counter.get_total_flops() == pytest.approx(expected.of(name), rel=FLOP_TOLERANCE), view
    (medium,) = groups[1].prompt.media
    patches_SD = harness.media.patchify(medium.frames_FCHW, medium)
    with counted_flops() as counter:
        harness.policy.bare_chunks[0].vision(patches_SD, torch.tensor([medium.grid_thw]))
    assert counter.get_total_flops() == count_vision(config.vision, works[1].grids).total


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(recompute_granularity="selective"),
        FULL,
        dict(recompute_vision=True),
        dict(freeze=("vision", "merger")),
        dict(freeze=("vision",)),
        dict(freeze=("language",)),
    ],
    ids=["plain", "selective", "full", "vision again", "vision frozen", "encoder frozen", "language frozen"],
)
def test_forward_and_backward_run_the_counted_operations(one_rank, hf_dir, values):
    groups = [video_group(), video_group(grid=(3, 6, 10), seed=1)]
    harness = Harness(one_rank, hf_dir=hf_dir, groups=groups, values=values)
    config = harness.policy.model_config
    settings = StepSettings(
        recompute=values.get("recompute_granularity", "none"),
        recompute_vision=values.get("recompute_vision", False),
        frozen=frozenset(values.get("freeze", ())),
    )
    expected = count_step(
        config, [GroupWork.of(group, config=config) for group in groups], settings=settings, attention=EXECUTED
    )
    items = harness.items()
    with counted_flops() as counter:
        harness.backward(items)
    policy = expected.of("policy_forward", "policy_backward", "policy_recompute")
    assert counter.get_total_flops() == pytest.approx(policy, rel=FLOP_TOLERANCE)


# Metrics


def test_rates_are_arithmetic_over_training_seconds_and_ranks():
    model_config = PUBLISHED_CONFIGS["3B"]
    config = config_from_values({"signals": ("entropy", "visual"), "peak_tflops": 2.0})
    objective = build_objective(config.objective, reward=config.reward)
    settings = settings_of(StepOptions.of(config), objective, key_share=0.5)
    assert [view.name for view in settings.views] == ["hidden"] and settings.has_reference
    groups = [video_group()]
    flops = count_step(model_config, [GroupWork.of(groups[0], config=model_config)], settings=settings).total
    found = step_rates(
        model_config,
        groups,
        options=StepOptions.of(config),
        objective=objective,
        seconds={"seconds/rollout": 100.0, "seconds/score": 1.0, "seconds/update": 3.0},
        num_ranks=8,
        global_sum=lambda value: 2 * value,
        key_share=0.5,
    )
    assert found["tflops_per_gpu"] == pytest.approx(2 * flops / 4 / 8 / 1e12)
    assert found["mfu"] == pytest.approx(found["tflops_per_gpu"] / 2.0)


def test_a_training_step_reports_its_rates(one_rank, hf_dir, monkeypatch):
    from megatron_ktr import trainer

    seen: list[dict[str, float]] = []
    rates = trainer.step_rates
    monkeypatch.setattr(trainer, "step_rates", lambda *a, **k: seen.append(rates(*a, **k)) or seen[-1])
    run_steps(one_rank, hf_dir=hf_dir, rollout_groups=example_groups("mixed", "image"), values={"peak_tflops": 1e-3})
    (found,) = seen
    assert 0 < found["mfu"] and found["mfu"] == pytest.approx(found["tflops_per_gpu"] / 1e-3)


# Layouts


def parameters_of_rank(context: Any, *, hf_dir: Path, sizes: Any) -> tuple[int, int, int]:
    from models.qwen2_5_vl.model import build_model

    groups = context.init(sizes)
    config = Qwen2_5_VLConfig.from_hf(hf_dir)
    chunks = build_model(config, ranks=groups)
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    layout = Layout(tensor=sizes.tensor, pipeline=sizes.pipeline)
    return held, count_parameters(config, layout, rank=groups.pipeline_rank).total, groups.pipeline_rank


@pytest.mark.parametrize("is_tied", [False, True])
def test_parameters_of_every_rank_are_counted_exactly(ranks, tmp_path, is_tied):
    from megatron_ktr.distributed.groups import ParallelSizes

    save_tiny_hf(tmp_path, tie_word_embeddings=is_tied)
    config = Qwen2_5_VLConfig.from_hf(tmp_path)
    assert count_parameters(config, Layout(), rank=0).total == config.num_parameters
    for sizes in (ParallelSizes(tensor=2), ParallelSizes(pipeline=4), ParallelSizes(tensor=2, pipeline=2)):
        for held, counted, rank in ranks(parameters_of_rank, hf_dir=tmp_path, sizes=sizes, world_size=sizes.model):
            assert held == counted, (sizes, rank)


def test_schedule_runs_every_micro_batch_once_and_keeps_what_megatron_keeps():
    plain = Layout(pipeline=4)
    for rank in range(4):
        steps = list(schedule(plain, rank=rank, num_micro_batches=8))
        assert steps.count(("F", 0)) == steps.count(("B", 0)) == 8
        peak = peak_in_flight(plain, rank=rank, num_micro_batches=8, saved_bytes=[1.0], extra_bytes=[0.5])
        assert peak == 4 - rank + 0.5
    interleaved = Layout(pipeline=2, virtual=2)
    # Table of megatron-core's documentation: chunks 0 0 1 1, 0 0 1 1; warm-up 2 (p - 1) + (v - 1) p = 4 on rank 0.
    order = [chunk for direction, chunk in schedule(interleaved, rank=0, num_micro_batches=4) if direction == "F"]
    assert order == [0, 0, 1, 1, 0, 0, 1, 1]
    steps = list(schedule(interleaved, rank=0, num_micro_batches=4))
    assert [direction for direction, _ in steps[:6]] == ["F"] * 5 + ["B"]
    assert steps[5] == ("B", 1), "the last chunk's backward comes first"


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (4, 1), (2, 2), (2, 3), (4, 2)])
def test_the_peak_of_many_micro_batches_is_that_of_the_whole_schedule(sizes):
    """The planner looks at a few rounds alone; here every operation is counted."""
    layout = Layout(pipeline=sizes[0], virtual=sizes[1])
    saved, extra, forward = [1.0, 0.75, 2.0], [0.5, 3.0, 0.25], [1.5, 0.5, 4.0]  # exact in binary: so are their sums
    for rank in range(layout.pipeline):
        for number in range(1, 41):
            if layout.virtual > 1 and number % layout.pipeline:
                continue  # megatron-core refuses these
            kept = peak = 0.0
            for direction, chunk in schedule(layout, rank=rank, num_micro_batches=number):
                peak = max(peak, kept + (forward if direction == "F" else extra)[chunk])
                kept += saved[chunk] if direction == "F" else -saved[chunk]
                peak = max(peak, kept)
            found = peak_in_flight(
                layout,
                rank=rank,
                num_micro_batches=number,
                saved_bytes=saved,
                extra_bytes=extra,
                forward_bytes=forward,
            )
            assert found == peak, (rank, number)


# Memory of real runs


def memory_of_rank(context: Any, *, hf_dir: Path, sizes: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Bytes that a rank really held, and the estimate."""
    from megatron.core.parallel_state import get_global_memory_buffer

    parallel = context.init(sizes)
    num_micro_batches = 4
    groups = [video_group(seed=i, grid=(4, 12, 16), lengths=(40, 52, 31)) for i in range(num_micro_batches)]
    harness = Harness(parallel, hf_dir=hf_dir, groups=groups, values=values)
    items = harness.items()
    harness.backward(items)
    harness.policy.optimizer.step()
    harness.policy.vision.after_step()  # no features from before
    get_global_memory_buffer().buffer.clear()  # or what sequence parallelism gathers into would not be seen
    gc.collect()
    parameters = [p for chunk in harness.policy.chunks for p in chunk.parameters()]
    main_grads = [p.main_grad for p in parameters if hasattr(p, "main_grad")]
    live = LiveBytes()
    live.ignore(*parameters, *main_grads)
    for item in items:
        live.ignore(*(value for value in vars(item.batch).values() if isinstance(value, torch.Tensor)))
    with live:
        harness.backward(items)
    kernels = dataclasses.replace(TORCH_CPU, bytes_per_number=parameters[0].element_size())
    estimate = estimate_memory(
        harness.policy.model_config,
        [GroupWork.of(groups[0], config=harness.policy.model_config)],
        Layout(
            tensor=sizes.tensor,
            pipeline=sizes.pipeline,
            data=parallel.data_size,
            virtual=sizes.virtual_pipeline or 1,
            sequence_parallel=sizes.sequence_parallel,
            recompute=values.get("recompute_granularity", "none"),
            mlp_chunks=values.get("mlp_chunks", 1),
            uses_distributed_optimizer=values.get("use_distributed_optimizer", False),
        ),
        rank=parallel.pipeline_rank,
        num_micro_batches=num_micro_batches,
        settings=StepSettings(
            has_reference=False,
            recompute_vision=values.get("recompute_vision", False),
            frozen=frozenset(values.get("freeze", ())),
        ),
        kernels=kernels,
    )
    return {
        "step": (live.peak, estimate.of_step),
        "weights": (storage_bytes(parameters), estimate.weights),
        "gradients": (storage_bytes(main_grads), estimate.gradients),
        "optimizer": (_optimizer_bytes(harness.policy.optimizer, parameters), estimate.optimizer),
    }


def _optimizer_bytes(optimizer: Any, parameters: list[torch.Tensor]) -> int:
    """Moments, and main parameters that are no views of the model's."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    moments = [t for part in parts for state in part.optimizer.state.values() for t in state.values()]
    mains = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
    held = [t for t in moments if isinstance(t, torch.Tensor) and t.numel() > 1]
    return storage_bytes(held + [p for p in mains if p.untyped_storage()._cdata not in own])


ADAM = dict(DISTRIBUTED_SGD)
BF16 = dict(ADAM, params_dtype="bf16")
MEMORY_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": ({}, ADAM),
    "selective recomputation": ({}, dict(ADAM, recompute_granularity="selective")),
    "full recomputation": ({}, dict(ADAM, **FULL)),
    "vision recomputed": ({}, dict(ADAM, recompute_vision=True)),
    "pp2, vision recomputed": (dict(pipeline=2), dict(ADAM, recompute_vision=True)),
    "vision frozen": ({}, dict(ADAM, freeze=("vision", "merger"))),
    "bf16": ({}, BF16),
    "tp2": (dict(tensor=2), ADAM),
    "tp2 sp": (dict(tensor=2, sequence_parallel=True), ADAM),
    "tp2 sp full recomputation": (dict(tensor=2, sequence_parallel=True), dict(ADAM, **FULL)),
    "pp2": (dict(pipeline=2), ADAM),
    "pp2 vpp2": (dict(pipeline=2, virtual_pipeline=2), dict(ADAM, num_layers_per_virtual_pipeline_stage=1)),
    "dp2": (dict(data=2), ADAM),
    "dp2, every replica all states": (
        dict(data=2),
        dict(use_distributed_optimizer=False, optimizer="adam", lr=1e-3),
    ),
    "tp2 pp2 sp bf16": (dict(tensor=2, pipeline=2, sequence_parallel=True), BF16),
}
if has_core_0_19():
    MEMORY_CASES["full recomputation, MLPs in 4 parts"] = ({}, dict(ADAM, mlp_chunks=4, **FULL))


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_estimated_memory_is_what_every_rank_holds(ranks, hf_dir, name):
    from megatron_ktr.distributed.groups import ParallelSizes

    sizes, values = MEMORY_CASES[name]
    num_replicas = sizes.get("data", 1)
    parallel = ParallelSizes(**{key: value for key, value in sizes.items() if key != "data"})
    results = ranks(
        memory_of_rank, hf_dir=hf_dir, sizes=parallel, values=values, world_size=parallel.model * num_replicas
    )
    for rank, found in enumerate(results):
        for part, (held, estimated) in found.items():
            # States are exact but for what buckets add to divide evenly, under 1% even of a tiny model.
            tolerance = MEMORY_TOLERANCE if part == "step" else 0.01
            assert estimated == pytest.approx(held, rel=tolerance), f"rank {rank}: {part}"


def test_memory_falls_with_every_means_against_it():
    config = PUBLISHED_CONFIGS["7B"]
    group = GroupWork(200, (768,) * 8, video_grids=(video_grid(64, tokens_per_frame=128, vision=config.vision),))

    def total(**changes: Any) -> SimpleNamespace:
        layout = Layout(**{"tensor": 2, "pipeline": 2, "data": 2, **changes})
        return estimate_memory(config, [group], layout, rank=0, num_micro_batches=8)

    plain = total()
    assert total(sequence_parallel=True).activations < plain.activations
    assert total(recompute="full").of_step < total(recompute="selective").of_step < plain.of_step
    in_parts = total(recompute="full", mlp_chunks=8)
    assert in_parts.activations == total(recompute="full").activations, "what is kept stays"
    assert in_parts.working < total(recompute="full").working
    assert total(context=2).activations < 0.6 * plain.activations
    assert total(data=8).optimizer == plain.optimizer / 4
    assert total(vision_parallel="frame", context=2).vision < total(context=2).vision
    assert total(virtual=7).activations > plain.activations, "interleaving keeps more micro-batches"


def test_the_table_of_objectives_is_what_the_accounting_says():
    page = (REPOSITORY / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert page == with_table(page), "run `make docs`"
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("nothing here")
