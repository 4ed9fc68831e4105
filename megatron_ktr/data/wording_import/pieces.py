"""The text of a prompt as a sequence of pieces, and how pieces are written as a Jinja template.

    "What?" + record's problem + TABLE[record's problem_type]  ->  Text, Fact, Lookup

Templates that are written here contain no text outside of expressions, so that every blank is where the source has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Constant text."""

    text: str


@dataclass(frozen=True)
class Fact:
    """Something of the record, as a Jinja expression."""

    expression: str


@dataclass(frozen=True)
class Lookup:
    """The text that a constant table has for a key; a key that it lacks is an error when the template is rendered."""

    table: tuple[tuple[str, str], ...]
    key: Fact


@dataclass(frozen=True)
class Choice:
    """``then`` where the Jinja ``condition`` holds, else ``otherwise``."""

    condition: str
    then: Pieces
    otherwise: Pieces


@dataclass(frozen=True)
class Each:
    """``body`` for each element of a Jinja expression, with ``separator`` between two of them."""

    variables: tuple[str, ...]
    items: str
    body: Pieces
    separator: str = ""


Piece = Text | Fact | Lookup | Choice | Each
Pieces = tuple[Piece, ...]


def joined(*parts: Pieces) -> Pieces:
    """The parts one after the other; neighbouring constant texts become one."""
    found: list[Piece] = []
    for piece in (piece for part in parts for piece in part):
        if isinstance(piece, Text) and found and isinstance(found[-1], Text):
            found[-1] = Text(found[-1].text + piece.text)
        elif piece != Text(""):
            found.append(piece)
    return tuple(found)


def size_of(pieces: Pieces) -> int:
    """Characters and pieces, as a limit against sources that double a text again and again."""
    total = 0
    for piece in pieces:
        total += 1
        if isinstance(piece, Text):
            total += len(piece.text)
        elif isinstance(piece, Choice):
            total += size_of(piece.then) + size_of(piece.otherwise)
        elif isinstance(piece, Each):
            total += size_of(piece.body)
    return total


def constant_text(pieces: Pieces) -> str | None:
    """The text of pieces that do not depend on the record, else None."""
    if not all(isinstance(piece, Text) for piece in pieces):
        return None
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


def texts_of(pieces: Pieces) -> Iterable[str]:
    """All constant texts in ``pieces``."""
    for piece in pieces:
        if isinstance(piece, Text):
            yield piece.text
        elif isinstance(piece, Lookup):
            yield from (text for _, text in piece.table)
        elif isinstance(piece, Choice):
            yield from texts_of(piece.then)
            yield from texts_of(piece.otherwise)
        elif isinstance(piece, Each):
            yield piece.separator
            yield from texts_of(piece.body)


def jinja_template(
    pieces: Pieces, *, release: Mapping[str, str | None], comment: str, system: str | None = None
) -> str:
    """A wording template (``data/wording.py``) that renders ``pieces`` with every blank kept."""
    facts = ", ".join(f"{literal(name)}: {'none' if text is None else literal(text)}" for name, text in release.items())
    lines = [f"{{#- {comment} -#}}", "{%- set keep_blanks = true -%}", f"{{%- set release = {{{facts}}} -%}}"]
    if system is not None:
        lines.append(f"{{%- set system = {literal(system)} -%}}")
    return "\n".join([*lines, *_lines(pieces)]) + "\n"


def literal(text: str) -> str:
    """``text`` as a string of a Jinja expression.

    >>> literal('a "b"\\n')
    '"a \\\\"b\\\\"\\\\n"'
    """
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def _lines(pieces: Pieces) -> list[str]:
    lines: list[str] = []
    for piece in pieces:
        if isinstance(piece, Text):
            lines.append(f"{{{{- {literal(piece.text)} -}}}}")
        elif isinstance(piece, Fact):
            lines.append(f"{{{{- {piece.expression} -}}}}")
        elif isinstance(piece, Lookup):
            table = ",\n  ".join(f"{literal(key)}: {literal(text)}" for key, text in piece.table)
            lines.append(f"{{{{- {{\n  {table}\n}}[{piece.key.expression}] -}}}}")
        elif isinstance(piece, Choice):
            lines.append(f"{{%- if {piece.condition} -%}}")
            lines += _lines(piece.then)
            if piece.otherwise:
                lines += ["{%- else -%}", *_lines(piece.otherwise)]
            lines.append("{%- endif -%}")
        else:
            lines.append(f"{{%- for {', '.join(piece.variables)} in {piece.items} -%}}")
            lines += _lines(piece.body)
            if piece.separator:
                lines.append(f"{{{{- {literal('')} if loop.last else {literal(piece.separator)} -}}}}")
            lines.append("{%- endfor -%}")
    return lines
