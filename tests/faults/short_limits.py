"""Training as its command, but with a short limit for a server's answers that take no work, and short pauses.

The product waits 30 s for such answers, because machines are busy. Where a network is cut, every such wait goes on to
its end. It looks after a server every 2 s, in which the runs of the harness end.
"""

from __future__ import annotations

import functools


def train() -> int:
    from megatron_ktr import train as command
    from megatron_ktr.rollout.server import client, engine

    client.CONTROL_SECONDS = 1.0
    engine.PoolSettings = functools.partial(engine.PoolSettings, probe_seconds=0.05)  # ty: ignore
    return command.main()
