"""A page with its style and script inside, and writing it. Whatever text it shows, it loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import to_json
from megatron_ktr.report.markup import Html, element, join
from megatron_ktr.report.style import STYLE

_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Forbids browsers to load anything from outside, whatever the page contains."""
_SCRIPT_POLICY = (
    "default-src 'none'; script-src 'sha256-{digest}'; img-src 'self' file: data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
"""Allows one script, by its digest, and pictures that lie beside the page. Chromium takes these for 'self' on a page
that is opened as a file too; ``file:`` says the same to browsers that do not."""


@dataclass(frozen=True)
class Extras:
    """What a page has beside the common style sheet."""

    style: str = ""
    script: str = ""
    """A constant of this package, without text of others."""
    data: Any = None
    """JSON for the script."""
    generator: str = ""
    """A name in the head, by which ``write_page`` knows the pages that it may replace."""


def whole_page(title: str, body: Sequence[Html], *, extras: Extras | None = None) -> str:
    """The page as text, with the style sheet inside."""
    extras = extras or Extras()
    policy, ending = _CONTENT_POLICY, []
    if extras.script:
        digest = base64.b64encode(hashlib.sha256(extras.script.encode()).digest()).decode("ascii")
        policy = _SCRIPT_POLICY.format(digest=digest)
        # All but ASCII is escaped by JSON, and "<" here, so that no text ends the element.
        data = to_json(extras.data, separators=(",", ":")).replace("<", "\\u003c")
        ending = [Html(f'<script type="application/json" id="data">{data}</script><script>{extras.script}</script>')]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=extras.generator) if extras.generator else None,
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Html(f"<style>{STYLE}{extras.style}</style>"),
    ]
    return f'<!DOCTYPE html>\n<html lang="en"><head>{join(head)}</head>\n<body>{join([*body, *ending])}</body></html>\n'


def write_page(path: Path, page: str, *, generator: str = "") -> int:
    """Writes the page, whole or not at all, and returns its size in bytes.

    Args:
        generator: replaces only a page with this name in its head; "" replaces any page.

    Raises:
        UserError: that fails, or something else than such a page is there.
    """
    content = page.encode("utf-8")
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                beginning = file.read(500)
            if not beginning[:15].lower().startswith(b"<!doctype html"):
                raise UserError(f"--out {path} is there and is no page: name another file")
            if generator and element("meta", name="generator", content=generator).encode() not in beginning:
                raise UserError(f"--out {path} is there and is a page of something else: name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from error
    return len(content)
