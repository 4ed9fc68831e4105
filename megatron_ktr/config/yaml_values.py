"""Values of a run file: what YAML makes of them, and what is refused because it is not what was meant."""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

from megatron_ktr.errors import UserError


def shorten(value: Any) -> str:
    """``value`` as Python writes it, cut to what fits a line."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"{type(value).__name__} of endless length"
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = reprlib.Repr()
"""Looks at the beginning alone: a few lines of YAML can stand for a list of any size."""
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_UNLIKE_FLAGS = re.compile(r"[-+]?0[0-7_]+$|.*:|[-+]?0[bx]")
"""Numbers of YAML 1.1 to the base 8 (010), 60 (1:30), 2 and 16."""


class RunFileLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice (plain YAML silently keeps the last) and a number that would be
    another one as a flag. Its errors are all YAML's: values that look like a date or a number, and are none, raise
    whatever Python raises."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and _UNLIKE_FLAGS.match(node.value):
            said = f"{shorten(node.value)} is another number in YAML than as a flag; write it out, or quote it as text"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shorten(node.value)} is no {kind} ({error})", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # << takes in what another mapping has
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key if isinstance(key, (str, int, float)) else id(key_node))
        return super().construct_mapping(node, deep)
