"""Training and its rollout servers stand on two nodes, and lose the cable between them in the middle of a run.

No connection is closed by this, and nobody is told: requests, answers and orders to load weights just do not arrive. Of
two servers one or none is on training's own node. Both are stand-ins whose answers are a function of prompt, seed and
weights (``tests/support/fake_server.py``), so a response of old weights would be another one than that of the
undisturbed run.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_ktr.errors import EXIT_USER
from tests.faults.injector import draw
from tests.faults.invariants import check_checkpoints, check_end
from tests.faults.isolation import enter_network
from tests.faults.world import NO_FAULT, NODE_ADDRESSES, TRAIN, Fault, World, check_finished
from tests.faults.zygote import Process
from tests.support.fake_server import Answer, FakeServer, Listener
from tests.support.nodes import ip, linked_nodes, must

TRAIN_WITH_SHORT_LIMITS = "tests.faults.short_limits:train"
LIMITS = dict(server_timeout_seconds=1, server_max_retries=1)
WAIT_MINUTES = 0.02
"""Where no server is left. A busy machine may keep both silent for as long, and the run then ends before its cut."""
GENERATING, WEIGHTS, BETWEEN = "while generating", "while weights are sent", "between two phases"
REQUESTS = {GENERATING: 4, WEIGHTS: 40}
"""Of the first so many requests of this kind that reach the distant server, one meets the cut."""
MOST_ANSWERS, MOST_SECONDS = 30, 2.5
"""For a moment is until the other server has given up to so many further answers, in which it is given new weights once
or twice; where it is cut off, too, up to so long: shorter and longer than ``LIMITS`` allows a request."""
T = TypeVar("T")


class DistantServer(FakeServer):
    """A stand-in on a node of its own. The ``k``-th request of a kind waits, once it is served, until ``go`` is set:
    ``has_come`` tells that it does."""

    def __init__(self, node: str, address: str, *, kind: str = "", k: int = 0) -> None:
        self.has_come, self.go = threading.Event(), threading.Event()
        self._node, self.host = node, address
        self._kind, self._left = kind, k
        self._counting = threading.Lock()
        self.num_requests = 0
        super().__init__()

    def _bind(self, port: int) -> Listener:
        return on_node(self._node, lambda: super(DistantServer, self)._bind(port))

    def answer(self, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        found = super().answer(path, body, headers)
        with self._counting:
            self.num_requests += 1
            self._left -= _kind_of(path, body) == self._kind
            is_moment = self._left == 0 and not self.has_come.is_set() and bool(self._kind)
            if is_moment:
                self.has_come.set()
        if is_moment:
            self.go.wait()
        return found


def _kind_of(path: str, body: Any) -> str:
    """Of a request. One for the log-probs of fixed tokens is the last of an update."""
    if path.startswith("/inference"):
        return WEIGHTS if "prompt_logprobs" in body["sampling_params"] else GENERATING
    return "" if path.startswith(("/health", "/server_info")) else WEIGHTS


def server_network(world: World, rng: random.Random, folder: Path) -> Fault:
    """The cable of training's node or of the server's is cut: for good, or for a moment. Training goes on with the
    other server, and ends as if nothing had been. Where both servers are on the other node it may end after the time
    that is stated (``server_wait_minutes``), and then goes on when the cable is whole again. What is lost is the answer
    to a request, or the request after it."""
    moment, are_both = rng.choice((GENERATING, WEIGHTS, BETWEEN)), rng.random() < 0.35
    is_for_good, side, is_answered = rng.random() < 0.4, rng.randrange(2), rng.random() < 0.5
    num_answers, seconds = rng.randint(0, MOST_ANSWERS), rng.uniform(0.0, MOST_SECONDS)
    # A step that is given up is done again with the same responses only if none were sampled ahead.
    variant = "servers, no lag" if are_both else "servers"
    plan = draw(rng, world.oracle(variant).counts, ("phase",), ("stop",)) if moment == BETWEEN else NO_FAULT
    k = rng.randint(1, REQUESTS.get(moment, 1))
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(linked_nodes(f"ktc{rng.randrange(10**6)}x", addresses=NODE_ADDRESSES))
        far = DistantServer(nodes[1], NODE_ADDRESSES[1], kind=moment, k=k)
        other = DistantServer(nodes[1], NODE_ADDRESSES[1]) if are_both else DistantServer(nodes[0], "127.0.0.1")
        for server in (far, other):
            stack.callback(server.kill)
            stack.callback(server.go.set)

        limits = LIMITS | (dict(server_wait_minutes=WAIT_MINUTES) if are_both else {})
        urls = f"{far.url},{other.url}"
        arguments = world.training(folder / "run", variant, server_urls=urls, **limits)
        process = world.start(TRAIN_WITH_SHORT_LIMITS, arguments, folder, "faulted", plan=plan, network=nodes[0])
        is_cut = _cut_at_the_moment(process, far, nodes[side], is_answered=is_answered)
        if is_cut and not is_for_good:
            if are_both:
                threading.Event().wait(seconds)
            else:
                _wait_for_answers(process, other, num_answers)
            _plug_in(nodes[side])
        ended = process.wait()
        num_sent_again = sum(on_node(node, _num_sent_again) for node in nodes)
        check_end(ended, allowed=(0, EXIT_USER) if are_both else (0,))
        if ended.code:
            check_checkpoints(folder / "run")
            _plug_in(nodes[side])
            arguments = world.training(folder / "run", variant, server_urls=urls, auto_resume=True)
            check_end(world.start(TRAIN, arguments, folder, "resumed", network=nodes[0]).wait(), allowed=(0,))
    check_finished(world, folder, variant=variant)
    # A cut into which nobody sent anything is none.
    was_met = num_sent_again > 0 or f"{far.url} is taken out" in ended.error or ended.code != 0
    who = "both servers" if are_both else "one server"
    return Fault(f"{who} cut off {moment}, {'for good' if is_for_good else 'for a moment'}", is_cut and was_met)


def _plug_in(node: str) -> None:
    must(ip("-n", node, "link", "set", "eth0", "up"))


def _cut_at_the_moment(process: Process, far: DistantServer, node: str, *, is_answered: bool) -> bool:
    """Waits for it, and cuts the cable at this node. Returns whether the process was still there."""
    for _ in process.looks(0.005):
        if far.has_come.is_set() or process.is_stopped:
            break
    if process.has_ended:
        return False
    if is_answered and not process.is_stopped:
        # Training stands still meanwhile, so what it sends next is sent into the cut.
        process.send(signal.SIGSTOP)
        far.go.set()
        threading.Event().wait(0.05)
    must(ip("-n", node, "link", "set", "eth0", "down"))
    far.go.set()
    process.send(signal.SIGCONT)
    return True


def _wait_for_answers(process: Process, server: DistantServer, number: int) -> None:
    last = server.num_requests + number
    for _ in process.looks(0.002):
        if server.num_requests >= last:
            return


def _num_sent_again() -> int:
    """Segments of TCP that this node has sent more than once."""
    names, values = [
        line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    ]
    return int(values[names.index("RetransSegs")])


def on_node(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns in the network namespace ``name``, where the sockets stay that it makes."""

    def run() -> T:
        enter_network(name)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
