"""The output directory of an evaluation while it is written: locked, with settings that fit what it holds already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking import settings as settings_file
from megatron_ktr.evaluation.asking.outcomes import ITEMS_FILE, Outcomes, has_items, read_items, write_items
from megatron_ktr.evaluation.asking.settings import EvaluationSettings, digest_of, read_settings
from megatron_ktr.evaluation.asking.store import AnswerStore, DirectoryLock
from megatron_ktr.evaluation.item import Item


class OutputDirectory:
    """A context that keeps other evaluations out. ``take_over`` opens it for answers."""

    outcomes: Outcomes
    store: AnswerStore

    def __init__(self, path: Path) -> None:
        """Makes the directory if it is not there, and locks it.

        Raises:
            UserError: it holds something else, another process is writing to it, or it cannot be written.
        """
        check_is_ours(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path} cannot be made: {error.strerror}") from error
        self.path = path
        self._lock = DirectoryLock(path)

    def take_over(self, settings: EvaluationSettings, items: Sequence[Item]) -> int:
        """Adds what this command asks to what was asked before, and opens the answers. Returns how many questions have
        another text, options or solution than when they were asked.

        Args:
            items: the items of the benchmarks of ``settings``.

        Raises:
            UserError: the directory holds an evaluation with other settings, or cannot be written.
        """
        earlier = read_settings(self.path)
        if earlier is not None:
            settings = settings.after(earlier, directory=self.path)
        old = [] if earlier is None else read_items(self.path, earlier)
        known = {(item.benchmark, item.item_id): digest_of(item) for item in old}
        digests = [(known.get((item.benchmark, item.item_id)), digest_of(item)) for item in items]
        asked_now = {item.benchmark for item in items}
        now = {(item.benchmark, item.item_id) for item in items}
        gone = [item for item in old if item.benchmark in asked_now and (item.benchmark, item.item_id) not in now]
        if gone:
            raise UserError(
                f"--benchmark: {len(gone)} questions of --out {self.path}, such as {gone[0].item_id} of "
                f"{gone[0].benchmark}, are not among those of this command: is it another file? Use another --out"
            )
        settings.as_bytes()
        together = [*(item for item in old if item.benchmark not in asked_now), *items]
        try:
            # Items before settings: settings that are there speak of items that are there.
            write_items(self.path, together)
            settings.write(self.path)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {error.strerror}") from error
        self.outcomes = Outcomes(settings, together)
        self.store = AnswerStore(self.path)
        return sum(before is not None and before != now for before, now in digests)

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if hasattr(self, "store"):
                self.store.close()
        finally:
            self._lock.release()


def check_is_ours(path: Path) -> None:
    """Raises ``UserError`` for a directory with content that no evaluation wrote, and for a file."""
    try:
        names = {found.name for found in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise UserError(f"--out {path} cannot be used as a directory: {error.strerror}") from error
    others = sorted(name for name in names if not name.startswith("."))
    # Killed between its first two files, an evaluation leaves its items alone.
    if others and settings_file.FILE not in names and not (others == [ITEMS_FILE] and has_items(path)):
        raise UserError(
            f"--out {path} holds {others[0]!r} and no {settings_file.FILE}, so it is not the output of an evaluation; "
            "choose another directory or an empty one"
        )
