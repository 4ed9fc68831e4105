"""Published sizes in the layouts of the examples: all ranks together hold exactly Hugging Face's parameters, once.

Models are built on the meta device, one pipeline stage after the other, in groups that only have sizes and ranks:
shapes are those of the run, nothing is allocated. Tensor ranks of one stage have the same shapes. What a shape means
comes from the table of names, and how many parameters there are from Hugging Face's own model
(``test_model_config.py`` holds ``num_parameters`` to it).
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.sections import ModelSection, ParallelSection
from megatron_ktr.distributed.groups import ParallelSizes
from models.qwen2_5_vl.conversion import named_model_parameters
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from models.qwen2_5_vl.weight_map import WeightSpec, weight_specs
from tests.support.layouts import sizes_of
from tests.support.paths import REPOSITORY

EXAMPLES = {
    "7B": "qwen2_5_vl_7b_8gpus.yaml",
    "32B": "qwen2_5_vl_32b_64gpus.yaml",
    "72B": "qwen2_5_vl_72b_256gpus.yaml",
}
FOLDER = REPOSITORY / "examples" / "launch"


@dataclass(frozen=True)
class Group:
    """What constructors ask of a process group."""

    num_ranks: int
    index: int = 0

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.index


@dataclass(frozen=True)
class Case:
    size: str
    sizes: ParallelSizes
    parallel: ParallelSection = field(default_factory=ParallelSection)
    impl: str = "local"


def example(size: str, impl: str) -> Case:
    values = yaml.safe_load((FOLDER / EXAMPLES[size]).read_text(encoding="utf-8"))["parallel"]
    parallel = ParallelSection(**values)
    layers = parallel.num_layers_per_virtual_pipeline_stage
    per_stage = PUBLISHED_CONFIGS[size].text.num_hidden_layers // parallel.pipeline_model_parallel_size
    sizes = ParallelSizes(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        virtual_pipeline=per_stage // layers if layers else None,
        sequence_parallel=parallel.sequence_parallel,
    )
    return Case(size, sizes, parallel, impl)


CASES = {
    **{f"{size} example, {impl}": example(size, impl) for size in EXAMPLES for impl in ("local", "te")},
    "3B": Case("3B", sizes_of()),
    "3B tp2 sp pp2, tied over stages, te": Case("3B", sizes_of(2, 2, sp=True), impl="te"),
    "7B tp4 pp2": Case("7B", sizes_of(4, 2)),
    "7B frames, vision counts as 8 layers": Case(
        "7B", sizes_of(2, 4), ParallelSection(vision_parallel="frame", account_for_vision_in_pipeline_split=8)
    ),
    "32B tp8 pads the vision MLP": Case("32B", sizes_of(8)),
}


def chunks_of_stage(case: Case, stage: int) -> list[Any]:
    """The model chunks of every tensor rank of a pipeline stage, on the meta device."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from models.qwen2_5_vl import model
    from tests.support.te_names import te_layers

    process_groups = ProcessGroupCollection()
    process_groups.tp, process_groups.pp = Group(case.sizes.tensor), Group(case.sizes.pipeline, stage)
    process_groups.cp = process_groups.embd = None
    groups = SimpleNamespace(sizes=case.sizes, process_groups=process_groups, context=None, alone=Group(1))
    transformer_config = model.language_transformer_config

    def on_the_host(*args: Any, **options: Any) -> Any:
        found = transformer_config(*args, **options)
        # core then leaves the device of new parameters to the surrounding context.
        found.use_cpu_initialization, found.perform_initialization = True, False
        return found

    config = Config(model=ModelSection(transformer_impl=case.impl), parallel=case.parallel)
    with ExitStack() as stack:
        stack.enter_context(te_layers())
        stack.enter_context(patch.object(model, "language_transformer_config", on_the_host))
        stack.enter_context(patch.object(model, "current", lambda: SimpleNamespace(device="meta")))
        # Where stages are uneven, a layer asks the process for its stage.
        stack.enter_context(patch.object(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", stage))
        stack.enter_context(torch.device("meta"))
        return model.build_model(
            PUBLISHED_CONFIGS[case.size], ranks=groups, options=ModelOptions.of(config), dtype=torch.bfloat16
        )


def held_numbers(spec: WeightSpec, shape: tuple[int, ...], tensor_size: int) -> Counter[str]:
    """How many numbers of each published tensor all tensor ranks hold together, copies counted once."""
    count = spec.num_shards(shape, tensor_size=tensor_size)
    axis, found = spec.concat_axis, Counter()
    per_row = math.prod(shape) // shape[axis]
    for index in range(count):
        for segment in spec.segments(shape, index=index, count=count):
            if segment.source is not None:
                found[spec.hf_names[segment.source]] += segment.length * per_row
    return found


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_hold_each_published_parameter_once(one_rank, name: str) -> None:
    case = CASES[name]
    config = PUBLISHED_CONFIGS[case.size]
    specs = {spec.name: spec for spec in weight_specs(config)}
    held: Counter[str] = Counter()
    num_copies = 0
    for stage in range(case.sizes.pipeline):
        for parameter_name, parameter in named_model_parameters(chunks_of_stage(case, stage)):
            assert parameter.is_meta and parameter.dtype == torch.bfloat16
            spec = specs[parameter_name]
            if spec.is_tied_copy:
                num_copies += 1
            else:
                held += held_numbers(spec, tuple(parameter.shape), case.sizes.tensor)
    published = {
        hf_name: math.prod(shape)
        for spec in specs.values()
        if not spec.is_tied_copy
        for hf_name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
    assert held == published
    assert sum(held.values()) == config.num_parameters
    assert num_copies == (config.tie_word_embeddings and case.sizes.pipeline > 1)
