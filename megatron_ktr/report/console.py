"""Prints a response with its key tokens marked, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ktr.types import ResponseSelection, Rollout

MAX_OPEN_TOKENS = 8
"""After this many tokens that complete no character, their bytes cannot be text, as a character has at most four."""


def selected_tokens_text(
    rollout: Rollout, selection: ResponseSelection, *, decode: Callable[[Sequence[int]], str]
) -> str:
    """The response with every key token as ``[text|SIGNALS]``. A signal is shown by its first letter: Entropy, Visual,
    Temporal.

    If no signal selects, so that every token carries the loss, this is the plain text. ``decode`` turns token ids into
    text.

    >>> rollout = Rollout(token_ids=(1, 2))
    >>> selection = ResponseSelection(is_key_token=(False, True), is_selected={"visual": (False, True)})
    >>> selected_tokens_text(rollout, selection, decode=lambda ids: "".join(" a" if i == 1 else " red" for i in ids))
    ' a [red|V]'
    """
    if not selection.is_selected:
        return decode(rollout.token_ids)
    pieces = []
    for index, text in enumerate(token_texts(rollout.token_ids, decode=decode)):
        is_key = selection.is_key_token[index]
        letters = "".join(name[0].upper() for name, marks in selection.is_selected.items() if is_key and marks[index])
        core = text.strip()
        lead, trail = text.split(core, 1) if core else ("", "")
        pieces.append(f"{lead}[{core or repr(text)[1:-1]}|{letters}]{trail}" if letters else text)
    return "".join(pieces)


def token_texts(token_ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to the decoded response.

    Tokens are not decoded one by one, because that would lose the blanks between words. A token that ends inside a
    character adds nothing, and the one that completes the character adds all of it.
    """
    texts: list[str] = []
    first = settled = 0  # the tokens before ``first`` are never looked at again: long responses take linear time
    for end in range(1, len(token_ids) + 1):
        before, after = decode(token_ids[first:settled]), decode(token_ids[first:end])
        is_open = after.endswith("\ufffd") or not after.startswith(before)
        if is_open and end - settled < MAX_OPEN_TOKENS:
            texts.append("")
            continue
        texts.append(after[len(before) :])
        first, settled = settled, end
    return texts
