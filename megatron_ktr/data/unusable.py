"""Why one sample cannot be used. These are skipped and counted; anything else that goes wrong stops the run."""

from __future__ import annotations


class UnusableSample(Exception):
    """A sample that must be skipped: ``source`` says which one (a path or a record), ``reason`` why, in one line."""

    kind = "unusable_sample"
    """Name under which the skip is counted."""

    def __init__(self, source: object, reason: object) -> None:
        self.source = str(source)
        self.reason = " ".join(str(reason).split()) or "unknown reason"
        super().__init__(f"{self.source}: {self.reason}")


class UnusableMedia(UnusableSample):
    """A picture or video that is missing, damaged, empty or in a format that no decoder here can read."""

    kind = "unusable_media"


class PromptTooLong(UnusableSample):
    """A prompt of more tokens than allowed. Visual tokens are never cut, so the whole sample is rejected."""

    kind = "prompt_too_long"
