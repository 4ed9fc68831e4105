"""Addresses of servers, and the keys that open them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from megatron_ktr.errors import UserError, unreadable
from megatron_ktr.terminal import HIDDEN, LEAST_SECRET, keep_secret

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[!-~]+")
"""Printable ASCII without blanks. Anything else could not stand in a header, and the error would show it."""
KEY_OPTION = "--api-key-env"
_MOST_FILE_BYTES = 4096


class ApiKey:
    """A key that is sent, and shown nowhere."""

    def __init__(self, value: str) -> None:
        self._value = value
        keep_secret(value)

    @classmethod
    def from_environment(cls, name: str, *, option: str = KEY_OPTION) -> ApiKey:
        """The key in the environment variable ``name``, which ``option`` gives.

        Raises:
            UserError: there is none. The message does not repeat ``name``: somebody may have given the key itself.
        """
        check_variable_name(name, option=option)
        value = os.environ.get(name, "")
        if not value:
            raise UserError(f"{option}: the environment variable that it names is not set, or is empty")
        if not _KEY.fullmatch(value):
            raise UserError(f"{option}: the variable's value has blanks, line ends or other than ASCII characters")
        return cls(value)

    @classmethod
    def from_file(cls, path: Path | str, *, option: str) -> ApiKey:
        """The key in a file, which may end with a line end.

        Raises:
            UserError: it cannot be read, or does not hold one key. The message does not repeat what it holds.
        """
        try:
            # Without waiting, should it be a pipe that nobody writes into.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                raw = file.read(_MOST_FILE_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError as error:
            raise unreadable("the file with the token", error, option=option) from error
        except ValueError:
            raise UserError(f"{option}: the file with the token cannot be read: not a path") from None
        if raw is None:
            raise UserError(f"{option}: expected a file with the token, got something else")
        try:
            value = raw.decode("ascii").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            value = ""
        if len(raw) > _MOST_FILE_BYTES or not _KEY.fullmatch(value):
            raise UserError(f"{option}: expected a file with one line, the token, without blanks")
        return cls(value)

    @property
    def length(self) -> int:
        return len(self._value)

    def is_in(self, authorization: str) -> bool:
        """Whether the value of a header ``Authorization`` holds this key. The time it takes does not tell how much of a
        wrong key is right."""
        scheme, _, given = authorization.partition(" ")
        digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, self._value)]
        return hmac.compare_digest(*digests) and scheme.lower() == "bearer"

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"}

    def hide(self, text: str) -> str:
        """``text`` without the key: servers quote it in errors."""
        return text.replace(self._value, HIDDEN)

    def hide_in_answer(self, text: str) -> str:
        """The same for what a model says. Servers of one's own often have keys such as "EMPTY", which an answer may
        hold by chance, and must keep."""
        return self.hide(text) if len(self._value) >= LEAST_SECRET else text

    def __repr__(self) -> str:
        return f"ApiKey({HIDDEN})"

    def __reduce__(self) -> str:
        raise TypeError("a key is not pickled")


def check_variable_name(name: str, *, option: str = KEY_OPTION) -> None:
    """Raises ``UserError`` if this cannot be the name of a variable, without repeating it."""
    if not _VARIABLE.fullmatch(name):
        raise UserError(
            f"{option} takes the NAME of an environment variable (letters, digits, underscores), not the key"
        )


@dataclass(frozen=True)
class Address:
    """A server's address in its two forms."""

    root: str
    """Scheme, host and port, and what comes before a last part /v1."""
    api: str
    """What OpenAI's routes are appended to, such as https://api.openai.com/v1."""
    is_loopback: bool

    @classmethod
    def read(cls, url: str, *, option: str = "--server-url", key_option: str = KEY_OPTION) -> Address:
        """``http://host:8000``, ``http://host:8000/v1`` or another prefix of ``/chat/completions``.

        Raises:
            UserError: this is no such URL, or it holds a name, a password or a query, which may be secret.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
            raise UserError(f"{option}: this is not a URL such as http://host:8000") from None
        # An empty query or fragment is none to ``parts``, and would still take in what is appended.
        if parts.username is not None or parts.password is not None or "?" in url or "#" in url:
            raise UserError(f"{option}: a URL without user, password, query and fragment; keys: {key_option} NAME")
        if parts.scheme not in ("http", "https") or not host or port == 0:
            shown = HIDDEN if "@" in url else repr(url[:200])  # user:password@host without its scheme
            raise UserError(f"{option}: expected a URL such as http://host:8000, got {shown}")
        base = url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
        has_path = bool(urlsplit(base).path)
        return cls(root=base.removesuffix("/v1"), api=base if has_path else f"{base}/v1", is_loopback=is_loopback(host))


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``, a name or an address."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
