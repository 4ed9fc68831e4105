"""Finds the parallel layouts of a model that fit a number of GPUs, and estimates which are fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_ktr.accounting.flops import Flops, count_step
from megatron_ktr.accounting.layout import Layout, why_not
from megatron_ktr.accounting.links import Machine
from megatron_ktr.accounting.memory import BytesBeside, Memory, estimate_memory
from megatron_ktr.accounting.rollout_memory import RolloutMemory, estimate_rollout_memory, hf_engine_bytes
from megatron_ktr.accounting.rollout_work import RolloutWork, rollout_work
from megatron_ktr.accounting.save_memory import SaveMemory, estimate_save_memory
from megatron_ktr.accounting.saved import FUSED, Kernels
from megatron_ktr.accounting.timing import StepTime, estimate_time
from megatron_ktr.accounting.work import EACH_ONCE, GroupWork, Recompute, StepSettings, video_grid
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
CONTEXTS = (1, 2, 4, 8, 16)
PIXELS_PER_TOKEN = 28 * 28
GB = 1e9


@dataclass(frozen=True)
class Request:
    """A training step to place on GPUs. Every prompt has one video."""

    config: Qwen2_5_VLConfig
    num_gpus: int
    gpu_memory_gb: float
    """The memory of one GPU, in 10^9 bytes."""
    num_frames: int
    pixels_per_frame: int = 128 * PIXELS_PER_TOKEN
    text_length: int = 200
    response_length: int = 768
    num_generations: int = 8
    num_shuffled: int = 0
    """Responses to shuffled frames of every prompt, which are sampled and not trained on (``--temporal-responses``)."""
    prompts_per_step: int = 32
    micro_batch_groups: int = 1
    """Prompt groups of one micro-batch."""
    vision_cache_gb: float = 1.0
    """The bound of the cache of vision features, in 10^9 bytes (``--vision-cache-gb``)."""
    settings: StepSettings = EACH_ONCE
    machine: Machine = Machine()
    kernels: Kernels = FUSED
    vision_parallel: Literal["tensor", "frame"] = "tensor"
    engine: Literal["vllm_colocated", "hf"] = "vllm_colocated"
    engine_gb: float = 2.0
    """The memory that a colocated vLLM keeps while it sleeps."""
    engine_share: float = 0.5
    """The share of a GPU's memory that vLLM uses while it is awake (``--rollout-memory-share``)."""
    reserved_gb: float = 4.0
    """Device context, communication buffers, fragmentation."""

    @cached_property
    def group(self) -> GroupWork:
        tokens = max(1, self.pixels_per_frame // PIXELS_PER_TOKEN)
        grid = video_grid(self.num_frames, tokens_per_frame=tokens, vision=self.config.vision)
        return GroupWork(
            text_length=self.text_length,
            response_lengths=(self.response_length,) * self.num_generations,
            video_grids=(grid,),
        )

    @cached_property
    def useful_flops(self) -> float:
        """The operations of one prompt's group, without recomputation."""
        return count_step(self.config, [self.group], settings=self.settings).total

    def engine_bytes(self, layout: Layout, *, rank: int) -> tuple[float, float]:
        """The engine's bytes on pipeline rank ``rank`` while it is (asleep, awake)."""
        if self.engine == "vllm_colocated":
            return self.engine_gb * GB, self.engine_share * self.gpu_memory_gb * GB
        if rank > 0:
            return 0.0, 0.0
        num_prompts = self.prompts_per_step // layout.data
        found = hf_engine_bytes(
            self.config, self.group, num_prompts=num_prompts, num_shuffled=self.num_shuffled, kernels=self.kernels
        )
        return found.weights, found.weights + found.batch

    @property
    def rollout_work(self) -> tuple[RolloutWork, RolloutWork]:
        """The work of a step's rollout: that of the prompts, and that of the prompts with shuffled frames."""
        first, second = (
            rollout_work(self.config, self.group, num_prompts=self.prompts_per_step, num_responses=number)
            for number in (self.num_generations, self.num_shuffled)
        )
        return first, second

    @property
    def micro_batch(self) -> list[GroupWork]:
        return [self.group] * self.micro_batch_groups

    def num_micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a replica in one step."""
        return -(-self.prompts_per_step // (layout.data * self.micro_batch_groups))

    def settings_for(self, layout: Layout) -> StepSettings:
        return dataclasses.replace(self.settings, recompute=layout.recompute, recompute_vision=layout.recompute_vision)

    @cached_property
    def _counted(self) -> dict[StepSettings, Flops]:
        return {}

    def flops(self, settings: StepSettings) -> Flops:
        """The operations of one micro-batch."""
        if settings not in self._counted:
            self._counted[settings] = count_step(self.config, self.micro_batch, settings=settings)
        return self._counted[settings]


@dataclass(frozen=True)
class Plan:
    """One layout with its estimated memory and time."""

    layout: Layout
    memory: Memory
    """The memory of the fullest rank while it trains."""
    rollout: RolloutMemory
    """The memory of the fullest rank while its engine generates; a plan is listed even if this does not fit."""
    save: SaveMemory
    """The memory for saving on the rank that writes most."""
    time: StepTime
    flags: str
    """The layout as options of ``megatron_ktr.train``."""
    tflops_per_gpu: float
    """Operations without recomputation / step seconds / GPUs, in 10^12."""
    mfu: float

    @property
    def memory_gb(self) -> float:
        return self.memory.total / GB


def find_plans(request: Request) -> list[Plan]:
    """The layouts that fit, fastest first.

    Of several layouts with the same tensor, pipeline, context and data sizes, only the best one is returned.

    Raises:
        UserError: no layout fits; the message names the nearest.
    """
    sizes = [(memory_of(request, layout), layout) for layout in layouts(request)]
    if not sizes:
        raise UserError(_nothing_divides(request))
    fitting = [(memory, layout) for memory, layout in sizes if memory.total <= request.gpu_memory_gb * GB]
    if not fitting:
        raise UserError(_nothing_fits(request, *min(sizes, key=lambda size: size[0].total)))
    plans = [judge(request, layout, memory=memory) for memory, layout in fitting]
    best: dict[tuple[int, ...], Plan] = {}
    for plan in sorted(plans, key=lambda plan: (round(plan.time.total, 6), plan.memory.total)):
        layout = plan.layout
        best.setdefault((layout.tensor, layout.pipeline, layout.context, layout.data), plan)
    return list(best.values())


def layouts(request: Request) -> Iterator[Layout]:
    """Yields every layout that the trainer accepts for the request.

    Tensor-parallel groups stay inside a node, and micro-batches divide evenly among replicas.
    """
    config, num_gpus = request.config, request.num_gpus
    num_layers = config.text.num_hidden_layers
    vision_choices = (False,) if request.settings.is_vision_frozen else (False, True)
    for tensor in _divisors(request.machine.gpus_per_node):
        for pipeline in _divisors(num_layers):
            for context in CONTEXTS:
                model = tensor * pipeline * context
                if num_gpus % model or request.prompts_per_step % (num_gpus // model):
                    continue
                num_micro_batches = request.prompts_per_step // (num_gpus // model) // request.micro_batch_groups
                for virtual in _divisors(num_layers // pipeline):
                    if virtual > 1 and (pipeline == 1 or num_micro_batches % pipeline):
                        continue
                    for recompute, recompute_vision in itertools.product(RECOMPUTES, vision_choices):
                        layout = Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            data=num_gpus // model,
                            virtual=virtual,
                            sequence_parallel=tensor > 1,
                            recompute=recompute,
                            recompute_vision=recompute_vision,
                            vision_parallel=request.vision_parallel,
                        )
                        if why_not(config, layout) is None:
                            yield layout


def memory_of(request: Request, layout: Layout) -> Memory:
    """The memory of the fullest rank.

    That is the first pipeline rank, which has the encoder and the most micro-batches in flight, or the last, which has
    the head.
    """
    found = [
        estimate_memory(
            request.config,
            request.micro_batch,
            layout,
            rank=rank,
            num_micro_batches=request.num_micro_batches(layout),
            settings=request.settings_for(layout),
            kernels=request.kernels,
            beside=BytesBeside(
                vision_cache=request.vision_cache_gb * GB,
                engine=request.engine_bytes(layout, rank=rank)[0],
                reserved=request.reserved_gb * GB,
            ),
        )
        for rank in {0, layout.pipeline - 1}
    ]
    return max(found, key=lambda memory: memory.total)


def rollout_memory_of(request: Request, layout: Layout) -> RolloutMemory:
    """The memory of the fullest rank while a colocated engine is awake."""
    found = [
        estimate_rollout_memory(
            request.config,
            layout,
            rank=rank,
            settings=request.settings_for(layout),
            kernels=request.kernels,
            vision_cache_bytes=request.vision_cache_gb * GB,
            engine_bytes=request.engine_bytes(layout, rank=rank)[1],
            reserved_bytes=request.reserved_gb * GB,
        )
        for rank in {0, layout.pipeline - 1}
    ]
    return max(found, key=lambda memory: memory.peak)


def judge(request: Request, layout: Layout, *, memory: Memory | None = None) -> Plan:
    """Estimates memory and time of the whole step for one layout, and gives its command-line options."""
    settings = request.settings_for(layout)
    time = estimate_time(
        request.config,
        request.micro_batch,
        request.flops(settings),
        layout,
        num_micro_batches=request.num_micro_batches(layout),
        settings=settings,
        machine=request.machine,
        bytes_per_number=request.kernels.bytes_per_number,
    )
    useful = request.useful_flops * request.prompts_per_step
    tflops = useful / time.total / request.num_gpus / 1e12
    return Plan(
        layout=layout,
        memory=memory or memory_of(request, layout),
        rollout=rollout_memory_of(request, layout),
        save=max(
            (
                estimate_save_memory(request.config, layout, rank=rank, settings=settings, kernels=request.kernels)
                for rank in {0, layout.pipeline - 1}
            ),
            key=lambda save: save.host,
        ),
        time=time,
        flags=flags_of(request, layout),
        tflops_per_gpu=tflops,
        mfu=tflops / request.machine.peak_tflops,
    )


def flags_of(request: Request, layout: Layout) -> str:
    """The options of ``megatron_ktr.train`` for a layout and the request's sizes."""
    per_chunk = request.config.text.num_hidden_layers // layout.num_chunks
    prompt_length = request.group.prompt_length(request.config)
    flags = [
        f"--tensor-model-parallel-size {layout.tensor}",
        f"--pipeline-model-parallel-size {layout.pipeline}",
        f"--context-parallel-size {layout.context}" if layout.context > 1 else "",
        f"--num-layers-per-virtual-pipeline-stage {per_chunk}" if layout.virtual > 1 else "",
        "--sequence-parallel" if layout.sequence_parallel else "",
        "--vision-parallel frame" if layout.vision_parallel == "frame" else "",
        {
            "none": "",
            "selective": "--recompute-granularity selective",
            "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        }[layout.recompute],
        "--recompute-vision" if layout.recompute_vision else "",
        "--overlap-grad-reduce --overlap-param-gather" if layout.data * layout.context > 1 else "",
        {2: "--bf16", 4: ""}[request.kernels.bytes_per_number],
        f"--prompts-per-step {request.prompts_per_step} --micro-batch-groups {request.micro_batch_groups}",
        f"--num-generations {request.num_generations} --max-response-length {request.response_length}",
        f"--temporal-bonus 0.3 --temporal-responses {request.num_shuffled}" if request.num_shuffled else "",
        f"--video-max-frames {request.num_frames} --video-max-pixels {request.pixels_per_frame}",
        f"--max-prompt-length {prompt_length}" if prompt_length > 16384 else "",
        f"--freeze {','.join(sorted(request.settings.frozen))}" if request.settings.frozen else "",
        "" if request.settings.has_reference else "--kl-beta 0",
        "--fp8-format hybrid" if request.settings.trains_in_fp8 else "",
        "--fp8-param-gather" if request.settings.keeps_fp8_weights else "",
        "--fp8-vision" if request.settings.has_fp8_vision else "",
        "--scoring-precision fp8" if request.settings.scores_in_fp8 else "",
    ]
    return " ".join(flag for flag in flags if flag)


def _nothing_divides(request: Request) -> str:
    """The error message if no layout's sizes multiply to the number of GPUs; it names the nearest numbers that work."""

    def works(num_gpus: int) -> bool:
        return any(True for _ in layouts(dataclasses.replace(request, num_gpus=num_gpus)))

    near = _products(request)
    below = itertools.islice((n for n in reversed(near) if n < request.num_gpus and works(n)), 1)
    above = itertools.islice((n for n in near if n > request.num_gpus and works(n)), 1)
    return (
        f"no layout divides {request.num_gpus} GPUs: tensor (a divisor of {request.machine.gpus_per_node}) x pipeline "
        f"(a divisor of {request.config.text.num_hidden_layers} layers) x context x data, data a divisor of "
        f"--prompts-per-step {request.prompts_per_step}; nearest --gpus that work: "
        f"{' and '.join(map(str, [*below, *above])) or 'none'}"
    )


def _products(request: Request) -> list[int]:
    """The numbers of GPUs, up to twice those of the request, that sizes of some layout may multiply to, rising. Looking
    at these alone takes moments for any number of GPUs."""
    most = 2 * request.num_gpus
    layers = request.config.text.num_hidden_layers
    sizes = itertools.product(_divisors(request.machine.gpus_per_node), _divisors(layers), CONTEXTS)
    models = {math.prod(size) for size in sizes}
    products = {model * data for data in _divisors(request.prompts_per_step) for model in models}
    return sorted(number for number in products if number <= most)


def _nothing_fits(request: Request, memory: Memory, layout: Layout) -> str:
    needed = memory.total / GB
    hints = [f"--gpu-memory {math.ceil(10 * needed) / 10:.12g}"]
    more = next((n for n in _doubled(request.num_gpus) if _fits(dataclasses.replace(request, num_gpus=n))), None)
    if more:
        hints.append(f"--gpus {more}")
    frames = request.num_frames // 2 // 2 * 2
    while frames >= 2 and not _fits(dataclasses.replace(request, num_frames=frames)):
        frames = frames // 2 // 2 * 2
    if frames >= 2:
        hints.append(f"--frames {frames}")
    return (
        f"no layout fits {request.gpu_memory_gb:g} GB a GPU on {request.num_gpus} GPUs: the nearest (tensor "
        f"{layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}, recompute "
        f"{layout.recompute}) needs {needed:.1f} GB; it would fit with {' or '.join(hints)}"
    )


def _doubled(num_gpus: int) -> list[int]:
    return [num_gpus * 2**n for n in range(1, 7)]


def _fits(request: Request) -> bool:
    """Whether a layout fits that recomputes all it can and has no virtual stages: the others rarely need less, and to
    look at them too takes minutes."""
    recomputes_vision = not request.settings.is_vision_frozen
    return any(
        memory_of(request, layout).total <= request.gpu_memory_gb * GB
        for layout in layouts(request)
        if layout.virtual == 1 and layout.recompute == "full" and layout.recompute_vision == recomputes_vision
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
