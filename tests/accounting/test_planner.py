"""The planner: time against hand calculation, layouts against the trainer's own rules."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_ktr.accounting.flops import count_step
from megatron_ktr.accounting.layout import Layout, count_parameters, why_not
from megatron_ktr.accounting.links import Machine
from megatron_ktr.accounting.pipeline import pipeline_seconds
from megatron_ktr.accounting.planner import GB, Request, find_plans, judge, layouts
from megatron_ktr.accounting.timing import estimate_time
from megatron_ktr.accounting.work import EACH_ONCE, GroupWork, StepSettings
from megatron_ktr.config import load_config
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.commands import run_tool
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import save_tiny_hf

CONFIG = PUBLISHED_CONFIGS["7B"]
TEXT_ONLY = GroupWork(text_length=2000, response_lengths=(500,) * 8)
POLICY_ONLY = StepSettings(views=(), has_reference=False)
FREE = Machine(link_gb_per_second=1e9, network_gb_per_second=1e9)
"""Messages cost nothing."""


def request(**changes: Any) -> Request:
    values = dict(config=CONFIG, num_gpus=8, gpu_memory_gb=80.0, num_frames=32)
    return Request(**{**values, **changes})


def seconds(
    layout: Layout, *, m: int = 8, machine: Machine = FREE, settings: StepSettings = POLICY_ONLY, config: Any = CONFIG
) -> Any:
    flops = count_step(config, [TEXT_ONLY], settings=settings)
    return estimate_time(
        config, [TEXT_ONLY], flops, layout, num_micro_batches=m, settings=settings, machine=machine
    ), flops


def test_pairs_of_tokens_of_responses_are_counted_by_hand():
    assert GroupWork(text_length=7, response_lengths=(3, 5)).num_response_pairs == 9 + 25


# Time


def test_one_gpu_takes_arithmetic_over_effective_peak():
    found, flops = seconds(Layout(), m=3, settings=EACH_ONCE)
    assert found.total == pytest.approx(3 * flops.total / (989e12 * 0.45))
    assert found.total == pytest.approx(found.compute), "nobody waits, nothing is sent"


def test_messages_take_their_bytes_over_the_bandwidth_they_cross():
    machine = Machine(link_gb_per_second=100, network_gb_per_second=10)
    text, rows = CONFIG.text, 2000 + 8 * 500
    sequence_parallel = seconds(Layout(tensor=4, sequence_parallel=True), m=1, machine=machine)[0]
    # Halves of an all-reduce, of all rows: 4 a layer forward, 6 backward (2 linear inputs are gathered again); 2 for
    # the embedding and 1 in its backward; 1 before the head and 1 in its backward. Four fp32 numbers a predicted token,
    # and once the norms' gradients.
    halves = 10 * text.num_hidden_layers + 2 + 1 + 1 + 1
    sent = halves * 3 / 4 * rows * text.hidden_size * 2
    sent += 3 / 4 * 4 * 4 * 8 * 500 * 4 + 2 * 3 / 4 * (2 * text.num_hidden_layers + 1) * text.hidden_size * 4
    assert sequence_parallel.tensor == pytest.approx(sent / 100e9)
    context = seconds(Layout(context=2), m=1, machine=machine)[0]
    # Responses go whole to either rank: half of the rows each. Gathered, gathered again, and scattered.
    keys_values = text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_size * rows * 2
    statistics = 2 * 3 * (4 * 500 + 4) * 4
    assert context.context == pytest.approx((3 * keys_values + statistics) / 2 / 100e9, rel=1e-5)
    wide = seconds(Layout(context=16), m=1, machine=machine)[0]
    assert wide.context > 1.1 * 3 * keys_values * 15 / 16 / 8 / 10e9, "8 responses on 16 ranks: half of them have rows"
    slow = Machine(network_gb_per_second=1e-3)
    data = seconds(Layout(data=16), m=1, machine=slow)[0]
    volume = count_parameters(CONFIG, Layout(), rank=0).total * 15 / 16
    assert data.data == pytest.approx(volume * (4 + 2) / 8 / 1e6, rel=1e-3), "one ring edge in 8 leaves the node"
    assert seconds(Layout(data=2), m=1)[0].data == 0, "hidden behind backward"


@pytest.mark.parametrize(("pipeline", "virtual", "m"), [(2, 1, 4), (4, 1, 8), (4, 1, 3), (2, 2, 8), (4, 7, 16)])
def test_equal_stages_wait_for_fill_and_drain_alone(pipeline, virtual, m):
    # A model whose stages are alike: no encoder, a head of no size.
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=1))
    layout = Layout(pipeline=pipeline, virtual=virtual)
    found, flops = seconds(layout, m=m, config=config)
    stage = flops.total / pipeline / (989e12 * 0.45)
    assert found.total == pytest.approx((m + (pipeline - 1) / virtual) * stage, rel=1e-3)
    assert found.bubble_fraction == pytest.approx((pipeline - 1) / (m * virtual + pipeline - 1), rel=1e-3)


def test_pipeline_waits_where_neighbours_are_not_done():
    def both_ways(times: list[float], m: int) -> float:
        layout = Layout(pipeline=len(times))
        forward, backward = ([share * t for t in times] for share in (1, 2))
        return pipeline_seconds(layout, num_micro_batches=m, forward=forward, backward=backward)

    # By hand, two stages, two micro-batches, forward 1 and 3, backward 2 and 6:
    # rank 0  F 0-1  F 1-2                B 10-12              B 19-21
    # rank 1         F 1-4  B 4-10                F 10-13  B 13-19
    assert both_ways([1.0, 3.0], 2) == 21.0
    # A slow first stage is never idle between its first and last backward.
    assert both_ways([3.0, 1.0], 2) == 3 + 3 + 6 + 6
    # Many micro-batches: the slowest stage's time each, whatever the others do.
    assert both_ways([1.0, 3.0, 2.0], 101) - both_ways([1.0, 3.0, 2.0], 100) == pytest.approx(9.0)
    # Without backward nothing but the first micro-batch waits.
    forward = pipeline_seconds(Layout(pipeline=3), num_micro_batches=5, forward=[1.0, 3.0, 2.0], backward=None)
    assert forward == 1 + 5 * 3 + 2


# Layouts


@pytest.mark.parametrize(("size", "num_gpus", "prompts"), [("3B", 8, 32), ("7B", 16, 32), ("72B", 256, 256)])
def test_every_layout_uses_all_gpus_and_keeps_the_trainers_rules(size, num_gpus, prompts):
    from megatron_ktr.distributed.groups import ParallelSizes, check_sizes
    from models.qwen2_5_vl.transformer_config import _check_layout

    config = PUBLISHED_CONFIGS[size]
    found = list(layouts(request(config=config, num_gpus=num_gpus, prompts_per_step=prompts)))
    assert len({(x.tensor, x.pipeline, x.context, x.data) for x in found}) > 5
    for layout in found:
        assert layout.num_ranks == num_gpus and prompts % layout.data == 0 and why_not(config, layout) is None
        sizes = ParallelSizes(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            sequence_parallel=layout.sequence_parallel,
            virtual_pipeline=layout.virtual if layout.virtual > 1 else None,
        )
        check_sizes(sizes, world_size=num_gpus)
        _check_layout(config, sizes, dtype=torch.bfloat16, options=None)
        if layout.virtual > 1:
            assert prompts // layout.data % layout.pipeline == 0


@pytest.mark.parametrize("changes", [dict(tensor=8), dict(pipeline=3), dict(pipeline=4, virtual=4), dict(virtual=2)])
def test_layouts_that_do_not_divide_the_model_are_named(changes):
    assert why_not(CONFIG, Layout(**changes)), "28 heads, 4 key/value heads and 28 layers"


def test_plans_fit_are_sorted_and_lose_nothing_faster():
    asked = request()
    plans = find_plans(asked)
    totals = [plan.time.total for plan in plans]
    assert totals == sorted(totals) and all(plan.memory_gb <= 80 for plan in plans)
    everything = [judge(asked, layout) for layout in layouts(asked)]
    fitting = [plan for plan in everything if plan.memory_gb <= 80]
    assert min(plan.time.total for plan in fitting) == pytest.approx(totals[0])
    assert len(everything) > len(fitting) > len(plans) > 3
    plan = plans[0]
    useful = asked.useful_flops * asked.prompts_per_step / 1e12
    assert plan.mfu == pytest.approx(useful / plan.time.total / 8 / 989) and 0.1 < plan.mfu < 0.45
    assert plan.memory.engine + plan.memory.reserved == 6 * GB


def test_room_for_an_engine_is_counted_by_hand():
    layout = Layout(tensor=2, data=4, sequence_parallel=True)
    found = judge(request(engine_share=0.25), layout).rollout
    numbers = count_parameters(CONFIG, layout, rank=0).total
    assert found.gradients == 4 * numbers, "whole on every rank, in fp32"
    assert found.optimizer == 12 * numbers / 4, "main weights and two moments, over 4 replicas"
    assert found.peak_with_offload == 2 * 2 * numbers + 4 * GB + 0.25 * 80 * GB, "weights, reference, reserved, engine"
    assert found.peak == found.peak_with_offload + found.gradients + found.optimizer
    frozen = dataclasses.replace(EACH_ONCE, frozen=frozenset({"vision", "merger"}), has_reference=False)
    less = judge(request(engine_share=0.25, settings=frozen), layout).rollout
    encoder = count_parameters(CONFIG, layout, rank=0)
    assert less.gradients == 4 * (numbers - encoder.vision - encoder.merger)
    assert less.peak_with_offload == 2 * numbers + 5 * GB + 0.25 * 80 * GB, "no reference; features stay over steps"


def test_quantised_weights_that_transformer_engine_keeps_are_counted_by_hand():
    layout = Layout(tensor=2, data=4, sequence_parallel=True)
    # Queries, keys and values; projection; gate, up and down. 28 layers on two tensor ranks.
    weights = 28 * 3584 * ((3584 + 2 * 512) + 3584 + 3 * 18944) // 2
    encoder = 32 * 1280 * (4 * 1280 + 3 * 3420) // 2

    def caches(**settings: Any) -> float:
        changed = dataclasses.replace(EACH_ONCE, **settings)
        found = judge(request(settings=changed), layout)
        plain = judge(request(settings=dataclasses.replace(EACH_ONCE, has_reference=changed.has_reference)), layout)
        assert found.memory.total - plain.memory.total == found.memory.fp8_caches + found.memory.saving
        assert found.rollout.peak - plain.rollout.peak == found.memory.fp8_caches
        return found.memory.fp8_caches

    assert caches() == 0
    assert caches(trains_in_fp8=True) == 3 * weights, "the policy's and their transpose; the reference model's"
    assert caches(trains_in_fp8=True, has_reference=False) == 2 * weights
    assert caches(trains_in_fp8=True, has_fp8_vision=True) == 3 * (weights + encoder)
    assert caches(trains_in_fp8=True, keeps_fp8_weights=True) == 0, "the parameters are these weights"
    assert caches(scores_in_fp8=True) == weights, "no gradient, no transpose; the reference stays in 16 bits"
    kept = dataclasses.replace(EACH_ONCE, trains_in_fp8=True, keeps_fp8_weights=True, has_reference=False)
    full = judge(request(settings=kept), dataclasses.replace(layout, recompute="full", recompute_vision=True)).memory
    assert full.of_step + full.saving == 2 * weights, "saving makes them plain, which is more than a step's activations"


def test_a_plan_of_71_gb_does_not_pass_for_one_of_80_in_fp8():
    layout = Layout(tensor=2, context=2, data=2, sequence_parallel=True)

    def has(settings: StepSettings) -> bool:
        return any(found.layout == layout for found in find_plans(request(settings=settings)))

    in_fp8 = dataclasses.replace(EACH_ONCE, trains_in_fp8=True)
    assert 71 < judge(request(), layout).memory_gb < 72 and has(EACH_ONCE)
    assert 80 < judge(request(settings=in_fp8), layout).memory_gb < 82 and not has(in_fp8)


def test_a_save_copies_each_ranks_part_to_the_host():
    layout = Layout(tensor=2, data=4, sequence_parallel=True)
    parameters = count_parameters(CONFIG, layout, rank=0)
    frozen = dataclasses.replace(EACH_ONCE, frozen=frozenset({"vision", "merger"}))
    assert judge(request(), layout).save.host == (12 + 2) * parameters.total / 4
    encoder = parameters.vision + parameters.merger
    assert judge(request(settings=frozen), layout).save.host == (14 * parameters.total - 12 * encoder) / 4


def test_transformers_engine_is_a_whole_model_and_the_batch_that_it_generates():
    layout = Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True)
    plan = judge(request(engine="hf"), layout)
    weights = 2 * count_parameters(CONFIG, Layout(), rank=0).total
    assert plan.memory.engine == plan.rollout.engine - 128 * 2248 * (28 * 2 * 512 + 3 * 18944) * 2 == weights
    # 16 prompts a replica, 8 responses each; with long responses decoding is what takes most.
    plan = judge(request(engine="hf", response_length=20_000), layout)
    assert plan.rollout.engine == weights + 128 * (2248 + 20_000) * 28 * 2 * 512 * 2
    plan = judge(request(engine="hf", prompts_per_step=256, response_length=20_000), layout)
    assert plan.rollout.engine == weights + 256 * (2248 + 20_000) * 28 * 2 * 512 * 2, "256 responses at a time"
    plan = judge(request(engine="hf", num_shuffled=4, response_length=20_000), layout)
    assert plan.rollout.engine == weights + 192 * (2248 + 20_000) * 28 * 2 * 512 * 2, "16 x (8 + 4) fit into one batch"


def test_a_second_prompt_costs_its_tokens_and_one_more_run_of_the_encoder():
    first, second = request(num_shuffled=4).rollout_work
    assert (first.prompt_tokens, first.sampled_tokens) == (32 * 2248, 32 * 8 * 768)
    assert (second.prompt_tokens, second.sampled_tokens) == (32 * 2248, 32 * 4 * 768)
    frozen = StepSettings(frozen=frozenset({"vision", "merger"}), views=())
    run = count_step(CONFIG, [request().group], settings=frozen).of("policy_forward", parts=["vision"])
    assert first.encoder_flops == second.encoder_flops == pytest.approx(32 * run)
    _, nothing = request().rollout_work
    assert dataclasses.astuple(nothing) == (0, 0, 0.0)


# The command


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plan_parallelism.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def parse_as_training_flags(flags: str) -> None:
    """Refused for nothing but context parallelism, where that is not available."""
    argv = ["--model", "m", "--engine", "hf", "--data-path", "d.jsonl", *shlex.split(flags)]
    try:
        config = load_config(argv)
    except UserError as error:
        assert "--context-parallel-size" in str(error) and "not available" in str(error), error
        start = argv.index("--context-parallel-size")
        config = load_config(argv[:start] + argv[start + 2 :])
    assert config.trainer.prompts_per_replica(1) > 0


def test_json_holds_the_best_three_and_their_flags_start_a_training():
    done = plan(
        *"--model 72b --gpus 256 --gpu-memory 80 --frames 128 --pixels-per-frame 200704".split(),
        *"--prompts-per-step 256 --freeze vision,merger --no-reference --json".split(),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["layouts"]
    assert len(found) == 3 and len(done.stdout.splitlines()) == 1
    assert [layout["step_seconds"] for layout in found] == sorted(layout["step_seconds"] for layout in found)
    for layout in found:
        parse_as_training_flags(layout["flags"])
        assert 0 < layout["memory_gb_per_gpu"] <= 80 and 0 <= layout["bubble_fraction"] < 1
        assert sum(layout["memory_gb_by_part"].values()) == pytest.approx(layout["memory_gb_per_gpu"], abs=0.01)
        assert sum(layout["seconds_by_part"].values()) == pytest.approx(layout["step_seconds"], abs=0.01)
        room = layout["rollout_memory_gb_per_gpu"] - layout["offloaded_rollout_memory_gb_per_gpu"]
        freed = layout["memory_gb_by_part"]["gradients"] + layout["offload_gb_each_way"]
        assert room == pytest.approx(freed, abs=0.01)
        assert "--freeze merger,vision" in layout["flags"] and "--kl-beta 0" in layout["flags"]


def test_all_flags_of_all_layouts_parse():
    for found in find_plans(request(num_gpus=16, num_frames=64, pixels_per_frame=256 * 784)):
        parse_as_training_flags(found.flags)


def test_table_shows_parts_and_flags(tmp_path):
    save_tiny_hf(tmp_path)
    sizes = "--gpus 2 --gpu-memory 16 --frames 8 --grpo --temporal-responses 4"
    done = run_tool("plan_parallelism", "--model", tmp_path, *sizes.split())
    assert done.returncode == 0, done.stderr
    for text in (
        "weigh",
        "optim",
        "activ",
        "bubble",
        "MFU",
        "--tensor-model-parallel-size",
        "512 visual",
        "with --offload-during-rollout",
        "for shuffled frames 22,784, 98,304 (33% of all)",
        "--temporal-bonus 0.3 --temporal-responses 4",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model 9b --gpus 8 --gpu-memory 80 --frames 32", "neither one of 3b, 7b, 32b, 72b"),
        ("--model 7b --gpus 8 --gpu-memory 80 --frames 31", "--frames: expected an even number"),
        ("--model 7b --gpus 0 --gpu-memory 80 --frames 32", "--gpus: expected a whole number from 1"),
        ("--model 7b --gpus 8 --gpu-memory 80 --frames 32 --freeze eyes", "--freeze takes"),
        ("--model 7b --gpus 8 --gpu-memory 80 --frames 32 --fp8 scoring --grpo", "--fp8 scoring does not go with"),
        ("--model 7b --gpus 8 --gpu-memory 80 --frames 32 --fp8-vision", "--fp8-vision needs --fp8 step"),
        ("--model 7b --gpus 11 --gpu-memory 80 --frames 32", "nearest --gpus that work: 8 and 14"),
        ("--model 7b --gpus 1048575 --gpu-memory 80 --frames 32", "nearest --gpus that work: 57344"),
        ("--model 7b --gpus 1 --gpu-memory 80 --frames 32", "--gpus 4"),
        ("--model 3b --gpus 1 --gpu-memory 80 --frames 768 --freeze vision,merger", "--frames"),
    ],
)
def test_impossible_requests_get_one_line_that_says_what_is_nearest(arguments, expected):
    done = run_tool("plan_parallelism", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
