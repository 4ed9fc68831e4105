"""Finds the expression of a prompt's text in the source of a release."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ktr.data.wording_import.evaluator import Evaluator, Names, NotUnderstood
from megatron_ktr.data.wording_import.pieces import Pieces, constant_text


@dataclass(frozen=True)
class Question:
    """What a release sends: the text of the user's turn, after the media, and that of the system's turn, if any."""

    text: Pieces
    system: str | None = None


Describe = Callable[[Evaluator, Names], Question]


def text_of_variable(scope: ast.AST, name: str) -> tuple[ast.AST, Describe]:
    """(statement, how to evaluate it) of the only assignment of ``name`` in ``scope``.

    Raises:
        NotUnderstood: there is not exactly one.
    """
    found = [
        node
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    if len(found) != 1:
        raise NotUnderstood(f"expected one assignment of {name}, found {len(found)}")
    statement = found[0]
    return statement, lambda evaluator, names: Question(evaluator.text(statement.value, names))


def text_of_messages(scope: ast.AST) -> tuple[ast.AST, Describe]:
    """(list of messages, how to evaluate it) of the only messages in ``scope`` with a text part.

    Raises:
        NotUnderstood: there is not exactly one such list.
    """
    found = [node for node in ast.walk(scope) if isinstance(node, ast.List) and any(map(_has_text_part, node.elts))]
    if len(found) != 1:
        raise NotUnderstood(f"expected one list of messages with a text part, found {len(found)}")
    return found[0], lambda evaluator, names: _question(found[0], evaluator, names)


def _has_text_part(node: ast.expr) -> bool:
    content = _entry(node, "content")
    return isinstance(content, ast.List) and any(_entry(part, "text") is not None for part in content.elts)


def _question(messages: ast.List, evaluator: Evaluator, names: Names) -> Question:
    """The messages are one of the user, after one of the system or none; media come before the only text."""
    roles = [getattr(_entry(message, "role"), "value", None) for message in messages.elts]
    if roles not in (["user"], ["system", "user"]):
        raise NotUnderstood(f"line {messages.lineno}: expected messages of the system and a user, got roles {roles}")
    content = _entry(messages.elts[-1], "content")
    assert isinstance(content, ast.List), "found by its text part"
    text = _entry(content.elts[-1], "text")
    if text is None or any(_entry(part, "text") is not None for part in content.elts[:-1]):
        raise NotUnderstood(f"line {content.lineno}: expected one text, behind the media")
    system = None
    if len(roles) == 2:
        given = _entry(messages.elts[0], "content")
        if isinstance(given, ast.List) and len(given.elts) == 1:
            given = _entry(given.elts[0], "text")
        system = None if given is None else constant_text(evaluator.text(given, names))
        if system is None:
            raise NotUnderstood(f"line {messages.lineno}: the system's text is not constant")
    return Question(evaluator.text(text, names), system)


def _entry(node: ast.expr, key: str) -> ast.expr | None:
    """The value of a dict's constant key."""
    if isinstance(node, ast.Dict):
        for name, value in zip(node.keys, node.values, strict=True):
            if isinstance(name, ast.Constant) and name.value == key:
                return value
    return None
