"""Loads the configuration of a training run. It is typed, frozen and documented; ``sections.py`` has the options.

``load_config(argv)`` starts from the defaults; a YAML file (``--config FILE``) overrides them, and flags override the
file. ``check`` applies the rules that relate options to each other. ``python -m megatron_ktr.config --markdown`` prints
docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ktr.config.checks import ABSENT_OPTIONS, check
from megatron_ktr.config.cli import build_parser, options_of, read_flags, read_yaml, render_markdown, show_value
from megatron_ktr.config.objective_registry import available_objectives, objective_entry
from megatron_ktr.config.sections import (
    DataSection,
    EvaluationSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    ResilienceSection,
    RewardSection,
    RolloutSection,
    TrainerSection,
)
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically

_NOTE = "# "


@dataclass(frozen=True)
class Config:
    """All options of a run. ``Config()`` has the paper's algorithm, but no model and no data. ``check`` validates
    it."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    reward: RewardSection = field(default_factory=RewardSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    resilience: ResilienceSection = field(default_factory=ResilienceSection)

    @property
    def samples(self) -> bool:
        """Whether responses are sampled, rather than recorded or given."""
        return not self.objective.is_supervised and self.rollout.engine != "replay"

    @property
    def evaluates(self) -> bool:
        """Whether held-out questions are answered during training."""
        return self.evaluation.asks and (self.trainer.eval_interval > 0 or self.evaluation.eval_at_start)

    @property
    def has_engine(self) -> bool:
        """Whether an engine generates: the responses that are trained on, or those of evaluation."""
        return self.samples or (self.evaluates and self.rollout.engine != "replay")


def section_class(section: dataclasses.Field[Any]) -> type:
    """The class of one of ``Config``'s fields."""
    assert isinstance(section.default_factory, type), "every field of Config makes a section"
    return section.default_factory


OPTIONS = options_of(Config)
SECTION_DOCS = {section.name: section_class(section).__doc__ or "" for section in dataclasses.fields(Config)}


def config_from_values(values: Mapping[str, Any]) -> Config:
    """A Config with the fields named in ``values`` set, and the rest at the defaults of the objective (its entry in
    ``objective_registry.py``) or else of the section; not checked.

    Raises:
        UserError: there is no such objective.
    """
    objective = values.get("objective", OPTIONS["objective"].default)
    values = {**objective_entry(objective).defaults, **values}
    sections = {}
    for section in dataclasses.fields(Config):
        own = {name: value for name, value in values.items() if OPTIONS[name].section == section.name}
        sections[section.name] = section_class(section)(**own)
    return Config(**sections)


def load_config(argv: Sequence[str], *, prog: str = "megatron-ktr-train") -> Config:
    """The checked configuration of a command line. Raises ``UserError`` on the first thing that is wrong."""
    parser = build_parser(OPTIONS, prog=prog, section_docs=SECTION_DOCS)
    short_forms = parser.add_argument_group("short forms")
    for dtype in ("bf16", "fp16"):
        short_forms.add_argument(
            f"--{dtype}", action="append_const", const=dtype, dest="short_dtypes", help=f"--params-dtype {dtype}"
        )
    flags = read_flags(parser, argv, options=OPTIONS, notes=ABSENT_OPTIONS)
    file = flags.pop("config", None)
    dtypes = set(flags.pop("short_dtypes", ())) | ({flags["params_dtype"]} if "params_dtype" in flags else set())
    if len(dtypes) > 1:
        raise UserError(f"--params-dtype, --bf16 and --fp16 contradict each other: {', '.join(sorted(dtypes))}")
    if dtypes:
        flags["params_dtype"] = dtypes.pop()
    values = read_yaml(Path(file), options=OPTIONS, notes=ABSENT_OPTIONS) if file is not None else {}
    config = config_from_values({**values, **flags})
    check(config)
    return config


def read_saved(path: Path) -> Config:
    """Reads what ``save_resolved`` wrote. It is not checked again: it was valid for the library versions of the run
    that wrote it, which may differ from those installed here."""
    return config_from_values(read_yaml(path, options=OPTIONS, notes=ABSENT_OPTIONS))


def resolved_text(config: Config) -> str:
    """Every option as YAML. ``load_config(["--config", path])`` of a file with this text gives an equal Config."""
    content = {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        for section, fields in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def save_resolved(config: Config, path: str | Path, *, notes: Sequence[str] = ()) -> None:
    """Writes ``resolved_text`` atomically: the whole file or nothing. ``notes`` are lines that go before it, as
    comments: what the options came to (``read_notes``)."""
    comments = "".join(f"{_NOTE}{' '.join(note.split())}\n" for note in notes)
    try:
        write_atomically(path, comments + resolved_text(config))
    except OSError as error:
        raise UserError(f"cannot write the resolved configuration to {path}: {error.strerror}") from error


def read_notes(text: str) -> list[str]:
    """The ``notes`` of a file that ``save_resolved`` wrote."""
    lines = itertools.takewhile(lambda line: line.startswith(_NOTE), text.split("\n"))
    return [line.removeprefix(_NOTE) for line in lines]


def configuration_page() -> str:
    """Content of docs/configuration.md: the options of every section, then the objectives."""
    return render_markdown(OPTIONS, section_docs=SECTION_DOCS) + _objectives_table()


def _objectives_table() -> str:
    about = (
        "Each registers itself in its own file, `megatron_ktr/objectives/NAME.py`. An option that an objective sets "
        "has that value unless a run file or a flag gives another."
    )
    lines = ["", "## Objectives", "", about, ""]
    lines += [
        "| `--objective` | name | meaning | options it sets | options that others refuse |",
        "|---|---|---|---|---|",
    ]
    for entry in map(objective_entry, available_objectives()):
        sets = ", ".join(f"`{name} {show_value(value)}`" for name, value in entry.defaults.items())
        own = ", ".join(f"`{name}`" for name in entry.own_options)
        lines.append(f"| `{entry.name}` | {entry.title} | {entry.summary} | {sets or 'none'} | {own or 'none'} |")
    return "\n".join(lines) + "\n"
