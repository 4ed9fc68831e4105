"""What the file of a benchmark says about it: how its questions are read, asked, judged and summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ktr.evaluation.engines.base import AnswerSampling
from megatron_ktr.evaluation.item import Item, Verdict

Judge = Callable[[Item, str], Verdict]
"""Judges the whole response (not only its answer block) to an item."""


@dataclass(frozen=True)
class FrameRule:
    """How a benchmark chooses the frames of a video, where the number of frames is the user's."""

    rule: Literal["fps", "fixed", "resampled"] = "fps"
    """One of ``data/media/sampling.py``."""
    fps: float = 2.0
    max_pixels: int = 256 * 28 * 28
    """Of one frame."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. Everything that is not said here is the same for all."""

    name: str
    title: str
    read: Callable[[Path], list[Item]]
    """Reads the published file or folder.

    Raises:
        UserError: this is not a layout of the benchmark.
    """
    official: Judge
    """The judge behind the paper's figure."""
    other_judges: Mapping[str, Judge] = field(default_factory=dict)
    """Further published judges by name of the protocol's column, e.g. that of the benchmark's authors."""
    axes: Sequence[str] = ()
    """Axes of categories in the order of the tables."""
    macro_axis: str | None = None
    """If set, the overall figure is the mean over this axis' categories, else the mean over items."""
    inner_axis: str | None = None
    """If set, the figure of a category of ``macro_axis`` is itself the mean over this axis' categories in it."""
    sampling: AnswerSampling = AnswerSampling()
    frames: FrameRule = FrameRule()
    media_folders: Sequence[str] = ()
    """The folder below the media root that the paths of the items begin with, and then others in which people keep the
    same videos; "" is the media root itself. In a folder that ends in "*" they lie side by side, without the folders of
    their paths. ``media_places.place_media`` chooses the one that is there."""
    wording: str = "video_r1"
    """Name of a built-in wording (``data/wording.py``): our own words for the instruction."""
    import_release: str | None = None
    """The entry of ``data/wording_import/releases.py`` with the benchmark's own words, as ``release/part``."""
    num_questions: int | None = None
    """Questions behind the published figures; None if it is not known. The tables say so where ours are another number:
    half a download is not the benchmark."""
    source: str = ""
    """Where the protocol was read: repository, file."""
