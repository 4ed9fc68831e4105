"""An error of one rank is every rank's, whatever kind it is; a result of rank 0 is everybody's."""

from __future__ import annotations

import errno
import os
from typing import Any

from megatron_ktr.distributed.agreement import gather_objects, on_every_rank, raise_on_every_rank, result_of_rank_zero
from megatron_ktr.errors import UserError
from tests.support.ranks import RankContext, RankPool


def agree(context: RankContext) -> dict[str, Any]:
    ranks = context.init()

    def read_on_rank_one() -> str:
        if ranks.rank == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return "fine here"

    def fail_on_rank_one() -> str:
        if ranks.rank == 1:
            raise UserError("the file is gone")
        return "fine here"

    found: dict[str, Any] = {
        "gathered": gather_objects(10 * ranks.rank, group=ranks.world),
        "result": on_every_rank(lambda: ranks.rank, ranks=ranks),
        "of rank 0": result_of_rank_zero(lambda: f"rank {ranks.rank}", ranks=ranks),
    }
    actions = {
        "user error": lambda: on_every_rank(fail_on_rank_one, ranks=ranks),
        "file server": lambda: on_every_rank(read_on_rank_one, ranks=ranks),
        "mistake": lambda: raise_on_every_rank(KeyError("a bug") if ranks.rank == 0 else None, group=ranks.world),
        "rank 0 fails": lambda: result_of_rank_zero(lambda: int("x") if ranks.rank else fail(), ranks=ranks),
    }
    for name, action in actions.items():
        try:
            found[name] = action()
        except Exception as error:
            found[name] = (type(error).__name__, str(error), getattr(error, "is_on_every_rank", False))
    # Everybody is still in step.
    found["after"] = gather_objects(ranks.rank, group=ranks.world)
    return found


def fail() -> None:
    raise UserError("no such checkpoint")


def test_errors_and_results_are_the_same_on_every_rank(ranks: RankPool) -> None:
    answers = ranks(agree, world_size=3)
    for rank, found in enumerate(answers):
        assert found["gathered"] == [0, 10, 20] and found["after"] == [0, 1, 2]
        assert found["result"] == rank and found["of rank 0"] == "rank 0"
        assert found["user error"] == ("UserError", "the file is gone", True)
        assert found["rank 0 fails"] == ("UserError", "no such checkpoint", True)
    assert [found["file server"][0] for found in answers] == ["TransientError", "OSError", "TransientError"]
    # A mistake of the program keeps its traceback where it happened; the others end in words.
    assert [found["mistake"][0] for found in answers] == ["KeyError", "UserError", "UserError"]


def test_a_lone_process_asks_nobody() -> None:
    assert gather_objects("mine", group=None) == ["mine"]
    raise_on_every_rank(None, group=None)
