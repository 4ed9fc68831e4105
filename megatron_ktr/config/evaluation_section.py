"""The options of evaluation during training. They are one section of ``sections.py``, whose docstring applies here too.

``trainer.eval_interval`` says how often; it stands with the other intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import MOST_FRAMES, MOST_SAMPLES, MOST_TOKENS, MOST_WEIGHT


@dataclass(frozen=True)
class EvaluationSection:
    """Held-out questions that the run's own engine answers between steps, and held-out responses of supervised runs
    (docs/evaluation.md); see eval_interval."""

    eval_data: tuple[str, ...] = _option(
        (), "Files of held-out questions, like those of data_path; the metrics of a/held_out.json are eval/held_out/..."
    )
    eval_loss_data: tuple[str, ...] = _option(
        (),
        "Supervised: files of held-out records with responses, like those of data_path; the mean loss of their tokens "
        "is the metric eval_loss, that of a/held_out.json eval/held_out/loss; needs no engine",
    )
    eval_media_root: str | None = _option(
        None, "Directory of the media of eval_data and eval_loss_data; none = the directory of each file"
    )
    eval_benchmark: tuple[str, ...] = _option(
        (), "Benchmarks, as NAME or NAME=PATH of its file or folder; their metrics are eval/NAME/..."
    )
    eval_benchmark_root: str | None = _option(
        None, "Directory in which eval_benchmark looks for benchmarks that are named without a path"
    )
    eval_at_start: bool = _option(
        False, "Evaluate the model before the first step of a new run too, as step 0 of the curve"
    )
    eval_frames: int | None = _option(
        None,
        "Most frames of one video in evaluation; even; none = video_num_frames, else video_max_frames",
        low=2,
        high=MOST_FRAMES,
    )
    eval_max_items: int | None = _option(
        None,
        "Questions or records of each file or benchmark, always the same ones, drawn at random; none = all",
        low=1,
        high=MOST_SAMPLES,
    )
    eval_max_tokens: int | None = _option(
        None, "Longest response in evaluation, in tokens; none = max_response_length", low=1, high=MOST_TOKENS
    )
    eval_temperature: float | None = _option(
        None,
        "Sampling temperature of evaluation, without top-p; 0 = the most likely tokens; none = as the benchmark says, "
        "which for files of one's own is 0.1 with top-p 0.001, as good as 0",
        low=0,
        high=MOST_WEIGHT,
    )
    keep_best: str | None = _option(
        None,
        "Metric of evaluation, such as eval/held_out/accuracy or eval_loss: the checkpoint in which it is highest (a "
        "loss: lowest) is saved, also where save_interval does not ask for it, and kept beside those of "
        "keep_checkpoints",
    )

    @property
    def asks(self) -> bool:
        """Whether there are questions to answer."""
        return bool(self.eval_data or self.eval_benchmark)

    @property
    def has_anything(self) -> bool:
        """Whether there is anything to evaluate on: questions to ask, or responses whose loss is measured."""
        return self.asks or bool(self.eval_loss_data)

    @property
    def set_names(self) -> tuple[str, ...]:
        """The names under which figures are logged: of files without their ending, and of benchmarks."""
        benchmarks = (text.partition("=")[0].strip() for text in self.eval_benchmark)
        return (*(Path(path).stem for path in self.eval_data), *benchmarks)

    @property
    def loss_metrics(self) -> tuple[str, ...]:
        """The metrics of ``eval_loss_data``, of which less is better."""
        of_sets = tuple(f"eval/{name}/loss" for name in self.loss_set_names)
        return ("eval_loss", *of_sets) if of_sets else ()

    @property
    def loss_set_names(self) -> tuple[str, ...]:
        """The names under which losses are logged. One may be that of a file whose questions are answered too."""
        return tuple(Path(path).stem for path in self.eval_loss_data)
