"""Two ranks on two nodes lose their network in the middle of a step: for good, or for a moment.

A node is a network namespace (``tests/support/nodes.py``). What is cut is the cable, so no connection is closed: both
ranks wait for messages that nobody answers.
"""

from __future__ import annotations

import random
import re
import signal
import threading
from pathlib import Path

from megatron_ktr.errors import EXIT_HANG, EXIT_OTHER_RANK
from tests.faults.injector import draw
from tests.faults.invariants import check_checkpoints, check_end
from tests.faults.world import NODE_ADDRESSES, TRAIN, Fault, World, check_finished
from tests.faults.zygote import Process
from tests.support.nodes import ip, linked_nodes, must

HANG_MINUTES = 0.1
"""A rank of a busy machine may need longer for an honest phase, and then ends as one that is cut off does."""


def network(world: World, rng: random.Random, folder: Path) -> Fault:
    """The cable is cut at a moment that one rank has reached. Cut for good, both ranks end within the time that is
    stated (``hang_timeout_minutes``) and start again together. Cut for a moment, they may go on as if nothing were."""
    rank, is_for_good = rng.randrange(2), rng.random() < 0.5
    counts = dict(world.oracle("two ranks").counts_of_ranks[rank])
    plan = draw(rng, counts, ("phase", "exchange"), ("stop",))
    limits = dict(hang_timeout_minutes=HANG_MINUTES, distributed_timeout_minutes=1)
    arguments = world.training(folder / "run", "two ranks", **limits)
    prefix = f"ktf{rng.randrange(10**6)}x"
    with linked_nodes(prefix, addresses=NODE_ADDRESSES) as nodes:
        processes = world.start_ranks(
            TRAIN, arguments, folder, "faulted", world_size=2, plans={rank: plan}, nodes=nodes
        )
        _cut_when_it_stops(processes[rank], nodes[rank], seconds=None if is_for_good else rng.uniform(0.0, 0.5))
        ended = [process.wait() for process in processes]
    for one in ended:
        check_end(one, allowed=(0, EXIT_HANG, EXIT_OTHER_RANK))
    has_fired = processes[rank].has_fired
    assert not (has_fired and is_for_good and not any(one.code for one in ended)), "I5: trained on without a network"
    if EXIT_HANG in [one.code for one in ended]:
        said = "".join(one.error for one in ended)
        assert re.search(r"rank \d hangs for .* in (phase|between phases)", said), f"I5: nobody says where: {said}"
    if any(one.code for one in ended):
        check_checkpoints(folder / "run")
        again = world.training(folder / "run", "two ranks", auto_resume=True)
        for process in world.start_ranks(TRAIN, again, folder, "resumed", world_size=2):
            check_end(process.wait(), allowed=(0,))
    check_finished(world, folder, variant="two ranks")
    return Fault(f"cable cut {'for good' if is_for_good else 'for a moment'}", has_fired)


def _cut_when_it_stops(process: Process, node: str, *, seconds: float | None) -> None:
    """Waits for the moment of the plan, and cuts the cable at this node. It is whole again after ``seconds``."""
    for _ in process.looks(0.005):
        if process.is_stopped:
            break
    if process.has_ended:
        return
    must(ip("-n", node, "link", "set", "eth0", "down"))
    process.send(signal.SIGCONT)
    if seconds is not None:
        threading.Event().wait(seconds)
        must(ip("-n", node, "link", "set", "eth0", "up"))
