"""Texts that break readers: numbers without end, nesting without end, odd encodings, keys given twice."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

DEEP = 100_000
HOSTILE_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "NUL": b"\0" * 100,
    "a mark": b"\xef\xbb\xbf",
    "a mark, then JSON": b'\xef\xbb\xbf{"a": 1}\n',
    "UTF-16": '{"a": 1}\n'.encode("utf-16"),
    "UTF-32": '{"a": 1}\n'.encode("utf-32"),
    "no UTF-8": b'{"a": "\xff\xfe"}\n',
    "half a character": b'{"a": "\\ud800"}\n',
    "NUL in a text": b'{"a": "\\u0000"}\n',
    "key twice": b'{"a": 1, "a": 2}\n',
    "no number": b'{"a": NaN, "b": Infinity, "c": -Infinity}\n',
    "beyond a float": b'{"a": 1e400, "b": -1e400}\n',
    "long number": b'{"a": ' + b"9" * 10_000 + b"}\n",
    "long fraction": b'{"a": 0.' + b"9" * 10_000 + b"e-999999}\n",
    "deep list": b"[" * DEEP,
    "deep whole list": b"[" * DEEP + b"]" * DEEP,
    "deep object": b'{"a":' * DEEP,
    "deep text of YAML": b"a: " + b"{a: " * 1500,
    "deep block of YAML": b"- " * 1500 + b"a",
    "laughs": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (98 + n, 98 + n, 97 + n, 97 + n, 97 + n, 97 + n) for n in range(20)),
    "tag": b"a: !!python/object/apply:os.system [ls]\n",
    "bites its tail": b"a: &a [*a]\n",
    "two lines": b'{"a": 1}\n[]\n',
    "old line ends": b'{"a": 1}\r{"a": 2}\r',
    "no end": b'{"a": "b',
    "escape": b'{"\x1b[2J": 1}\n',
    "list": b"[1, 2]\n",
    "text": b'"a"\n',
    "number": b"1\n",
    "null": b"null\n",
    "table": b'a,b\n1,2,3\n"x',
    "heading": b"a,a\n1,2\n",
    "parquet": b"PAR1" + b"\xff" * 64 + b"PAR1",
    "arrow": b"ARROW1\0\0" + b"\xff" * 64,
}

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from(
        [10**400, 1e308, 2**63, -1, 0, "", " ", "\0", "\x1b[2J", "\u202e", "a" * 3000, "../x", "/dev/zero", "9" * 5000]
    ),
    st.text(max_size=8),
    st.characters(categories=["Cs"]),
)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """``original`` with one to three of its values, at any depth, replaced, left out or doubled."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = value, None, None
        while isinstance(place, dict | list) and place and (parent is None or draw(st.integers(0, 3))):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            parent, place = place, place[key]
        if parent is None:
            return draw(VALUES)
        if draw(st.integers(0, 4)):
            parent[key] = draw(VALUES)
        elif isinstance(parent, dict):
            del parent[key]
        else:
            parent.append(place)
    return value
