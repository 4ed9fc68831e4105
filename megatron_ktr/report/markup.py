"""Builds HTML from elements, so that all text is escaped.

``element`` escapes every child and attribute that is not ``Html`` already, so that text from a model can never become
markup. Only this file, and constants of this package, make ``Html`` from plain strings.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = {"meta", "img", "br", "input", "link", "path", "polyline", "polygon", "rect", "line", "circle"}
"""Elements without content. Those of SVG are closed as in XML, which HTML accepts."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Also the characters that override the direction of what follows: they would turn around the words of the page."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = Html | str | int | float | None | Iterable["Child"]


def escape(text: str) -> Html:
    """``text`` as HTML text, also fit for a quoted attribute. Characters that HTML forbids (control characters, lone
    surrogates), and those that override directions, become U+FFFD, so that the page can always be written and parsed.

    >>> escape('<b a="1">&')
    '&lt;b a=&quot;1&quot;&gt;&amp;'
    """
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True))


def join(children: Child) -> Html:
    """All children, one after the other. ``Html`` is kept as it is, text and numbers are escaped, ``None`` is left out,
    and iterables are flattened."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return escape(str(children))
    return Html("".join(join(child) for child in children))


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """One element. In names of attributes ``_`` becomes ``-``, and a trailing ``_`` is dropped (``class_``). Attributes
    that are ``None`` or False are left out; True is written without a value.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        written.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    start = f"<{name}{''.join(written)}"
    return Html(f"{start}/>") if name in _VOID and not children else Html(f"{start}>{join(children)}</{name}>")


def format_number(value: float | None, *, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, if possible without an exponent. None is "-"; NaN and infinity are
    written as words.

    >>> [format_number(value) for value in (0.123456, 1234567.0, 12.0, -2e-08, float("nan"), None)]
    ['0.1235', '1,234,567', '12', '-2e-08', 'NaN', '-']
    """
    if value is None:
        return "-"
    if value != value:
        return "NaN"
    if abs(value) == float("inf"):
        return "infinite" if value > 0 else "-infinite"
    if abs(value) >= 1000 and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
