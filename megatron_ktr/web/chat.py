"""OpenAI's chat API: the models of a server, and what its completions say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_ktr.errors import UserError, printable
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.web.address import KEY_OPTION
from megatron_ktr.web.client import REDIRECTED, NoReply, Refusal, Web

MAKERS = {"vllm": "vllm", "sglang": "sglang"}
"""The kind of a server by ``owned_by`` of its models; all others are of the kind "openai"."""
_START_RETRIES = 2


@dataclass(frozen=True)
class Reply:
    """What a completion says."""

    text: str
    is_finished: bool
    num_tokens: int
    num_prompt_tokens: int


def read_reply(body: bytes, *, clean: Any = str) -> Reply:
    """The one choice of a completion. ``clean`` is applied to its text.

    A response that a filter ended counts as finished, and a refusal is the text of the response: asking again would
    give the same. A response whose limit of tokens was used up before its text began is cut off, and empty.

    Raises:
        ValueError: the body is no completion with a text.
    """
    try:
        found = parse_json(body.decode("utf-8"))
        choice = found["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is None and message.get("refusal") is not None:
            text = message["refusal"]
        if text is None and reason in ("length", "content_filter"):
            text = ""
        usage = found.get("usage") or {}
        counts = [usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
    except (LookupError, TypeError, AttributeError) as error:
        message = _error_in(body)
        raise ValueError(message or f"no completion ({type(error).__name__} {error})") from None
    if not isinstance(text, str):
        raise ValueError(f"a completion without text (finish_reason {reason!r})")
    numbers = [count if type(count) is int and 0 <= count < 2**31 else 0 for count in counts]
    return Reply(clean(text), reason != "length", *numbers)


def _error_in(body: bytes) -> str:
    """The message of an error that a server sends with status 200."""
    try:
        return str(parse_json(body.decode("utf-8"))["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""


async def served_models(web: Web, *, key_option: str = KEY_OPTION) -> list[dict[str, Any]] | None:
    """The models that a server lists; None if it has no such list. ``key_option`` is named where it refuses the key.

    Raises:
        UserError: no server answers, or it refuses the key.
    """
    try:
        read = partial(_models, clean=web.cleaned)
        return await web.fetch("GET", f"{web.address.api}/models", None, read=read, retries=_START_RETRIES)
    except NoReply as error:
        raise UserError(f"{web.address.api}: {error}") from None
    except Refusal as error:
        if error.status in (401, 402, 403):
            raise UserError(f"{web.address.api} refuses the key ({key_option} NAME): {error}") from None
        if 300 <= error.status < 400:
            raise UserError(f"{web.address.api}: {error}{REDIRECTED}") from None
        return None


def _models(body: bytes, *, clean: Callable[[str], str] = str) -> list[dict[str, Any]] | None:
    """(id, root, owned_by) of each model. An id that cannot be shown as it is cannot be chosen."""
    try:
        found = parse_json(body.decode("utf-8"))["data"]
        named = {model["id"]: model for model in found if isinstance(model.get("id"), str)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return [
        {name: printable(clean(str(model.get(name) or ""))) for name in ("id", "root", "owned_by")}
        for name, model in named.items()
        if name and printable(clean(name)) == name
    ]


def choose_model(
    models: list[dict[str, Any]] | None, *, wanted: str | None, where: str, option: str = "--served-model"
) -> tuple[str, Mapping[str, Any]]:
    """(the served name, what the server says about the model).

    Only vLLM and SGLang list all names that they take; elsewhere a name that is not listed may be right.

    Raises:
        UserError: no model is named and the server has several or lists none, or it does not have the one named.
    """
    models = models or []
    names = [model["id"] for model in models]
    listed = f"it has {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}" if names else "it lists no models"
    if wanted is None:
        if len(names) != 1:
            raise UserError(f"{where}: which model? {option} NAME; {listed}")
        return names[0], models[0]
    served = next((model for model in models if model["id"] == wanted), None)
    if served is None and any(model.get("owned_by") in MAKERS for model in models):
        raise UserError(f"{where} has no model {wanted!r} ({option}); {listed}")
    return wanted, served or {}
