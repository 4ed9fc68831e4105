"""The states of all replicas' data, divided anew for a run that resumes with another number of replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ktr.data.skips import SkipCounter


def reshard_states(states: Iterable[Mapping[str, Any]], *, rank: int, size: int) -> dict[str, Any]:
    """The state of rank ``rank`` of ``size``, from the states of all data-parallel ranks of a saved run.

    With the same size it is the saved state of that rank. With another size all ranks continue after the furthest
    sample that any rank has drawn, so that no sample is seen twice; if the ranks had skipped different numbers of
    samples, a few samples are passed over. The sum of all counts goes to rank 0. Pending responses (``pending``, by
    ``Prompt.identity``) go to every rank, because each draws some of their prompts again.

    Replicas that draw together (``data/together.py``) have one place in the data, which stays exactly what it was. What
    is known of the records is saved by replica 0 alone and goes to every rank.
    """
    saved = sorted(states, key=lambda state: state["rank"])
    old_size = int(saved[0]["size"])
    if len(saved) != old_size:
        raise ValueError(f"expected the states of all {old_size} data-parallel ranks, got {len(saved)}")
    of_all = {"retirement": saved[0]["retirement"]} if "retirement" in saved[0] else {}
    if size == old_size:
        return {**saved[rank], **of_all}
    furthest = max(int(state["position"]) for state in saved) * old_size
    skips, counts = SkipCounter(), Counter[str]()
    if rank == 0:
        for state in saved:
            skips.num_drawn += int(state["skips"]["num_drawn"])
            skips.by_kind.update(state["skips"]["by_kind"])
            counts.update(state["counts"])
    furthest = int(saved[0].get("cursor", furthest))
    position = -(-(furthest - rank) // size) if furthest > rank else 0
    state = {**saved[0], "position": position, "rank": rank, "size": size}
    period = sum(draws for draws, _ in state["mixture"]) if "mixture" in state else int(state["num_records"])
    state["epoch"] = (rank + position * size) // period
    if "num_given" in state:
        given = [sum(numbers) for numbers in zip(*(other["num_given"] for other in saved), strict=True)]
        state["num_given"] = given if rank == 0 else [0] * len(given)
    pending = {name: found for other in saved for name, found in other.get("pending", {}).items()}
    if pending:
        state["pending"] = pending
    return {**state, "skips": skips.state_dict(), "counts": dict(counts)}
