"""Names in two or three words for the reasons why records cannot be used, under which they are counted.

The reason itself is the sentence of the check that training makes (``records.check_record``,
``record_check.RecordChecker``). Its kind is found by the words of that sentence.
"""

from __future__ import annotations

import re

DOES_NOT_DECODE = "does not decode"
DECODING_HANGS = "decoding hangs"
DECODING_CRASHES = "decoding crashes"
PROMPT_TOO_LONG = "prompt too long"
DUPLICATE_ID = "duplicate id"
ONLY_A_CLIP = "shows only a clip"
OTHER = "wrong field"
"""A field has a value that cannot be read, or that contradicts another field or the run's limits."""

_KINDS: tuple[tuple[str, str], ...] = (
    ("not a record", r"^expected an object, got"),
    ("text not writable", r"^expected text in whole characters|^expected less nesting"),
    ("no question", r"^expected a question as text"),
    ("no answer", r"^expected the right answer as text"),
    ("no response", r"^no response to imitate|^an answer is empty|^'response' differs"),
    ("control token", r"contains the control token"),
    ("markers do not match", r" places for (image|video)s |has a marker <image> or <video>"),
    ("unknown type", r"^the reward \w+ does not know problem_type"),
    ("answer not among options", r"^the right answer .* is not among its options"),
    ("missing file", r": no such file below media_root$"),
    ("wrong folder", r": (holds |is a folder without |is a file, and a path |'.*' and '.*' have the same place )"),
    ("not a file", r": is a folder; where"),
    (
        "leaves the root",
        r"^media path .*(: expected a path below media_root | leads by a link out of media_root | below media_root )",
    ),
    ("field not followed", r"^(field|key) '.*' .*is not followed"),
    ("media not named", r"^it names no image or video but has a field"),
    ("wording fails", r"^prompt_template: "),
    ("wrong conversation", r"\bmessages?\b|\bconversations?\b|\bassistant's?\b|assistant turn"),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.DOTALL)) for kind, pattern in _KINDS)
KINDS = (*(kind for kind, _ in _KINDS), OTHER, DOES_NOT_DECODE, DECODING_HANGS, DECODING_CRASHES, PROMPT_TOO_LONG)
"""All kinds of reasons that make a record unusable."""


def kind_of(reason: str) -> str:
    """>>> kind_of("'clips/1.mp4': no such file below media_root")
    'missing file'
    """
    return next((kind for kind, pattern in _PATTERNS if pattern.search(reason)), OTHER)
