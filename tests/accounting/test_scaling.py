"""Communication on paper against what ranks of a world of 256 would send."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.accounting.communication import rank_messages
from megatron_ktr.accounting.handover import moved_group_bytes, weight_transfer
from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.links import Machine, crossed, group_ranks
from megatron_ktr.accounting.parameters import chunk_parameters
from megatron_ktr.accounting.rows import share_rows
from megatron_ktr.accounting.work import GroupWork, StepSettings, view_costs
from megatron_ktr.config.objective_section import ObjectiveSection
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.patience import PATIENCE_SECONDS
from tests.support.simulated import Key, Simulation, simulate
from tests.support.tiny import save_tiny_hf

WORLD = 256
GROUP = GroupWork(text_length=9, response_lengths=(5, 11, 6, 3), video_grids=((4, 4, 8),))
"""Lengths that no size of a layout divides: padding and uneven shares are part of the comparison."""
GRAD_NORM = (1, 4)
"""One call, one fp32 number, over whatever ranks hold parts of the gradient."""


@dataclass(frozen=True)
class Case:
    layout: Layout
    num_micro_batches: int = 3
    values: dict[str, Any] = field(default_factory=dict)
    """Options beyond the layout's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The same for the formulas."""
    ranks: tuple[int, ...] = (0, 77, 255)


VIDEO_KTR: dict[str, Any] = {"objective": "video_ktr", "seed": 1}
"""A seed whose shuffles keep no two frames of a patch together: such a patch would not be encoded again, and the
formulas count the usual case."""
GRPO: dict[str, Any] = {"objective": "grpo"}
"""Every response token has a gradient, which decides what the head reduces without sequence parallelism."""
NO_VIEWS: dict[str, Any] = {"views": ()}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

CASES = {
    "tp8 pp4 dp8, sequence parallel, all views": Case(
        Layout(tensor=8, pipeline=4, data=8, sequence_parallel=True),
        values={**VIDEO_KTR, "shift": "kl", "num_shuffles": 2, "kl_kind": "full"},
        settings={
            "compares_distributions": True,
            "compares_reference": True,
            "has_reference_kl_gradient": True,
            "views": view_costs(ObjectiveSection(num_shuffles=2)),
        },
    ),
    "tp4 pp8 in two chunks, dp8": Case(
        Layout(tensor=4, pipeline=8, data=8, virtual=2),
        num_micro_batches=8,
        values={**GRPO, "num_layers_per_virtual_pipeline_stage": 1},
        settings=NO_VIEWS,
        ranks=(0, 77, 255),
    ),
    "tp8 cp4 pp2 dp4, sequence parallel, full recomputation, frames split": Case(
        Layout(
            tensor=8,
            context=4,
            pipeline=2,
            data=4,
            sequence_parallel=True,
            recompute="full",
            vision_parallel="frame",
        ),
        values={**VIDEO_KTR, **FULL, "vision_parallel": "frame"},
    ),
    "tp2 cp2 pp4 dp16, selective, keys gathered again, vision recomputed, all-reduced gradients": Case(
        Layout(
            tensor=2,
            context=2,
            pipeline=4,
            data=16,
            recompute="selective",
            recompute_vision=True,
            uses_distributed_optimizer=False,
        ),
        values={
            **GRPO,
            "attention_impl": "merged",
            "recompute_granularity": "selective",
            "recompute_vision": True,
            "use_distributed_optimizer": False,
            "optimizer": "sgd",
            "freeze": ["merger"],
        },
        settings={**NO_VIEWS, "frozen": frozenset({"merger"})},
        ranks=(2, 253),
    ),
    "tp8 dp32, frozen language, sequence parallel": Case(
        Layout(tensor=8, data=32, sequence_parallel=True),
        num_micro_batches=1,
        values={**GRPO, "freeze": ["language"], "kl_beta": 0.0},
        settings={**NO_VIEWS, "frozen": frozenset({"language"}), "has_reference": False},
        ranks=(13,),
    ),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_hf(
        directory, num_layers=16, hidden_size=128, num_heads=8, num_kv_heads=8, ffn_size=192, vision_num_heads=8,
        vision_depth=2, fullatt_block_indexes=(1,),
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process whose world may be a pretended one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def on_paper(case: Case, config: Qwen2_5_VLConfig, *, rank: int) -> dict[Key, tuple[float, float]]:
    layout = case.layout
    messages = rank_messages(
        config,
        [GROUP],
        layout,
        rank=rank,
        num_micro_batches=case.num_micro_batches,
        settings=StepSettings(recompute=layout.recompute, recompute_vision=layout.recompute_vision, **case.settings),
        bytes_per_number=4,
        regathers_keys=case.values.get("attention_impl") == "merged",
    )
    sums: dict[Key, tuple[float, float]] = {}
    for message in messages:
        key = (message.operation, group_ranks(layout, rank, message.group))
        calls, num_bytes = sums.get(key, (0, 0))
        sums[key] = (calls + message.calls, num_bytes + message.calls * message.num_bytes)
    return sums


@pytest.mark.parametrize("name", CASES)
def test_formulas_equal_what_a_rank_of_256_sends_to_the_byte(name, model_dir, apart):
    case = CASES[name]
    layout = case.layout
    assert layout.num_ranks == WORLD
    simulation = Simulation(
        hf_dir=model_dir,
        world_size=WORLD,
        sizes=dict(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            context=layout.context,
            sequence_parallel=layout.sequence_parallel,
            virtual_pipeline=layout.virtual if layout.virtual > 1 else None,
        ),
        values={"use_distributed_optimizer": True, "optimizer": "adam", "kl_beta": 0.04, **case.values},
        grid=GROUP.video_grids[0],
        text_length=GROUP.text_length,
        lengths=GROUP.response_lengths,
        num_micro_batches=case.num_micro_batches,
    )
    config = Qwen2_5_VLConfig.from_hf(model_dir)
    futures = {rank: apart.submit(simulate, simulation, rank=rank) for rank in case.ranks}
    for rank, future in futures.items():
        sent = {key: found for key, found in future.result(timeout=PATIENCE_SECONDS).items() if found != GRAD_NORM}
        assert sent == on_paper(case, config, rank=rank), f"rank {rank}"
        assert len(sent) > 2


# By hand


def test_rings_leave_a_node_once_for_all_of_its_ranks():
    """Layout tp4 cp2 dp4 pp2 on nodes of 8: a replica's stage fills a node."""
    layout = Layout(tensor=4, context=2, data=4, pipeline=2)
    assert group_ranks(layout, 13, "tensor") == (12, 13, 14, 15)
    assert group_ranks(layout, 13, "context") == (9, 13)
    assert group_ranks(layout, 13, "data_context") == (1, 5, 9, 13, 17, 21, 25, 29)
    assert group_ranks(layout, 13, "next") == (13, 45) and group_ranks(layout, 45, "next") == (45, 13)
    inside = crossed("all_reduce", 400.0, ranks=(12, 13, 14, 15), gpus_per_node=8)
    assert (inside.node, inside.network) == (2 * 3 / 4 * 400, 0)
    # Eight ranks, two in each of four nodes: every second edge of the ring leaves its node.
    wide = crossed("reduce_scatter", 800.0, ranks=group_ranks(layout, 13, "data_context"), gpus_per_node=8)
    assert (wide.node, wide.network) == (350.0, 350.0)
    assert crossed("send", 5.0, ranks=(13, 45), gpus_per_node=8).network == 5.0
    machine = Machine(link_gb_per_second=100, network_gb_per_second=10)
    assert wide.seconds(machine) == pytest.approx(350 / 10e9), "the slower link decides"


def test_rows_are_shared_out_as_the_trainer_does():
    from megatron_ktr.ops.context_shard import shard_layout
    from megatron_ktr.types import GroupSpan, PackedLayout

    config = PUBLISHED_CONFIGS["7B"]
    groups = [GROUP, GroupWork(text_length=70, response_lengths=(1, 40, 7))]
    for size, tensor in ((1, 1), (2, 1), (4, 4), (8, 2)):
        layout = Layout(tensor=tensor, context=size, sequence_parallel=tensor > 1)
        start, spans = 0, []
        for group in groups:
            span = GroupSpan(start, group.prompt_length(config), group.response_lengths)
            spans.append(span)
            start = span.end
        for rank in range(size):
            real = shard_layout(PackedLayout(tuple(spans)), size=size, rank=rank, multiple=tensor)
            rows = share_rows(config, groups, layout, context_rank=rank)
            assert (rows.on_context_rank, rows.on_tensor_rank) == (real.num_rows, real.num_rows // tensor)


@pytest.mark.parametrize("size", PUBLISHED_CONFIGS)
def test_parameters_one_by_one_are_those_of_the_rank(size):
    config = PUBLISHED_CONFIGS[size]
    for layout in (Layout(), Layout(tensor=4, pipeline=2), Layout(tensor=2, pipeline=4, vision_parallel="frame")):
        for rank in range(layout.pipeline):
            listed = chunk_parameters(config, layout, number=rank).trainable()
            assert sum(listed) == count_parameters(config, layout, rank=rank).total


def test_weights_and_moved_groups_are_as_large_as_what_they_hold():
    config = PUBLISHED_CONFIGS["7B"]
    found = weight_transfer(config, Layout(tensor=4, pipeline=2))
    # Vocabulary and encoder divide by 4: nothing is padded, and replicated norms are a ten-thousandth.
    assert found.servers == pytest.approx(2 * count_parameters(config, Layout(), rank=0).total, rel=1e-3)
    assert found.tensor * 4 > found.pipeline > 0
    assert weight_transfer(config, Layout()).pipeline == weight_transfer(config, Layout()).tensor == 0
    video = GroupWork(text_length=0, response_lengths=(), video_grids=((2, 4, 6),))
    assert moved_group_bytes(video, config) == 4 * 56 * 84 * 3 + 8 * 12
