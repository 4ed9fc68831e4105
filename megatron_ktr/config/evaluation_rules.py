"""Rules between the options of evaluation during training and others. ``checks.py`` applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config.given import flag

if TYPE_CHECKING:
    from megatron_ktr.config import Config

LOWEST_TEMPERATURE_OF_VLLM, HIGHEST_TEMPERATURE_OF_VLLM = 0.01, 2.0  # rollout/vllm/sampling.py


def problems(config: Config) -> Iterator[str]:
    """One sentence for each rule that is broken."""
    section = config.evaluation
    is_asked = config.trainer.eval_interval > 0 or section.eval_at_start
    if is_asked and not section.has_anything:
        option = "--eval-interval" if config.trainer.eval_interval else "--eval-at-start"
        or_loss = ", or --eval-loss-data" if config.objective.is_supervised else ""
        yield f"{option} needs --eval-data or --eval-benchmark{or_loss}: what is to be asked?"
    if section.has_anything and not is_asked:
        given = {"--eval-data": section.eval_data, "--eval-benchmark": section.eval_benchmark}
        option = next((name for name, value in given.items() if value), "--eval-loss-data")
        yield f"{option} is not read without --eval-interval or --eval-at-start"
    yield from _what(config)
    if section.eval_loss_data:
        yield from _loss(config)
    if section.keep_best is not None and not config.trainer.eval_interval:
        yield "--keep-best needs --eval-interval: the best of evaluated steps is kept"
    elif section.keep_best is not None and not section.asks and section.keep_best not in section.loss_metrics:
        yield f"--keep-best {section.keep_best}: expected one of {', '.join(section.loss_metrics)}"
    if config.evaluates:
        yield from _engine(config)


def _what(config: Config) -> Iterator[str]:
    section = config.evaluation
    if section.eval_media_root is not None and not (section.eval_data or section.eval_loss_data):
        yield "--eval-media-root is the directory of the media of --eval-data, which is not given"
    if section.eval_benchmark_root is not None and not section.eval_benchmark:
        yield "--eval-benchmark-root is the directory of the benchmarks of --eval-benchmark, which is not given"
    if section.eval_max_items is not None and not section.has_anything:
        yield "--eval-max-items needs --eval-data or --eval-benchmark"
    for name in ("eval_frames", "eval_max_tokens", "eval_temperature"):
        if getattr(section, name) is not None and not section.asks:
            yield f"{flag(name)} needs --eval-data or --eval-benchmark"
    if section.eval_frames is not None and section.eval_frames % 2:
        yield f"--eval-frames must be even (two frames make one temporal patch), got {section.eval_frames}"
    names = section.set_names
    for name in dict.fromkeys(names):
        if not name:
            yield "--eval-benchmark: expected NAME or NAME=PATH, got nothing before the ="
        if names.count(name) > 1:
            yield (
                f"--eval-data, --eval-benchmark: two sets are called {name}, by which their metrics are told apart: "
                "rename a file"
            )


def _loss(config: Config) -> Iterator[str]:
    """The loss of given responses is measured by the policy itself, in a pass without gradient."""
    if not config.objective.is_supervised:
        yield (
            f"--eval-loss-data: --objective {config.objective.objective} does not learn given responses: choose "
            "--objective sft, or ask questions with --eval-data"
        )
    names = config.evaluation.loss_set_names
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"--eval-loss-data: two files are called {name}, by which their metrics are told apart: rename one"
    if config.model.fp8_format is not None and config.model.fp8_recipe == "delayed":
        yield (
            "--eval-loss-data does not go with --fp8-recipe delayed: the scales that training goes on with would "
            "follow the held-out records"
        )


def _engine(config: Config) -> Iterator[str]:
    """Evaluation needs an engine that has the policy's weights, and limits within which that engine is built."""
    rollout, section = config.rollout, config.evaluation
    if rollout.engine == "replay":
        if config.objective.is_supervised:
            yield (
                f"evaluation during --objective {config.objective.objective} needs an engine that answers: choose "
                "--engine hf, vllm_colocated or vllm_server; the loss of given responses (--eval-loss-data) needs none"
            )
        else:
            yield (
                "evaluation during training needs an engine that answers, and --engine replay has none: leave out "
                "--eval-interval and --eval-at-start, and use tools/evaluate.py on the export"
            )
        return
    is_vllm = rollout.engine.startswith("vllm")
    tokens, temperature = section.eval_max_tokens, section.eval_temperature
    if is_vllm and tokens is not None and tokens > rollout.max_response_length:
        yield (
            f"--eval-max-tokens {tokens} exceeds --max-response-length {rollout.max_response_length}, for which the "
            f"engine of --engine {rollout.engine} has room"
        )
    if is_vllm and temperature and not LOWEST_TEMPERATURE_OF_VLLM <= temperature <= HIGHEST_TEMPERATURE_OF_VLLM:
        yield (
            f"--eval-temperature {temperature:g}: vLLM samples at temperatures from {LOWEST_TEMPERATURE_OF_VLLM:g} to "
            f"{HIGHEST_TEMPERATURE_OF_VLLM:g}, or 0"
        )
    if rollout.engine == "vllm_server" and temperature and _is_raw(temperature) != _is_raw(rollout.temperature):
        yield (
            f"--eval-temperature {temperature:g} does not go with --temperature {rollout.temperature:g}: the servers "
            "have one --logprobs-mode for both; choose 0"
        )


def _is_raw(temperature: float) -> bool:
    """Whether servers give exact log-probs at this temperature with ``--logprobs-mode raw_logprobs``."""
    return temperature in (0.0, 1.0)
