"""Metrics for Prometheus: ``http://127.0.0.1:PORT/metrics`` of rank 0's machine, for ``--metrics-port PORT``.

The text format 0.0.4 of Prometheus, without a library. The names:

    ktr_step, ktr_num_steps                     the last step that is done, the last of the run
    ktr_evaluation_step                         the step whose model was evaluated last, once one was
    ktr_incidents_total{kind="alarm"}           incidents of events.jsonl since this start
    ktr_incidents_lost_total                    incidents that could not be written there
    ktr_rank_heartbeat_age_seconds              the age of the oldest heartbeat of all ranks, when asked
    ktr_last_step_age_seconds                   how long ago the last step ended, when asked
    ktr_reward_mean, ktr_loss, ...              each metric of metrics.jsonl by its name: those of the last step, and
                                                those of the last evaluation until the next one
    ktr_seconds{part="rollout"}, ...            the part of a name after its first "/" is the label ``part``

Characters that a name may not have become "_". All of them are gauges but those that end with ``_total``.

A thread answers, from numbers that the main thread leaves with each record, so that a slow reader never slows a run. It
listens on ``--metrics-host``, which is loopback unless told otherwise, and has no access control: whoever reaches the
port reads the metrics, and nothing else. A port that is taken is an incident, and the run goes on without the endpoint.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PATIENCE_SECONDS = 10.0
"""For a reader that sends or takes nothing."""
MOST_READERS = 16
"""At the same time; further ones are refused."""

Sample = tuple[str, Mapping[str, str], float]


class Endpoint(StepHook):
    """Serves the last step's metrics; built on rank 0 alone."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        num_steps: int,
        first_step: int = 1,
        incidents: Incidents,
        oldest_heartbeat: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._num_steps, self._incidents = num_steps, incidents
        self._oldest_heartbeat = oldest_heartbeat
        self._values: Mapping[str, float] = {}
        self._evaluated: dict[str, float] = {}
        self._evaluated_step: int | None = None
        self._step, self._ended = first_step - 1, time.time()
        self._server: _Server | None = None
        try:
            self._server = _Server((host, port), text=self.text)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            incidents.add("metrics_port", f"--metrics-port {port} of {host} cannot be served: {reason}")
            return
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens; None if it could not."""
        return None if self._server is None else self._server.server_address[:2]  # type: ignore[return-value]

    def on_record(self, step: int, values: Mapping[str, float]) -> None:
        # New dictionaries each time, because a reader may be going through the old ones.
        if step > self._step:
            self._evaluated = {name: value for name, value in self._evaluated.items() if name not in values}
            self._values, self._step, self._ended = dict(values), step, time.time()
        else:
            self._evaluated = {**self._evaluated, **values}
            self._evaluated_step = step

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def text(self) -> str:
        """What a reader gets now."""
        samples: list[Sample] = [
            ("ktr_step", {}, self._step),
            ("ktr_num_steps", {}, self._num_steps),
            ("ktr_last_step_age_seconds", {}, time.time() - self._ended),
        ]
        if (age := self._oldest_heartbeat()) is not None:
            samples.append(("ktr_rank_heartbeat_age_seconds", {}, age))
        if self._evaluated_step is not None:
            samples.append(("ktr_evaluation_step", {}, self._evaluated_step))
        counts = dict(self._incidents.counts)  # a copy: the main thread adds to it
        samples += [("ktr_incidents_total", {"kind": kind}, number) for kind, number in sorted(counts.items())]
        samples.append(("ktr_incidents_lost_total", {}, self._incidents.num_lost))
        shown = {**self._values, **self._evaluated}
        samples += [sample_of(name, value) for name, value in shown.items()]
        return exposition(samples)


def sample_of(name: str, value: float) -> Sample:
    """The name and label of a metric of ``metrics.jsonl``.

    >>> sample_of("seconds/rollout", 2.0)
    ('ktr_seconds', {'part': 'rollout'}, 2.0)
    """
    head, _, part = name.partition("/")
    return "ktr_" + re.sub(r"[^a-zA-Z0-9_]", "_", head), {"part": part} if part else {}, value


def exposition(samples: Iterable[Sample]) -> str:
    """The text format: samples of one name stand together below their type."""
    by_name: dict[str, dict[str, float]] = {}
    for name, labels, value in samples:
        written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        by_name.setdefault(name, {})[f"{{{written}}}" if written else ""] = value
    lines = []
    for name, found in by_name.items():
        lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
        lines += [f"{name}{labels} {_number(value)}" for labels, value in found.items()]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate could not be sent
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    value = float(value)
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_READERS

    def __init__(self, address: tuple[str, int], *, text: Callable[[], str]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Reader)
        self.text = text
        self._room = threading.BoundedSemaphore(MOST_READERS)

    def server_bind(self) -> None:
        # A run that is started again finds its port in TIME_WAIT.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The base class would ask a name server for this machine's name.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        """Says nothing: a reader that goes away is no matter of the run's console."""


class _Reader(BaseHTTPRequestHandler):
    timeout = PATIENCE_SECONDS
    server_version = "megatron-ktr"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        assert isinstance(self.server, _Server)
        content = self.server.text().encode("utf-8")
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing, as above."""
