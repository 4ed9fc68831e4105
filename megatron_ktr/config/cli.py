"""Makes YAML keys, command-line flags, help text and a reference page from frozen dataclasses; knows no option by name.

A configuration class is a frozen dataclass of sections; a section is a frozen dataclass of fields made with
``option``. Field names are unique over all sections, so ``lr`` is the flag ``--lr`` and, in a YAML file, either
``optimizer: {lr: ...}`` or plain ``lr: ...``. Where a section and one of its fields share a name, ``model: DIR``
means ``model: {model: DIR}``. Everything a user can get wrong raises ``UserError`` with the nearest valid name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from megatron_ktr.config.limits import LARGEST_INTEGER
from megatron_ktr.config.yaml_values import RunFileLoader, shorten
from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import read_yaml_text

SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**127
"""The limits of every number beside an option's own: torch and the libraries behind it store numbers in 32 bits."""


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Callable[[], tuple[str, ...]] | None = None,
    parse: Callable[[Any], Any] | None = None,
):
    """Makes a documented field. Values must satisfy ``low <= value <= high`` and ``value > above``, as far as these are
    given. ``choices`` is called whenever the accepted values are needed; a field with fixed values has a ``Literal``
    type instead. ``parse`` makes the value of a flag or a file; it raises ``ValueError`` in words, and leaves values as
    they are that it has made itself."""
    metadata = {"doc": doc, "low": low, "above": above, "high": high, "find_choices": choices, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """Everything known about one field: its section and name, the parts of its type, its default and its limits."""

    section: str
    name: str
    kind: type
    """str, int, float or bool; for a list, the type of its elements."""
    fixed_choices: tuple[str, ...]
    """The values of a ``Literal`` type; empty for any other."""
    is_list: bool
    is_optional: bool
    default: Any
    doc: str
    low: float | None
    above: float | None
    high: float | None
    find_choices: Callable[[], tuple[str, ...]] | None
    parse: Callable[[Any], Any] | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted values; empty if every value of the kind is accepted."""
        return self.find_choices() if self.find_choices else self.fixed_choices

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """The accepted values in words."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}[self.kind]
        limits = [
            f"{sign} {limit if isinstance(limit, int) else format(limit, 'g')}"
            for sign, limit in ((">=", self.low), (">", self.above), ("<=", self.high))
            if limit is not None
        ]
        words += f" {' and '.join(limits)}" if limits else ""
        words = f"a list, each {words}" if self.is_list else words
        return f"{words}, or none" if self.is_optional else words


def options_of(config_class: type) -> dict[str, Option]:
    """Every field of every section, by field name. The assertion catches our own mistake of using a name twice."""
    found: dict[str, Option] = {}
    for section_name, section_class in typing.get_type_hints(config_class).items():
        hints = typing.get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            assert field.name not in found, f"option name {field.name} is used in two sections"
            found[field.name] = _describe(section_name, field, hint=hints[field.name])
    return found


def _describe(section: str, field: dataclasses.Field, *, hint: Any) -> Option:
    is_optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if field.metadata["parse"] is not None:
        hint = str
    elif is_optional:
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    is_list = typing.get_origin(hint) is tuple
    if is_list:
        hint = typing.get_args(hint)[0]
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return Option(
        section=section,
        name=field.name,
        kind=str if choices else hint,
        fixed_choices=choices,
        is_list=is_list,
        is_optional=is_optional,
        default=field.default,
        **field.metadata,
    )


def did_you_mean(name: str, candidates: Iterable[str], *, cutoff: float = 0.0) -> str:
    """``"; did you mean X?"``: the shortest candidate with all words of ``name``, else the nearest spelling."""
    known = list(candidates)
    words = [word for word in name.lower().replace("_", "-").split("-") if word]
    with_words = [other for other in known if words and set(words) <= set(other.replace("_", "-").split("-"))]
    near = sorted(with_words, key=len) or difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def convert(option: Option, value: Any, *, source: str) -> Any:
    """Converts ``value`` (a YAML value or the text of a flag) to the field's type and checks it. Messages name
    ``source`` as its origin."""
    if value is None or (option.is_optional and _is_none_word(value)):
        if option.is_optional:
            return None
        _refuse(option, value, source=source)
    if option.parse is not None:
        try:
            return option.parse(value)
        except ValueError as error:
            raise UserError(f"{source}: {option.key} ({option.flag}): {error}") from error
    if not option.is_list:
        return _convert_one(option, value, source=source)
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        items = [items]
    items = [item.strip() if isinstance(item, str) else item for item in items]
    converted = tuple(_convert_one(option, item, source=source) for item in items if item != "")
    if option.kind is str and len(set(converted)) < len(converted):
        raise UserError(f"{source}: {option.key} names the same item twice: {', '.join(converted)}")
    return converted


def _is_none_word(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("none", "null", "")


def _convert_one(option: Option, value: Any, *, source: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    result: Any = None
    if option.kind is str and isinstance(value, str):
        if "\0" in value:
            _refuse(option, value, source=source, reason="; no file and no string holds a NUL character")
        result = value
    elif option.kind is bool and isinstance(value, bool):
        result = value
    elif option.kind in (int, float) and (is_number or isinstance(value, str)):
        # YAML 1.1 reads 2e-6 (no dot) as text, so numbers are accepted as text from files too.
        try:
            result = option.kind(value) if isinstance(value, str) or option.kind is float else value
        except (ValueError, OverflowError):  # no number, or one with too many digits
            _refuse(option, value, source=source)
        if (option.kind is int and not isinstance(result, int)) or not _in_range(option, result):
            _refuse(option, value, source=source)
        if not _is_representable(option, result):
            sizes = f"1 to {LARGEST_INTEGER}" if option.kind is int else "1.2e-38 to 1.7e+38"
            _refuse(option, value, source=source, reason=f"; numbers are 0, or of a size from {sizes}")
    if result is None or (option.choices and result not in option.choices):
        _refuse(option, value, source=source)
    return result


def _is_representable(option: Option, number: float) -> bool:
    if option.kind is int:
        return abs(number) <= LARGEST_INTEGER
    return number == 0 or SMALLEST_NUMBER <= abs(number) <= LARGEST_NUMBER  # no NaN, no infinity


def _in_range(option: Option, number: float) -> bool:
    return (
        (option.low is None or number >= option.low)
        and (option.above is None or number > option.above)
        and (option.high is None or number <= option.high)
    )


def _refuse(option: Option, value: Any, *, source: str, reason: str = "") -> NoReturn:
    if not reason and isinstance(value, str):
        reason = did_you_mean(value, option.choices, cutoff=0.5)
    raise UserError(f"{source}: {option.key} ({option.flag}) expects {option.expected}, got {shorten(value)}{reason}")


def read_yaml(path: Path, *, options: Mapping[str, Option], notes: Mapping[str, str]) -> dict[str, Any]:
    """Field values set by a YAML file, by field name, converted and checked."""
    try:
        content = yaml.load(read_yaml_text(path), RunFileLoader)
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"{path}: not a valid YAML file: nested too deeply") from None
    except (yaml.YAMLError, UserError, ValueError) as error:  # ValueError: not text, or not a possible file name
        raise UserError(f"{path}: not a valid YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with options, got {type(content).__name__}")
    values: dict[str, Any] = {}
    for name, value, section in _flatten(content, path=path, options=options):
        known = [other.name for other in options.values() if section in (None, other.section)]
        if name not in known:
            label = f"{section}.{name}" if section else f"{name}"
            sections = [] if section else sorted({other.section for other in options.values()})
            hint = _hint_for(name, known=[*sections, *known], options=options, notes=notes)
            raise UserError(f"{path}: unknown key {label}{hint}")
        if name in values:
            raise UserError(f"{path}: {options[name].key} is given twice")
        values[name] = convert(options[name], value, source=str(path))
    return values


def _flatten(content: dict, *, path: Path, options: Mapping[str, Option]) -> list[tuple[str, Any, str | None]]:
    """(field name, value, section) for everything in the file; the section is None for keys at the top level."""
    sections = {option.section for option in options.values()}
    rows: list[tuple[str, Any, str | None]] = []
    for key, value in content.items():
        key = str(key)
        if key in sections and isinstance(value, dict):
            rows += [(str(name), item, key) for name, item in value.items()]
        elif key in sections and key not in options:
            if value is not None:
                raise UserError(f"{path}: section {key} expects options below it, got {shorten(value)}")
        else:
            rows.append((key, value, None))
    return rows


def _hint_for(name: str, *, known: Sequence[str], options: Mapping[str, Option], notes: Mapping[str, str]) -> str:
    if name in notes:
        return f": {notes[name]}"
    if name in options:
        return f"; {name} belongs to section {options[name].section}"
    return did_you_mean(name, known)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(
    options: Mapping[str, Option], *, prog: str, section_docs: Mapping[str, str]
) -> argparse.ArgumentParser:
    """A parser with one flag per option, grouped by section. It leaves values as text, which ``convert`` converts."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--option VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        description="Defaults < YAML file < flags. Lists are comma-separated or given by repeating the flag.",
    )
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)  # -1e-3 is one, too
    parser.add_argument("--config", metavar="FILE", help="YAML file with options by section; flags override it")
    groups: dict[str, Any] = {}
    for item in options.values():
        if item.section not in groups:
            groups[item.section] = parser.add_argument_group(item.section, section_docs.get(item.section))
        group = groups[item.section]
        text = f"{item.doc} (default: {show_value(item.default)})".replace("%", "%%")
        if item.kind is bool:
            group.add_argument(item.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = {str: "TEXT", int: "N", float: "X"}[item.kind]
            metavar = "{" + ",".join(item.choices) + "}" if item.choices else metavar
            metavar = f"{metavar}[,...]" if item.is_list else metavar
            may_repeat = item.is_list or item.parse is not None
            group.add_argument(item.flag, action="append" if may_repeat else "store", metavar=metavar, help=text)
    return parser


def read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, options: Mapping[str, Option], notes: Mapping[str, str]
) -> dict[str, Any]:
    """The converted values that the command line sets, by field name. Other arguments of ``parser`` are returned as
    they are."""
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"unexpected argument {flag!r}: every option is given as --name value (see --help)")
        name = flag.lstrip("-").replace("-", "_")
        flags = [text for action in parser._actions for text in action.option_strings]
        raise UserError(f"unknown flag {flag}" + (f": {notes[name]}" if name in notes else did_you_mean(flag, flags)))
    values = vars(parsed)
    for name in values.keys() & options.keys():
        value = values[name]
        if options[name].is_list:
            value = ",".join(value)
        elif options[name].parse is not None:
            value = value[0] if len(value) == 1 else value
        values[name] = convert(options[name], value, source="command line")
    return values


def show_value(value: Any) -> str:
    """A default as a user would type it."""
    if isinstance(value, tuple):
        return ",".join(show_value(item) for item in value) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return {None: "none", "": "empty"}.get(value, f"{value:g}" if isinstance(value, float) else str(value))


PREFACE = """\
# Configuration

Generated by `python -m megatron_ktr.config --markdown`; do not edit.

Defaults < YAML file (`--config FILE`) < flags. The flag of a key is its name with dashes
(`video_max_frames` is `--video-max-frames`); booleans also have `--no-...`; lists are comma-separated or
given by repeating the flag; `none` unsets an optional value. In a file, a key stands under its section or,
since names are unique, at the top level. `--bf16` and `--fp16` are short forms of `--params-dtype`.
Relative paths start at the working directory."""


def render_markdown(options: Mapping[str, Option], *, section_docs: Mapping[str, str]) -> str:
    """A page with one table per section: key, accepted values, default, meaning."""
    lines = [PREFACE]
    section = None
    for item in options.values():
        if item.section != section:
            section = item.section
            lines += ["", f"## `{section}`", "", section_docs.get(section, ""), ""]
            lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        cells = [f"`{item.name}`", item.expected, f"`{show_value(item.default)}`", item.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
