"""Imports the wording of a release from the user's checkout of its repository, as a template of ours.

The release's source is parsed, never imported or run: the expression of the prompt's text is found by file, function
and name (``releases.py``) and evaluated symbolically (``evaluator.py``).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.data.wording_import.checkout import commit_of, find_file
from megatron_ktr.data.wording_import.evaluator import Evaluator, Names, NotUnderstood, TheRecord, Unknown
from megatron_ktr.data.wording_import.messages import Question, text_of_messages, text_of_variable
from megatron_ktr.data.wording_import.pieces import constant_text, jinja_template, texts_of
from megatron_ktr.data.wording_import.releases import RELEASES, Part
from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import open_file

MOST_SOURCE_BYTES = 2_000_000
_MARKERS = ("<image>", "<video>")


@dataclass(frozen=True)
class ImportedWording:
    """A template and where its text is from."""

    template: str
    """The content of a wording file."""
    facts: Mapping[str, str | None]
    """``name`` and ``part`` of the release, ``file`` in its repository, ``commit`` (None if unknown), ``sha256`` of the
    file."""
    names: Mapping[str, int]
    """Each name that holds the text, with the line where it is first assigned."""
    settings: Mapping[str, str]


def import_wording(
    checkout: Path, *, release: str, part: str | None = None, settings: Mapping[str, str] | None = None
) -> ImportedWording:
    """The wording of ``release`` as its repository in ``checkout`` has it.

    Args:
        part: a place of the release that asks questions, such as "train" or "eval"; None means its first.
        settings: values for options of the release that its text depends on, in place of its defaults.

    Raises:
        UserError: the file or a name in it is not found, or the text depends on something that is not understood.
    """
    entry = RELEASES[release]
    part = part or next(iter(entry.parts))
    if part not in entry.parts:
        raise UserError(f"--part {part}: {release} has {', '.join(entry.parts)}")
    place = entry.parts[part]
    if unknown := (settings or {}).keys() - place.settings.keys():
        known = ", ".join(place.settings) or "none"
        raise UserError(f"--setting {min(unknown)}: the text of {release}, {part} depends on {known}")
    used = {**place.settings, **(settings or {})}
    path, source, tree = _read_source(checkout, place, looked_for=f"the wording of {release}, {part}")
    written = path.relative_to(checkout).as_posix()
    names = _names_of(tree, place, written=written)
    question = _question(tree, place, settings=used, written=written)
    facts = {
        "name": release,
        "part": part,
        "file": written,
        "commit": commit_of(checkout),
        "sha256": hashlib.sha256(source).hexdigest(),
    }
    comment = f"The wording of {entry.title}, as its repository has it: the text is its authors'."
    template = jinja_template(question.text, release=facts, comment=comment, system=question.system)
    return ImportedWording(template, facts, names, used)


def _read_source(checkout: Path, place: Part, *, looked_for: str) -> tuple[Path, bytes, ast.Module]:
    if not checkout.is_dir():
        raise UserError(f"RELEASE_DIR: {checkout} is not a directory")
    alike: list[Path] = []
    for wanted in place.files:
        path, named = find_file(checkout, wanted)
        if path is None:
            alike += named
            continue
        try:
            if path.stat().st_size > MOST_SOURCE_BYTES:
                raise UserError(f"RELEASE_DIR: {path} has more than {MOST_SOURCE_BYTES} bytes")
            with open_file(path) as file:
                source = file.read()
            return path, source, ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"RELEASE_DIR: {path} cannot be read as Python: {error}") from error
    found = ", ".join(path.relative_to(checkout).as_posix() for path in alike[:5]) or "no file of that name"
    raise UserError(f"RELEASE_DIR: looked in {checkout} for {looked_for}: {' or '.join(place.files)}; found {found}")


def _names_of(tree: ast.Module, place: Part, *, written: str) -> dict[str, int]:
    """The line of each name's first assignment."""
    stored: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored[node.id] = min(node.lineno, stored.get(node.id, node.lineno))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    wanted = [*place.names, *([f"{place.function}()"] if place.function else [])]
    there = [name for name in wanted if name in stored or name.removesuffix("()") in functions]
    if len(there) < len(wanted):
        raise UserError(
            f"RELEASE_DIR: looked in {written} for {', '.join(wanted)}; found {', '.join(there) or 'none of them'}"
        )
    return {name: stored[name] for name in place.names}


def _question(tree: ast.Module, place: Part, *, settings: Mapping[str, str], written: str) -> Question:
    evaluator = Evaluator(fields=place.fields, settings=settings)
    try:
        scope: ast.AST = tree
        if place.function is not None:
            scope = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == place.function)
        if place.variable is not None:
            target, describe = text_of_variable(scope, place.variable)
        else:
            target, describe = text_of_messages(scope)
        question = describe(evaluator, _names_before(tree, target, evaluator=evaluator, function=place.function))
    except NotUnderstood as error:
        raise UserError(f"RELEASE_DIR: {written}: {error}") from error
    except RecursionError as error:
        raise UserError(f"RELEASE_DIR: {written}: its expressions are nested too deeply") from error
    texts = [*texts_of(question.text), question.system or ""]
    if marker := next((marker for marker in _MARKERS for text in texts if marker in text), None):
        raise UserError(f"RELEASE_DIR: {written}: its text has {marker}, which is the place of a medium here")
    if not any(text.strip() for text in texts) or constant_text(question.text) is not None:
        raise UserError(f"RELEASE_DIR: {written}: its text has no words of its own, or does not have the question")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"RELEASE_DIR: {written}: its text has half a character: {error}") from error
    return question


def _names_before(tree: ast.Module, target: ast.AST, *, evaluator: Evaluator, function: str | None) -> Names:
    """The values of all names where ``target`` stands: the statements before it, in each block that it is in."""
    names: Names = {}
    node: ast.AST = tree
    while node is not target:
        for block in _blocks(node):
            place = next((index for index, inner in enumerate(block) if _holds(inner, target)), None)
            if place is not None:
                evaluator.run(block[:place], names)
                node = block[place]
                if isinstance(node, ast.FunctionDef):  # it is called when the statements behind it have run
                    evaluator.forget(block[place + 1 :], names)
                break
        else:
            return names
        if isinstance(node, ast.FunctionDef):
            arguments = [argument.arg for argument in node.args.posonlyargs + node.args.args]
            names |= {name: Unknown(f"line {node.lineno}: it depends on the argument {name}") for name in arguments}
            if node.name == function and arguments:
                names[arguments[0]] = TheRecord()
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            names[node.target.id] = TheRecord()
    return names


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    fields: dict[str, Any] = dict(ast.iter_fields(node))
    return [fields[name] for name in ("body", "orelse", "finalbody") if isinstance(fields.get(name), list)]


def _holds(node: ast.AST, target: ast.AST) -> bool:
    return any(inner is target for inner in ast.walk(node))
