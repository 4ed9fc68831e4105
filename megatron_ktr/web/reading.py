"""Reads what a server sends, of which no byte is trusted: a reply is bounded in size and is never unpacked.

Time is bounded by the callers, who put a limit on the whole exchange: a server that sends a byte a second is as late as
one that sends nothing. Headers are bounded by the HTTP library (100 kB). Redirects are not followed, and cookies are
neither kept nor sent.
"""

from __future__ import annotations

from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

PLAIN = {"Accept-Encoding": "identity"}
"""The header of every request: a reply that is unpacked can be a thousand times what was received."""


class Unfit(Exception):
    """The reply is too large, or packed."""


def no_cookies() -> CookieJar:
    """A jar that stays empty: a server could otherwise fill the memory with them, one reply at a time."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


async def read_bounded(reply: httpx.Response, *, most_bytes: int) -> bytes:
    """The body of a reply that is being received.

    Raises:
        Unfit: it has more than ``most_bytes``, or is encoded.
        httpx.HTTPError: the connection broke.
    """
    encoding = reply.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise Unfit(f"a reply that is encoded as {encoding[:40]}, which was not asked for")
    content = bytearray()
    async for piece in reply.aiter_raw():
        content += piece
        if len(content) > most_bytes:
            raise Unfit(f"a reply of more than {most_bytes} bytes")
    return bytes(content)
