"""Loads the media of coming samples while the training uses the present ones.

The sequence of elements is a function of the position, so that it can be read ahead without a change of state: what was
read ahead and is not used is simply forgotten. Elements are handed out strictly in their order, however long each took.
So the prompts of a run, its counts and its state are the same for every number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError

MOST_BYTES = 8_000_000_000
"""Frames that are held ready. Beyond it nothing more is read ahead, except the next sample."""

_FIRST_GUESS_BYTES = 50_000_000
"""What a sample is taken to need until the first one is loaded."""

SampleMedia = list[LoadedMedia | UnusableMedia]
"""The media of one sample in their order. It ends early after one that makes the sample unusable."""


class InSequence(Protocol):
    """An element of the sequence."""

    @property
    def next_position(self) -> int:
        """The position after the element."""
        ...


E = TypeVar("E", bound=InSequence)


@dataclass(frozen=True)
class _Pending(Generic[E]):
    position: int
    element: E
    media: Future[SampleMedia]


class LookAhead(Generic[E]):
    """``take`` returns the elements of a sequence one after the other, with their media, and keeps later ones loading.

    It belongs to one thread.
    """

    def __init__(
        self,
        *,
        element_at: Callable[[int], E],
        submit: Callable[[E], Future[SampleMedia]],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """``element_at`` gives the first element at or after a position; ``submit`` begins to load its media."""
        self._element_at = element_at
        self._submit = submit
        self._most_bytes = most_bytes
        self._pending: deque[_Pending[E]] = deque()
        self._largest = 0

    def take(self, position: int, *, num_wanted: int) -> tuple[E, Future[SampleMedia]]:
        """The element at ``position`` with its media, which may still be loading. ``num_wanted`` elements, this one
        included, are then loading or loaded, unless they take too much memory.

        Raises:
            UserError: there is no further element (as ``element_at`` says).
        """
        if self._pending and self._pending[0].position != position:  # the state was loaded
            self.drop()
        if not self._pending:
            self._append(position)
        self._fill(num_wanted)
        first = self._pending.popleft()
        return first.element, first.media

    def drop(self) -> None:
        """Forgets what was read ahead."""
        while self._pending:
            self._pending.pop().media.cancel()

    def _fill(self, num_wanted: int) -> None:
        sizes = [_num_bytes(one.media) for one in self._pending if one.media.done()]
        self._largest = max(self._largest, *sizes, 0)
        # Media that are not loaded yet count as the largest so far.
        size = self._largest or _FIRST_GUESS_BYTES
        expected = sum(sizes) + size * (len(self._pending) - len(sizes))
        while len(self._pending) < num_wanted and expected < self._most_bytes:
            try:
                self._append(self._pending[-1].element.next_position)
            except UserError:  # raised again when its turn comes
                return
            expected += size

    def _append(self, position: int) -> None:
        element = self._element_at(position)
        self._pending.append(_Pending(position, element, self._submit(element)))


def _num_bytes(media: Future[SampleMedia]) -> int:
    if media.cancelled() or media.exception() is not None:
        return 0
    return sum(one.visual.frames_FCHW.nbytes for one in media.result() if isinstance(one, LoadedMedia))
