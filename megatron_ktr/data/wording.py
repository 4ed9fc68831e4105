"""Words the question of a record: a Jinja file, built in or the user's own, that renders the text of the user's turn.

The names of the built-in files are in ``BUILT_IN``. ``data/wordings/think_answer.jinja`` is the default, and documents
the variables. What a release itself says is its authors' text; ``tools/import_wording.py`` makes a file of this format
of it. To add a built-in wording, add its file and a line to ``BUILT_IN``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import xxhash
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import MOST_OPTIONS_BYTES, read_text
from megatron_ktr.rewards.choices import label_of

FOLDER = Path(__file__).parent / "wordings"
DEFAULT = "think_answer"
BUILT_IN: Mapping[str, str] = {
    DEFAULT: "think_answer.jinja",
    "video_r1": "video_r1.jinja",
    "video_ktr": "video_r1.jinja",  # the release asks with the words of Video-R1
    "tw_grpo": "tw_grpo.jinja",
    "video_rts": "video_rts.jinja",
    "video_holmes": "video_holmes.jinja",
    "mmvu": "mmvu.jinja",
    "tempcompass": "direct_answer.jinja",
    "direct_answer": "direct_answer.jinja",
    "grounding": "grounding.jinja",
}
"""Name -> file. Except for the default they are our own words for the instructions of the release of that name, or, as
``direct_answer``, of benchmarks that ask for an answer without reasoning."""
WITHOUT_BLOCKS = ("mmvu", "tempcompass", "direct_answer")
"""Those that ask for no answer block. They are for evaluation: of the rewards' protocols only ``lenient`` finds the
answer in such responses."""
RELEASE_VARIABLE = "release"
"""The variable in which an imported file says where its text is from."""


@dataclass(frozen=True)
class Wording:
    """The texts that a wording template has rendered. ``system`` is None if the template sets none."""

    user: str
    system: str | None = None


class WordingTemplate:
    """A Jinja file that words the question. It is rendered in a sandbox, and undefined variables are errors."""

    def __init__(self, written: Path | str | None = None, *, text: str | None = None) -> None:
        """``written`` is one of the names in ``BUILT_IN`` or a file; None means the default. ``text`` is what the file
        said, where another process has read it.

        Raises:
            UserError: there is no such name or file, or it is not a Jinja template.
        """
        self.name = DEFAULT if written is None else str(written)
        self.is_built_in = self.name in BUILT_IN
        self.path = FOLDER / BUILT_IN[self.name] if self.is_built_in else Path(self.name)
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
        environment.globals["lettered"] = lettered
        try:
            # Some editors write a mark at the beginning of a file, which is no part of the text.
            if text is None:
                text = read_text(self.path, most_bytes=MOST_OPTIONS_BYTES, encoding="utf-8-sig")
            self.text = text
            self._template = environment.from_string(self.text)
            self._syntax = environment.parse(self.text)
        except (OSError, ValueError, jinja2.TemplateError, RecursionError) as error:
            raise UserError(
                f"prompt_template: {self.path} cannot be used: {error}; expected a file or one of {', '.join(BUILT_IN)}"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled templates cannot be sent to another process; it compiles the same text again."""
        return partial(WordingTemplate, text=self.text), (self.name,)

    def render(self, record: Mapping[str, Any]) -> Wording:
        """The user's text for one record, and the template's ``system`` if it sets one.

        Blanks at both ends are removed, unless the template sets ``keep_blanks``.
        """
        variables = {
            "problem": record.get("problem", ""),
            "options": list(record.get("options") or ()),
            "problem_type": record.get("problem_type", ""),
            "data_type": record.get("data_type", "text"),
            "record": dict(record),
        }
        try:
            module = self._template.make_module(variables)
        except Exception as error:  # a template can raise anything its expressions can
            raise UserError(f"prompt_template: {self.path} failed: {type(error).__name__}: {error}") from error
        system = getattr(module, "system", None)
        text = str(module)
        if not text.strip():
            raise UserError(f"prompt_template: {self.path} gives no text for this record")
        return Wording(
            user=text if getattr(module, "keep_blanks", False) else text.strip(),
            system=None if system is None else str(system),
        )

    @property
    def digest(self) -> str:
        """A digest of the file's text, by which a resumed run knows its wording."""
        return xxhash.xxh3_128(self.text.encode()).hexdigest()

    @cached_property
    def release(self) -> Mapping[str, Any]:
        """Where an imported text is from: ``name``, ``part``, ``file``, ``commit``, ...; empty for other files."""
        for node in self._syntax.find_all(jinja2.nodes.Assign):
            is_release = getattr(node.target, "name", "") == RELEASE_VARIABLE
            if is_release and isinstance(node.node, jinja2.nodes.Expr):
                try:
                    value = node.node.as_const()
                except jinja2.nodes.Impossible:
                    return {}
                return value if isinstance(value, dict) else {}
        return {}

    def describe(self) -> str:
        """One line for the console, the configuration and the report.

        >>> WordingTemplate("tw_grpo").describe().partition(", digest")[0]
        'tw_grpo (our own words for its instructions)'
        """
        if self.release:
            found = {name: _short(self.release.get(name)) for name in ("name", "part", "file", "commit")}
            source = f"the text of {found['name']}, {found['part']}, {found['file']}"
            source += f" at commit {found['commit'][:12]}" if self.release.get("commit") else ""
        elif self.is_built_in:
            source = "built in" if self.name == DEFAULT else "our own words for its instructions"
        else:
            source = "the user's file"
        return f"{_short(self.name)} ({source}), digest {self.digest[:12]}"


def lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    """(letter, text) of each option, for templates. If all options begin with their letters, these are cut off.

    >>> lettered(["A. red", "B. blue"]), lettered(["red", "A. blue"])
    ([('A', 'red'), ('B', 'blue')], [('A', 'red'), ('B', 'A. blue')])
    """
    letters = [label_of(number) for number in range(len(options))]
    matches = [
        re.fullmatch(rf"\(?{letter}[.):]\s*(\S.*)", option, re.DOTALL)
        for letter, option in zip(letters, options, strict=True)
    ]
    texts = [match.group(1) for match in matches if match]
    return list(zip(letters, texts if len(texts) == len(options) else options, strict=True))


def _short(value: Any) -> str:
    text = "".join(character if character.isprintable() else " " for character in " ".join(str(value).split()))
    return text if len(text) <= 200 else text[:197] + "..."
