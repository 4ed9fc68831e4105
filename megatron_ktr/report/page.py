"""A page that contains everything it needs, and writing it. Whatever text it shows, it loads nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.report.markup import Html, element, join
from megatron_ktr.report.style import STYLE

_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Forbids browsers to load anything from outside, whatever the page contains."""


def whole_page(title: str, body: Sequence[Html]) -> str:
    """The page as text, with the style sheet inside."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_CONTENT_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Html(f"<style>{STYLE}</style>"),
    ]
    return f'<!DOCTYPE html>\n<html lang="en"><head>{join(head)}</head>\n<body>{join(body)}</body></html>\n'


def write_page(path: Path, page: str) -> int:
    """Writes the page, whole or not at all, and returns its size in bytes.

    Raises:
        UserError: that fails, or something else than a page is there.
    """
    content = page.encode("utf-8")
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if not file.read(15).lower().startswith(b"<!doctype html"):
                    raise UserError(f"--out {path} is there and is no page: name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from error
    return len(content)
