"""Finds out which text a piece of Python source makes of a record, without running it.

Names are followed through assignments, ``+=``, branches and loops; expressions may be texts, ``+``, f-strings,
``format``, ``join``, ``string.Template``, tables and fields of the record. Anything else has an unknown value, which is
an error only where the wanted text depends on it.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

from megatron_ktr.data.wording_import.pieces import (
    Choice,
    Each,
    Fact,
    Lookup,
    Pieces,
    Text,
    constant_text,
    joined,
    literal,
    size_of,
)

MOST_SIZE = 100_000
"""The largest text in characters. A source can double a text with every line."""


class NotUnderstood(Exception):
    """The text depends on something whose value is unknown. The message says what, and in which line."""


@dataclass(frozen=True)
class Table:
    """A dict of constant texts."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class TheRecord:
    """The record itself."""


@dataclass(frozen=True)
class Unknown:
    """A value that was not understood, with the reason."""

    reason: str


Value = Pieces | Table | TheRecord | Unknown
Names = dict[str, Value]


class Evaluator:
    """Evaluates statements and expressions of one source file.

    Args:
        fields: what a field of the release's record is in terms of ours.
        settings: options of the release, as its code spells them, with their values.
    """

    def __init__(self, *, fields: Mapping[str, Pieces], settings: Mapping[str, str]) -> None:
        self._fields = fields
        self._settings = settings
        self._counter = count(1)
        self._methods: Mapping[str, Callable[[ast.Call, ast.Attribute, Names], Value]] = {
            "format": self._format,
            "join": self._join,
            "get": self._get,
        }

    # Statements

    def run(self, statements: list[ast.stmt], names: Names) -> None:
        """Updates ``names`` by what the statements assign to them."""
        for statement in statements:
            if not isinstance(statement, ast.If):  # whose statements come here, too
                self._forget_changed_tables(statement, names)
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        names[target.id] = self._value_or_unknown(statement.value, names)
                    else:
                        self._forget([target], names)
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                whole = ast.BinOp(ast.Name(statement.target.id, ast.Load()), statement.op, statement.value)
                ast.fix_missing_locations(ast.copy_location(whole, statement))
                names[statement.target.id] = self._value_or_unknown(whole, names)
            elif isinstance(statement, ast.If):
                self._branch(statement, names)
            elif isinstance(statement, ast.For) and isinstance(statement.target, ast.Name):
                self._repeat(statement, names)
            elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._forget([statement], names)

    def _branch(self, statement: ast.If, names: Names) -> None:
        condition = self._condition(statement.test, names)
        if isinstance(condition, bool):
            self.run(statement.body if condition else statement.orelse, names)
            return
        then, otherwise = dict(names), dict(names)
        self.run(statement.body, then)
        self.run(statement.orelse, otherwise)
        for name in then.keys() | otherwise.keys():
            one, other = then.get(name), otherwise.get(name)
            if one == other and one is not None:
                names[name] = one
            elif condition is not None and isinstance(one, tuple) and isinstance(other, tuple) and _fits(one, other):
                names[name] = (Choice(condition, one, other),)
            else:
                names[name] = _unknown(statement, f"it depends on {_shown(statement.test)}")

    def _repeat(self, statement: ast.For, names: Names) -> None:
        """A loop over a list of the record that appends to texts."""
        items = self._items(statement.iter, names)
        inner = dict(names)
        variable = f"item_{next(self._counter)}"
        assert isinstance(statement.target, ast.Name)
        inner[statement.target.id] = (Fact(variable),)
        changed = _assigned(statement.body)
        before: dict[str, Pieces] = {}
        for name in changed:
            value = names.get(name)
            if isinstance(value, tuple):
                before[name] = value
                inner[name] = (Fact(f"<{name} so far>"),)
        self.run(statement.body, inner)
        for name in changed:
            added = _behind(inner.get(name), start=(Fact(f"<{name} so far>"),)) if name in before else None
            if items is not None and added is not None and not statement.orelse and not _is_left_early(statement):
                names[name] = joined(before[name], (Each((variable,), items, added),))
            else:
                names[name] = _unknown(statement, "it is made in a loop")

    def forget(self, statements: list[ast.stmt], names: Names) -> None:
        """Makes all names unknown to which statements may give other values, in whatever order they run."""
        for statement in statements:
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._forget_changed_tables(statement, names)
                self._forget([statement], names)

    def _forget(self, nodes: list[ast.stmt] | list[ast.expr], names: Names) -> None:
        for name in _assigned(nodes):
            names[name] = _unknown(nodes[0], "it is assigned in a way that is not followed")

    def _forget_changed_tables(self, statement: ast.stmt, names: Names) -> None:
        """A table may be changed in place: by an assignment to one of its keys, or by whatever gets it as a whole."""
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        read = {
            id(node.value)
            for node in ast.walk(statement)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        }
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in read:
                if isinstance(names.get(node.id), Table):
                    names[node.id] = _unknown(statement, f"{node.id} may be changed there")

    # Expressions

    def text(self, node: ast.expr, names: Names) -> Pieces:
        """The text that an expression gives.

        Raises:
            NotUnderstood: it depends on an unknown value, or is none.
        """
        value = self._value(node, names)
        if not isinstance(value, tuple):
            raise NotUnderstood(f"line {node.lineno}: expected a text, got {_shown(node)}")
        return value

    def _value_or_unknown(self, node: ast.expr, names: Names) -> Value:
        try:
            return self._value(node, names)
        except NotUnderstood as error:
            return Unknown(str(error))

    def _value(self, node: ast.expr, names: Names) -> Value:
        if self._settings and isinstance(node, ast.Name | ast.Attribute):
            if (setting := self._settings.get(ast.unparse(node))) is not None:
                return joined((Text(setting),))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return joined((Text(node.value),))
        if isinstance(node, ast.Name):
            value = names.get(node.id, Unknown(f"line {node.lineno}: {node.id} has no value that can be found"))
            if isinstance(value, Unknown):
                raise NotUnderstood(value.reason)
            return value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._limited(node, self.text(node.left, names), self.text(node.right, names))
        if isinstance(node, ast.JoinedStr):
            return self._limited(node, *(self._part(part, names) for part in node.values))
        if isinstance(node, ast.Dict):
            return self._table(node, names)
        if isinstance(node, ast.Subscript):
            return self._subscript(node, names)
        if isinstance(node, ast.IfExp):
            condition = self._condition(node.test, names)
            if isinstance(condition, str):
                return (Choice(condition, self.text(node.body, names), self.text(node.orelse, names)),)
            if condition is not None:
                return self._value(node.body if condition else node.orelse, names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = self._methods.get(node.func.attr)
            if method is not None:
                return method(node, node.func, names)
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            called = ast.unparse(node.func)
            if called == "str":
                return self.text(node.args[0], names)
            if called in ("Template", "string.Template"):
                return self._string_template(node, names)
        raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")

    def _part(self, node: ast.expr, names: Names) -> Pieces:
        """A part of an f-string."""
        if isinstance(node, ast.FormattedValue):
            if node.format_spec is not None or node.conversion not in (-1, ord("s")):
                raise NotUnderstood(f"line {node.lineno}: the format of {_shown(node.value)} is not understood")
            return self.text(node.value, names)
        return self.text(node, names)

    def _table(self, node: ast.Dict, names: Names) -> Table:
        texts: dict[str, str] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            text = constant_text(self.text(value, names))
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str) or text is None:
                raise NotUnderstood(f"line {node.lineno}: expected a table of constant texts")
            texts[key.value] = text
        return Table(texts)

    def _subscript(self, node: ast.Subscript, names: Names) -> Value:
        base, key = self._value(node.value, names), self.text(node.slice, names)
        constant = constant_text(key)
        if isinstance(base, TheRecord) and constant is not None:
            return self._field(constant)
        if isinstance(base, Table):
            if constant is not None and constant in base.texts:
                return joined((Text(base.texts[constant]),))
            if len(key) == 1 and isinstance(key[0], Fact):
                return (Lookup(tuple(base.texts.items()), key[0]),)
        raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")

    def _field(self, name: str) -> Pieces:
        return self._fields.get(name, (Fact(f"record[{literal(name)}]"),))

    def _get(self, node: ast.Call, function: ast.Attribute, names: Names) -> Value:
        if isinstance(self._value(function.value, names), TheRecord) and node.args:
            name = constant_text(self.text(node.args[0], names))
            if name is not None:
                return self._field(name)
        raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")

    def _format(self, node: ast.Call, function: ast.Attribute, names: Names) -> Pieces:
        form = constant_text(self.text(function.value, names))
        values = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        values |= {str(number): value for number, value in enumerate(node.args)}
        if form is None or len(values) < len(node.keywords) + len(node.args):
            raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")
        parts: list[Pieces] = []
        numbers = count()
        try:
            for text, name, spec, conversion in string.Formatter().parse(form):
                parts.append((Text(text),))
                if name is None:
                    continue
                name = name or str(next(numbers))
                if spec or conversion or name not in values:
                    raise NotUnderstood(f"line {node.lineno}: {{{name}}} of the text to format is not understood")
                parts.append(self.text(values[name], names))
        except ValueError as error:
            raise NotUnderstood(f"line {node.lineno}: the text to format is not valid: {error}") from error
        return self._limited(node, *parts)

    def _string_template(self, node: ast.Call, names: Names) -> Pieces:
        """``Template(text)``, in which $name stands for a field of the record and $$ for a dollar sign."""
        form = constant_text(self.text(node.args[0], names))
        if form is None:
            raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")
        parts: list[Pieces] = []
        place = 0
        for match in string.Template.pattern.finditer(form):
            parts.append((Text(form[place : match.start()]),))
            place = match.end()
            name = match.group("named") or match.group("braced")
            if name is not None and name not in self._fields or match.group("invalid") is not None:
                raise NotUnderstood(f"line {node.lineno}: {match.group()!r} of the template is not understood")
            parts.append((Text("$"),) if name is None else self._field(name))
        return self._limited(node, *parts, (Text(form[place:]),))

    def _join(self, node: ast.Call, function: ast.Attribute, names: Names) -> Pieces:
        """``separator.join(text of x for x in list of the record)``."""
        separator = constant_text(self.text(function.value, names))
        made = node.args[0] if len(node.args) == 1 else None
        if separator is None or not isinstance(made, ast.ListComp | ast.GeneratorExp) or len(made.generators) != 1:
            raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")
        loop = made.generators[0]
        targets = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
        items = self._items(loop.iter, names, pairs=len(targets) == 2)
        if items is None or loop.ifs or not all(isinstance(target, ast.Name) for target in targets):
            raise NotUnderstood(f"line {node.lineno}: {_shown(node)} is not understood")
        variables = tuple(f"item_{next(self._counter)}" for _ in targets)
        inner = dict(names)
        for target, variable in zip(targets, variables, strict=True):
            assert isinstance(target, ast.Name)
            inner[target.id] = (Fact(variable),)
        return (Each(variables, items, self.text(made.elt, inner), separator),)

    def _items(self, node: ast.expr, names: Names, *, pairs: bool = False) -> str | None:
        """The Jinja expression of a list of the record, or of a mapping's pairs; None if it is none."""
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "items"
        if is_call != pairs:
            return None
        value = self._value_or_unknown(node.func.value if is_call else node, names)  # type: ignore[union-attr]
        if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Fact):
            return f"lettered({value[0].expression})" if pairs else value[0].expression
        return None

    def _condition(self, node: ast.expr, names: Names) -> bool | str | None:
        """Whether a condition holds; a Jinja expression if that depends on the record; None if it is unknown."""
        if not isinstance(node, ast.Compare) or len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return None
        sides = [self._value_or_unknown(side, names) for side in (node.left, node.comparators[0])]
        texts = [constant_text(side) if isinstance(side, tuple) else None for side in sides]
        is_equal = isinstance(node.ops[0], ast.Eq)
        if texts[0] is not None and texts[1] is not None:
            return (texts[0] == texts[1]) == is_equal
        for side, text in ((sides[0], texts[1]), (sides[1], texts[0])):
            if isinstance(side, tuple) and len(side) == 1 and isinstance(side[0], Fact) and text is not None:
                return f"{side[0].expression} {'==' if is_equal else '!='} {literal(text)}"
        return None

    def _limited(self, node: ast.expr, *parts: Pieces) -> Pieces:
        if not _fits(*parts):
            raise NotUnderstood(f"line {node.lineno}: the text has more than {MOST_SIZE} characters")
        return joined(*parts)


def _behind(value: Value | None, *, start: Pieces) -> Pieces | None:
    """What a loop adds to a text that is ``start`` when it begins; None if it does something else with a text."""
    if isinstance(value, tuple) and value[:1] == start and "so far>" not in repr(value[1:]):
        return value[1:]
    return None


def _is_left_early(loop: ast.For) -> bool:
    return any(isinstance(node, ast.Break | ast.Continue | ast.Return) for node in ast.walk(loop))


def _fits(*parts: Pieces) -> bool:
    return sum(map(size_of, parts)) <= MOST_SIZE


def _unknown(node: ast.AST, reason: str) -> Unknown:
    return Unknown(f"line {getattr(node, 'lineno', 0)}: {reason}")


def _assigned(nodes: list[ast.stmt] | list[ast.expr]) -> list[str]:
    """All names that are assigned or imported somewhere in ``nodes``."""
    inner = [node for root in nodes for node in ast.walk(root)]
    stored = [node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    imported = [node.asname or node.name.partition(".")[0] for node in inner if isinstance(node, ast.alias)]
    return list(dict.fromkeys([*stored, *imported]))


def _shown(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 80 else text[:77] + "..."
