"""Writes the report of a training: one HTML file that contains everything and needs no network and no scripts.

    write_report([("Supervised fine-tuning", sft_dir), ("Video-KTR", ktr_dir)], out=Path("report.html"), summary=...)

The page has the headline numbers; for each run curves over steps and some recorded rollouts with frames and key tokens;
and the options. The same run directories give the same bytes, because the page has no times and no random ids.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.config import OPTIONS
from megatron_ktr.config.objective_registry import available_objectives, objective_entry
from megatron_ktr.config.words import SIGNALS
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.report.curves import NUM_STYLES, Series, line_chart, stacked_chart
from megatron_ktr.report.evaluation_curves import evaluation_charts
from megatron_ktr.report.frames import FrameReader
from megatron_ktr.report.incidents import incident_section
from megatron_ktr.report.markup import Html, element, format_number
from megatron_ktr.report.page import whole_page, write_page
from megatron_ktr.report.rollouts import Decode, group_section, legend, signal_styles
from megatron_ktr.report.run_data import RecordedGroup, RunData, choose_groups, read_run
from megatron_ktr.report.summary import summary_section

_log = logging.getLogger(__name__)

_LINE_CHARTS = (
    ("Reward", ("reward_mean", "reward/"), "mean over responses"),
    ("Reward by source", ("reward_mean/",), "mean over the responses to one file's questions"),
    ("Accuracy on shuffled frames", ("shuffled/accuracy",), "mean over responses, which are not trained on"),
    ("Rule of the temporal bonus", ("temporal_rule",), "share of the videos asked twice for which it holds"),
    ("Tokens sampled for shuffled frames", ("shuffled/token_share",), "share of all tokens sampled"),
    ("Time of rewards", ("reward_seconds/",), "seconds a step, of all replicas together"),
    ("Failed rewards", ("reward_timeouts/", "reward_errors/", "reward_skipped_groups"), "responses since the start"),
    ("Loss", ("loss",), ""),
    ("Share of key tokens", ("key_token_ratio", "key_token_ratio/"), "of all response tokens"),
    (
        "Agreement of signals",
        ("selection_overlap/",),
        "of the tokens that either of two signals selects, the share that both do",
    ),
    ("Dependence on what is seen", ("dependence",), "nats a token"),
    ("Noise of scores", ("noise_floor/",), "nats; 99% of the scores that rounding alone gives are below it"),
    ("Signal to noise", ("signal_to_noise/",), "mean size of a score / of what rounding alone gives"),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    ("Entropy", ("entropy",), "nats a token"),
    ("KL to the reference model", ("kl", "kl_full"), "nats a token"),
    ("Gap between sampler and trainer", ("sampler_trainer_logprob_gap",), "mean difference of log-probs"),
    ("Response length", ("response_length",), "tokens"),
    ("Finished responses", ("finished_share",), "share that ends before the length limit"),
    ("Groups of a step", ("filter/kept", "filter/rejected", "filter/surplus"), "trained on, rejected, not needed"),
    ("Refill rounds", ("filter/rounds",), "how often a step drew further prompts"),
    ("Tokens not trained on", ("filter/tokens_rejected", "filter/tokens_surplus"), "sampled for such groups"),
    ("Reward before the filter", ("filter/reward_mean",), "mean over responses, those of rejected groups too"),
    ("Retired records", ("retirement/retired",), "passed over in this epoch or the next"),
    ("Tokens a second", ("tokens_per_second",), ""),
    ("Waiting for data", ("data_wait_fraction",), "share of the step, of the replica that waits longest"),
    ("Slowest rank", ("ranks/slowest_behind_seconds",), "seconds by which it holds up the others"),
    ("Memory", ("ranks/device_memory_peak_gb", "ranks/host_memory_gb"), "10^9 bytes, of the rank that has most"),
    ("Learning rate", ("learning_rate",), ""),
)
"""Each chart as (title, metrics, note). A metric is a name; a name with "/" at its end means a family of metrics."""
_NOT_EVERY_STEP = ("noise_floor/", "signal_to_noise/")
"""Metrics that are measured every few steps only."""
_LABELS = {"reward_mean": "total", "key_token_ratio": "key tokens"}


@dataclass(frozen=True)
class StageReport:
    """The parts of one run that the page shows."""

    title: str
    run_dir: str
    num_steps: int
    num_groups: int
    num_responses: int
    num_frames: int
    notes: tuple[str, ...]
    """Notes on what could not be shown, and why."""


@dataclass(frozen=True)
class ReportWritten:
    """The file that was written, and its contents."""

    out: str
    num_bytes: int
    stages: tuple[StageReport, ...]


@dataclass(frozen=True)
class Most:
    """The limits of what a report shows."""

    groups: int = 4
    """Questions of a run, half of them from the first recorded step and half from the last."""
    frames: int = 16
    """The most pictures of a video."""


SHOWN_AT_MOST = Most()


def write_report(
    run_dirs: Sequence[tuple[str | None, Path | str]],
    *,
    out: Path | str,
    summary: Mapping[str, Any] | None = None,
    title: str = "Megatron-KTR report",
    notes: Sequence[str] = (),
    model: Path | str | None = None,
    media_root: Path | str | None = None,
    most: Most = SHOWN_AT_MOST,
) -> ReportWritten:
    """Writes the page. The file appears under its name only when it is complete.

    Args:
        run_dirs: (title, run directory) in the order of the page. A title None means that of the run's objective.
        summary: headline numbers, see ``summary.py``; None means no headline.
        notes: paragraphs below the title.
        model: Hugging Face directory whose tokenizer splits responses; None means the run's export, else its model.
        media_root: the directory below which media lie; None means where the run found them.
        most: the limits of questions and pictures.

    Raises:
        UserError: a directory is not a run directory or is damaged, an option does not fit, or ``out`` cannot be
            written.
    """
    if not run_dirs:
        raise UserError("--run-dir: expected at least one run directory")
    if most.groups < 0 or most.frames < 1:
        raise UserError(f"expected --max-groups >= 0 and --max-frames >= 1, got {most.groups} and {most.frames}")
    runs = [read_run(run_dir) for _, run_dir in run_dirs]
    titles = [name or _default_title(run) for (name, _), run in zip(run_dirs, runs, strict=True)]
    sections, stages = [], []
    for number, (name, run) in enumerate(zip(titles, runs, strict=True), start=1):
        section, stage = _stage(
            run,
            title=name,
            anchor=f"stage-{number}",
            groups=choose_groups(run, max_groups=most.groups),
            decode=_decoder(run, model=model),
            frames=FrameReader.of_run(run, media_root=Path(media_root) if media_root else None, max_frames=most.frames),
        )
        sections.append(section)
        stages.append(stage)
    links = [(f"stage-{number}", name) for number, name in enumerate(titles, start=1)]
    links = [("results", "Results"), *links] if summary is not None else links
    body = [
        element("header", element("h1", title), [element("p", note) for note in notes], _navigation(links)),
        element("main", summary_section(summary) if summary is not None else None, sections, _options(titles, runs)),
        element("footer", "Made by tools/report.py of Megatron-KTR. The page is complete in itself."),
    ]
    num_bytes = write_page(Path(out), whole_page(title, body))
    return ReportWritten(str(out), num_bytes, tuple(stages))


def _stage(
    run: RunData,
    *,
    title: str,
    anchor: str,
    groups: Sequence[RecordedGroup],
    decode: Decode | None,
    frames: FrameReader,
) -> tuple[Html, StageReport]:
    """The section of one run as HTML, and its contents."""
    notes = []
    if not run.trained.steps:
        notes.append("No step was logged yet.")
    if not run.rollout_files:
        notes.append("No rollouts were recorded (--rollout-log-interval).")
    if groups and decode is None:
        notes.append("No tokenizer was found (--model): responses are shown without marks on their tokens.")
    strips = [frames.strips_of(group.record) for group in groups]
    lost = sum(bool(strip.problem) for group_strips in strips for strip in group_strips)
    if lost:
        notes.append(f"{lost} of the media shown below cannot be read.")
    charts = _charts(run, anchor=anchor)
    responses = [response for group in groups for response in group.responses]
    styles = signal_styles(list(dict.fromkeys(name for response in responses for name in response.is_selected)))
    shown = [
        group_section(group, strips=group_strips, styles=styles, decode=decode, temporal=run.temporal_bonus)
        for group, group_strips in zip(groups, strips, strict=True)
    ]
    section = element(
        "section",
        element("h2", title),
        _facts(run),
        [element("p", note, class_="missing") for note in notes],
        incident_section(run),
        element("h3", "Curves") if charts else None,
        element("div", charts, class_="charts") if charts else None,
        [element("h3", "Some rollouts"), legend(styles), shown] if shown else None,
        id=anchor,
    )
    num_frames = sum(len(strip.pictures) for group_strips in strips for strip in group_strips)
    return section, StageReport(
        title=title,
        run_dir=str(run.path),
        num_steps=len(run.trained.steps),
        num_groups=len(groups),
        num_responses=len(responses),
        num_frames=num_frames,
        notes=tuple(notes),
    )


def _facts(run: RunData) -> Html:
    run = run.trained
    facts = [element("span", "run ", element("b", run.path.name or str(run.path)))]
    facts.append(element("span", "steps ", element("b", f"{len(run.steps):,}")))
    seconds = [values for name, values in run.metrics.items() if name.startswith("seconds/")]
    if seconds:
        total = math.fsum(value for values in seconds for value in values if math.isfinite(value))
        facts.append(element("span", "time in steps ", element("b", f"{format_number(total, digits=3)} s")))
    idle = sum(value == 0 for value in run.metrics.get("has_stepped", ()))
    if idle:
        facts.append(element("span", "steps without update ", element("b", f"{idle:,}")))
    refused = math.fsum(value for value in run.metrics.get("skipped_updates", ()) if math.isfinite(value))
    if refused:
        facts.append(element("span", "updates skipped ", element("b", format_number(refused))))
    for name, label in (
        ("num_skipped", "samples skipped "),
        ("substituted_media", "media replaced "),
    ):
        counted = [value for value in run.metrics.get(name, ()) if math.isfinite(value)]
        if counted and counted[-1]:
            facts.append(element("span", label, element("b", format_number(counted[-1]))))
    return element("p", facts, class_="stage-facts")


def _charts(run: RunData, *, anchor: str) -> list[Html]:
    charts = evaluation_charts(run)
    run = run.trained
    for title, wanted, note in _LINE_CHARTS:
        names = [name for want in wanted for name in run.metrics if name == want or _is_in_family(name, want)]
        series = [_series(name, run, index) for index, name in enumerate(names)]
        steps = run.steps
        if wanted[0] in _NOT_EVERY_STEP:
            steps, series = _where_measured(steps, series)
        if series and steps:
            charts.append(line_chart(title, steps, series, note=note))
    phases = [name for name in run.metrics if name.startswith("seconds/")]
    if phases and run.steps:
        parts = [
            Series(name.removeprefix("seconds/"), run.metrics[name], index % NUM_STYLES)
            for index, name in enumerate(phases)
        ]
        charts.append(
            stacked_chart("Seconds a step by phase", run.steps, parts, note="stacked", prefix=f"{anchor}-phase")
        )
    return charts


def _where_measured(steps: Sequence[int], series: Sequence[Series]) -> tuple[list[int], list[Series]]:
    """The steps that have a value of some series, and the series there."""
    places = [place for place in range(len(steps)) if any(math.isfinite(one.values[place]) for one in series)]
    kept = [dataclasses.replace(one, values=[one.values[place] for place in places]) for one in series]
    return [steps[place] for place in places], kept


def _is_in_family(name: str, wanted: str) -> bool:
    return wanted.endswith("/") and name.startswith(wanted)


def _series(name: str, run: RunData, index: int) -> Series:
    label = _LABELS.get(name, name.split("/", 1)[-1] if "/" in name else "value")
    dash = index % NUM_STYLES
    style = (index + 1) % NUM_STYLES
    if name.startswith(("key_token_ratio", "noise_floor", "signal_to_noise")):  # signals look as in the responses
        style = dash = SIGNALS.index(label) if label in SIGNALS else 3 + index % 3
    return Series(label.replace("_", " "), run.metrics[name], style, dash)


def _options(titles: Sequence[str], runs: Sequence[RunData]) -> Html | None:
    """A table of all options by section, with one column for each run. Values that are not the default are marked."""
    if not any(run.config for run in runs):
        return None
    defaults = _defaults()
    tables = []
    for section in dict.fromkeys(name for run in runs for name in run.config):
        names = dict.fromkeys(name for run in runs for name in run.config.get(section, {}))
        rows, num_changed = [], 0
        for name in names:
            cells = []
            for run in runs:
                value = run.option(section, name)
                is_changed = name in defaults.get(section, {}) and value != defaults[section][name]
                num_changed += is_changed and bool(run.config)
                text = _option_text(value) if run.config else "-"
                cells.append(
                    element("td", f"{text} *" if is_changed else text, class_="changed" if is_changed else None)
                )
            rows.append(element("tr", element("th", name, scope="row"), cells))
        head = element("tr", element("td"), [element("th", title, scope="col") for title in titles])
        table = element("table", element("thead", head), element("tbody", rows), class_="config")
        summary = element("summary", f"{section} ({len(names)} options, {num_changed} changed)")
        tables.append(element("details", summary, element("div", table, class_="scroll")))
    notes = [
        element("p", f"{title}: {note}", class_="note")
        for title, run in zip(titles, runs, strict=True)
        for note in run.notes
    ]
    notes.append(element("p", "Values that differ from the default have a star.", class_="note"))
    return element("section", element("h2", "Configuration"), notes, tables, id="configuration")


def _defaults() -> dict[str, dict[str, Any]]:
    """The default values by section and option, as in a run's config file."""
    found: dict[str, dict[str, Any]] = {}
    for name, option in OPTIONS.items():
        value = option.default
        found.setdefault(option.section, {})[name] = list(value) if isinstance(value, tuple) else value
    return found


def _option_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _default_title(run: RunData) -> str:
    """The title of the run's objective. If this version does not know the objective, it is the name of the folder."""
    objective = run.option("objective", "objective")
    return objective_entry(objective).title if objective in available_objectives() else run.path.name


def _decoder(run: RunData, *, model: Path | str | None) -> Decode | None:
    """The ``decode`` of the tokenizer, or None. If ``model`` is given, it must have a tokenizer; otherwise the run's
    own directories are tried."""
    if model is not None:
        if not Path(model).is_dir():
            raise UserError(f"--model {model} is not a directory")
        return load_tokenizer(model).decode
    for candidate in (run.path / "export", run.option("model", "model")):
        if candidate and Path(candidate).is_dir():
            try:
                return load_tokenizer(candidate).decode
            except UserError as error:
                _log.warning("report: %s", error)
    return None


def _navigation(links: Sequence[tuple[str, str]]) -> Html:
    items = [
        element("li", element("a", text, href=f"#{anchor}"))
        for anchor, text in (*links, ("configuration", "Configuration"))
    ]
    return element("nav", element("ul", items), aria_label="Sections")
