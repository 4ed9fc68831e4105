"""Finds out what a run would be and prints it; see the package."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_ktr.accounting.planner import GB
from megatron_ktr.config import Config, policy_gradient_rules
from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.pipeline_split import is_even, split_layers
from megatron_ktr.config.run_length import length_line, with_steps
from megatron_ktr.distributed import platform as platforms
from megatron_ktr.distributed.groups import ParallelSizes, world_size_from_environment
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import Objective
from megatron_ktr.rewards import DEFAULT_REWARDS
from megatron_ktr.run.directory import check_run_directory, check_same_run, list_checkpoints
from megatron_ktr.run.dry_run.data import KnownData, find_data
from megatron_ktr.run.dry_run.estimate import Estimate, estimate_run, require_fits
from megatron_ktr.run.dry_run.model import KnownModel, find_model, parameters_by_stage, plain_layers
from megatron_ktr.run.preflight import check_layout, check_micro_batches, check_objective, parallel_sizes

_WIDTH = 120
_HOURS, _DAYS = 3600, 24 * 3600


@dataclass
class _Page:
    """What is printed: paragraphs with a label, and what could not be checked."""

    paragraphs: list[tuple[str, str]] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def add(self, label: str, text: str) -> None:
        self.paragraphs.append((label, text))

    def lines(self) -> Iterator[str]:
        for label, text in self.paragraphs:
            yield from textwrap.wrap(
                text,
                width=_WIDTH,
                initial_indent=f"{label:<11}",
                subsequent_indent=" " * 11,
                break_long_words=False,
                break_on_hyphens=False,
            )


class KnownHeldOut(Protocol):
    """What is known of the held-out questions and responses: lines for the console, and what could not be checked."""

    @property
    def lines(self) -> Sequence[str]: ...

    @property
    def not_checked(self) -> Sequence[str]: ...


def dry_run(config: Config, *, find_held_out: Callable[[Config, KnownModel], KnownHeldOut]) -> str:
    """The text that ``--dry-run`` prints. Nothing is written, and no weight is read.

    Args:
        find_held_out: checks what the run is evaluated on.

    Raises:
        UserError: training would refuse the run, its layout does not fit the GPUs on paper, or this is one of several
            processes.
    """
    if world_size_from_environment() > 1:
        raise UserError("--dry-run is for one process: start it with python, not with torchrun")
    platform = platforms.start("cpu" if config.trainer.platform == "cpu" else "auto")
    page = _Page()
    check_run_directory(config)
    model = find_model(config.model.model)
    page.add("model", f"{_amount(model.config.num_parameters)} parameters; sizes: {model.origin}")
    page.not_checked += model.not_checked
    _check_resumed(config, model, page=page)
    sizes, num_gpus = _check_layout(config, model, platform=platform, page=page)
    _describe_layout(config, model, sizes=sizes, num_gpus=num_gpus, platform=platform, page=page)
    objective = check_objective(config)
    for line in policy_gradient_rules.notes(config):
        page.add("objective", line)
    estimate = estimate_run(config, model.config, sizes=sizes, num_gpus=num_gpus, objective=objective)
    _describe_memory(config, estimate, page=page)
    require_fits(estimate, config.trainer)
    data = find_data(config, model)
    page.not_checked += data.not_checked
    for line in data.lines:
        page.add("data", line)
    held_out = find_held_out(config, model)
    page.not_checked += held_out.not_checked
    _describe_evaluation(config, held_out.lines, page=page)
    _describe_length(config, data, estimate, page=page)
    _describe_step(config, objective, page=page)
    page.add("result", "this run is sound, as far as can be told here")
    for what in page.not_checked:
        page.add("unchecked", what)
    return "\n".join(page.lines())


def _check_resumed(config: Config, model: KnownModel, *, page: _Page) -> None:
    """Compares the options with those of the checkpoint that the run would go on from."""
    trainer = config.trainer
    found = list_checkpoints(Path(trainer.run_dir)) if trainer.resume or trainer.auto_resume else []
    if not found:
        return
    step, checkpoint = found[-1]
    if model.is_here:
        check_same_run(config, checkpoint)
    page.add("resume", f"from {checkpoint}, after step {step}")
    page.not_checked.append("whether the files of the checkpoint are intact (tools/checkpoint.py verify)")


def _check_layout(config: Config, model: KnownModel, *, platform: Platform, page: _Page) -> tuple[ParallelSizes, int]:
    """The parallel sizes and the number of GPUs, after training's own checks of them."""
    checked = config
    if platform.name == "cpu" and config.trainer.platform != "cpu":
        # Options that are refused on a machine without a GPU; the layout stays the same.
        objective = dataclasses.replace(config.objective, scoring_precision="same")
        checked = dataclasses.replace(config, model=plain_layers(config.model), objective=objective)
        page.not_checked.append(
            "what needs a GPU: Transformer Engine, kernels, FP8, the engine (tools/doctor.py looks at them there)"
        )
    sizes = parallel_sizes(config, num_layers=model.config.text.num_hidden_layers)
    num_gpus = config.trainer.dry_run_gpus or sizes.model
    try:
        check_layout(checked, model.config, world_size=num_gpus)
    except UserError as error:
        if num_gpus % sizes.model:
            raise UserError(f"--dry-run-gpus {num_gpus}: {error}") from error
        raise
    check_micro_batches(config, sizes=sizes, data_size=num_gpus // sizes.model)
    return sizes, num_gpus


def _describe_layout(
    config: Config, model: KnownModel, *, sizes: ParallelSizes, num_gpus: int, platform: Platform, page: _Page
) -> None:
    data_size = num_gpus // sizes.model
    chunks = f" in {sizes.virtual_pipeline} chunks" if (sizes.virtual_pipeline or 1) > 1 else ""
    words = [f"sequence parallel {'on' if sizes.sequence_parallel else 'off'}", f"{config.model.params_dtype}"]
    if config.parallel.recompute_granularity:
        words.append(f"recomputes {config.parallel.recompute_granularity}")
    gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    page.add(
        "layout",
        f"{gpus} = tensor {sizes.tensor} x pipeline {sizes.pipeline}{chunks} x context {sizes.context} x data "
        f"{data_size}; {', '.join(words)}",
    )
    if config.trainer.dry_run_gpus is None:
        page.add("", "one replica, because --dry-run-gpus does not say how many GPUs there are")
    numbers = parameters_by_stage(model.config, sizes=sizes, options=ModelOptions.of(config), platform=platform)
    of_stages = " of each pipeline stage" if len(numbers) > 1 else ""
    page.add("", f"built without values: {', '.join(map(_amount, numbers))} parameters on a GPU{of_stages}")
    prompts = config.trainer.prompts_per_replica(data_size)
    batches = -(-prompts // config.trainer.micro_batch_groups)
    page.add(
        "step",
        f"{config.trainer.prompts_per_step} prompts: {prompts} in {batches} micro-batches on each "
        f"replica, of which there {'is 1' if data_size == 1 else f'are {data_size}'}",
    )


def _describe_memory(config: Config, estimate: Estimate, *, page: _Page) -> None:
    request, memory = estimate.request, dataclasses.asdict(estimate.plan.memory)
    prompt = request.group.prompt_length(request.config)
    if prompt > config.data.max_prompt_length:
        page.add(
            "note",
            f"a video of {request.num_frames} frames at {request.pixels_per_frame} pixels makes a prompt of about "
            f"{prompt} tokens, and --max-prompt-length {config.data.max_prompt_length} skips it",
        )
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / GB:.1f}" for name, value in memory.items() if value >= GB / 20
    )
    limit = f"{config.trainer.dry_run_gpu_memory_gb:g} GB"
    page.add("memory", f"training {estimate.training_gb:.1f} of {limit} on the fullest GPU, on paper: {parts}")
    if estimate.training_gb < estimate.plan.memory_gb:
        page.add("", "what --offload-reference and --offload-optimizer-states keep on the host is taken off")
    if estimate.rollout_gb is not None:
        page.add("", f"rollout {estimate.rollout_gb:.1f} of {limit}, with {config.rollout.engine} awake")
    if not _is_even(config, estimate):
        page.add("", "the stages differ in layers, and the estimate takes them as equal")
    if config.model.lora_rank:
        page.add("", "what adapters themselves take, and their optimizer, is not in it")
    page.add(
        "",
        f"for videos of {request.num_frames} frames at {request.pixels_per_frame} pixels, {request.text_length} tokens "
        f"of text and {request.num_generations} x {request.response_length} tokens of response",
    )


def _is_even(config: Config, estimate: Estimate) -> bool:
    layout = estimate.plan.layout
    layers = estimate.request.config.text.num_hidden_layers
    return is_even(split_layers(layers, pipeline=layout.pipeline, virtual=layout.virtual, options=config.parallel))


def _describe_length(config: Config, data: KnownData, estimate: Estimate, *, page: _Page) -> None:
    seconds = estimate.plan.time.total
    machine = estimate.request.machine
    num_steps: int | None = None
    if config.trainer.train_epochs is None or data.num_records is not None:
        if line := length_line(config, num_records=data.num_records or 0):
            page.add("length", line)
        num_steps = with_steps(config, num_records=data.num_records or 0).trainer.train_steps
    if num_steps is not None:
        page.add("length", f"{num_steps} steps, {num_steps * config.trainer.prompts_per_step} prompts")
    else:
        page.add(
            "length",
            f"{config.trainer.train_epochs:g} epochs at {config.trainer.prompts_per_step} prompts a step: the number "
            "of steps is known once all files are there",
        )
    if not estimate.has_time:
        page.add("time", "not estimated: in fp32 it needs --peak-tflops, the peak of one GPU in that precision")
        return
    whole = f", {_duration(num_steps * seconds)} for {num_steps} steps" if num_steps is not None else ""
    if num_steps is None:
        per_thousand = 1000 / config.trainer.prompts_per_step * seconds
        whole = f", {_duration(per_thousand)} for each 1,000 records"
    on_top = " and without sampling the responses, which comes on top" if config.samples else ""
    page.add(
        "time",
        f"{seconds:.2f} s a step{whole}, on paper{on_top}: the longest videos and responses, "
        f"{machine.peak_tflops:g} TFLOP/s a GPU of which kernels reach "
        f"{machine.efficiency:.0%}, {machine.link_gb_per_second:g} GB/s inside a node of {machine.gpus_per_node} and "
        f"{machine.network_gb_per_second:g} between nodes",
    )


def _describe_evaluation(config: Config, lines: Sequence[str], *, page: _Page) -> None:
    if not config.evaluation.has_anything:
        return
    interval, at_start = config.trainer.eval_interval, config.evaluation.eval_at_start
    when = [*(["before the first step"] if at_start else []), *([f"every {interval} steps"] if interval else [])]
    by = f"by {config.rollout.engine}" if config.evaluates else "the loss of given responses"
    page.add("evaluation", f"{' and '.join(when)}, {by}; its time is not in the estimate")
    for line in lines:
        page.add("", line)
    if config.evaluation.keep_best:
        which = "lowest" if config.evaluation.keep_best in config.evaluation.loss_metrics else "highest"
        page.add("", f"the checkpoint of the {which} {config.evaluation.keep_best} is kept")


def _amount(number: int) -> str:
    return f"{number / 1e9:.3f} billion" if number >= 10**8 else f"{number:,}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * _DAYS:
        return f"{seconds / _DAYS:.1f} days"
    if seconds >= 2 * _HOURS:
        return f"{seconds / _HOURS:.1f} hours"
    return f"{seconds / 60:.1f} minutes"


def _describe_step(config: Config, objective: Objective, *, page: _Page) -> None:
    entry = objective_entry(config.objective.objective)
    words = [f"learning rate {config.optimizer.lr:g}, {config.optimizer.lr_decay_style}"]
    if objective.signals:
        mode = config.objective.selection_mode
        control = "" if mode == "signals" else f"control {mode}, of "
        words.append(f"{control}signals {', '.join(objective.signals)}")
    if objective.views:
        words.append(f"counterfactual views {_list(objective.views)}")
    words.append(f"KL weight {config.objective.kl_beta:g}" if objective.needs_reference else "no reference model")
    if config.model.freeze:
        words.append(f"frozen: {', '.join(config.model.freeze)}")
    if config.model.lora_rank:
        words.append(f"adapters of rank {config.model.lora_rank}")
    page.add("objective", f"{entry.title}; {'; '.join(words)}")
    for note in policy_gradient_rules.notes(config):
        page.add("objective", note)
    if entry.is_supervised:
        page.add("responses", "given by the data; nothing is sampled and nothing is rewarded")
        return
    rollout = config.rollout
    again = f" + {rollout.num_shuffled} to shuffled frames of a video" if rollout.num_shuffled else ""
    bonuses = {"temporal bonus": rollout.temporal_bonus, "length bonus": config.reward.length_bonus}
    paid = "".join(f"; {name} {bonus:g}" for name, bonus in bonuses.items() if bonus)
    if not config.samples:
        page.add("responses", f"{rollout.num_generations}{again} a prompt, recorded, with their rewards")
        return
    top = f"top-p {rollout.top_p:g}" + (f", top-k {rollout.top_k}" if rollout.top_k else "")
    page.add(
        "responses",
        f"{rollout.num_generations}{again} a prompt by {rollout.engine}, at most {rollout.max_response_length} tokens, "
        f"temperature {rollout.temperature:g}, {top}",
    )
    weights = config.reward.weights
    names = config.reward.reward_functions or DEFAULT_REWARDS
    rewards = _list(
        f"{weights[short]:g} x {name}" if (short := name.rpartition(":")[2]) in weights else name for name in names
    )
    page.add(
        "reward",
        f"{rewards}; answers read by the protocol {config.reward.answer_protocol}{paid}",
    )


def _list(names: Iterable[str]) -> str:
    return " + ".join(sorted(names) if isinstance(names, frozenset) else names)
