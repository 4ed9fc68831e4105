"""Errors of single samples that cannot be used. Such samples are skipped and counted; other errors stop the run."""

from __future__ import annotations


class UnusableSample(Exception):
    """A sample must be skipped. ``source`` says which one (a path or a record); ``reason`` says why, in one line."""

    kind = "unusable_sample"
    """The name under which the skip is counted."""

    def __init__(self, source: object, reason: object) -> None:
        self.source = str(source)
        self.reason = " ".join(str(reason).split()) or "unknown reason"
        super().__init__(f"{self.source}: {self.reason}")


class UnusableMedia(UnusableSample):
    """A picture or video is missing, damaged, empty or in a format that no decoder here can read."""

    kind = "unusable_media"


class PromptTooLong(UnusableSample):
    """A prompt has more tokens than allowed. Visual tokens are never cut, so the whole sample is rejected."""

    kind = "prompt_too_long"
