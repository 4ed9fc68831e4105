"""What a run says about itself: heartbeats, figures of ranks, Prometheus, wandb, traces; none of it can stop a run."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import types
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_ktr.config import config_from_values
from megatron_ktr.config.checks import check
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import RUN_ENTRY
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import MetricsWriter, PhaseTimer
from megatron_ktr.run.optional_writes import OptionalWrites
from megatron_ktr.run.profile import StepTrace
from megatron_ktr.run.status import wandb_writer
from megatron_ktr.run.status.heartbeat import Heartbeat
from megatron_ktr.run.status.prometheus import Endpoint, exposition, sample_of
from megatron_ktr.run.status.rank_figures import figures_of
from megatron_ktr.run.status.wandb_writer import WandbWriter
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.train import train
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tools import run_status


def report(step: int, **values: float) -> StepReport:
    return StepReport(step, dict(values), (), lambda: ())


def incidents_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Heartbeats


def opened(run_dir: Path, ranks: Any, *, timer: PhaseTimer, every_seconds: float = 3600.0) -> Heartbeat:
    return Heartbeat(
        run_dir,
        ranks=ranks,
        platform=current(),
        timer=timer,
        every_seconds=every_seconds,
        first_step=5,
        num_steps=6,
    )


def beat_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status" / "rank_00000.json").read_text())


def test_a_rank_says_where_it_is_without_being_asked(one_rank: Any, tmp_path: Path) -> None:
    timer = PhaseTimer()
    heartbeat = opened(tmp_path, one_rank, timer=timer, every_seconds=0.01)
    heartbeat.before_step(5)
    with timer.phase("score"):
        wait_until(lambda: (tmp_path / "status" / "rank_00000.json").exists() and beat_of(tmp_path)["phase"] == "score")
        found = beat_of(tmp_path)
        assert (found["state"], found["step"], found["last_done"], found["host"]) == (
            "running",
            5,
            4,
            socket.gethostname(),
        )
        assert found["rss_bytes"] > 10**8 and found["open_files"] > 2 and found["threads"] >= 2
    wait_until(lambda: beat_of(tmp_path)["phase"] is None)
    for step in (5, 6):
        heartbeat.after_step(report(step))
    heartbeat.close()
    found = beat_of(tmp_path)
    assert (found["state"], found["last_done"]) == ("trained", 6) and found["mean_step_seconds"] > 0
    assert [path.name for path in (tmp_path / "status").iterdir()] == ["rank_00000.json"], "no scratch file"
    wait_until(lambda: not heartbeat._thread.is_alive())


@pytest.mark.parametrize(("error", "state"), [(None, "left"), (RuntimeError("broken"), "failed")])
def test_the_last_heartbeat_says_how_it_ended(one_rank: Any, tmp_path: Path, error: Any, state: str) -> None:
    from megatron_ktr.run.hooks import closing_all

    heartbeat = opened(tmp_path, one_rank, timer=PhaseTimer())
    with contextlib.suppress(RuntimeError), closing_all([heartbeat]):
        heartbeat.after_step(report(5))
        if error is not None:
            raise error
    assert beat_of(tmp_path)["state"] == state


def test_heartbeats_that_cannot_be_written_are_counted(one_rank: Any, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("a file is in the way")
    heartbeat = opened(tmp_path, one_rank, timer=PhaseTimer())
    heartbeat.close()
    assert heartbeat.missed == 2


def test_files_of_ranks_that_are_no_more_go(one_rank: Any, tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    for name in ("rank_00000.json", "rank_00001.json", ".rank_00001.json.77", "notes.txt"):
        (tmp_path / "status" / name).write_text("{}")
    opened(tmp_path, one_rank, timer=PhaseTimer()).close()
    assert sorted(path.name for path in (tmp_path / "status").iterdir()) == ["notes.txt", "rank_00000.json"]


# Figures of ranks


def test_the_slowest_rank_and_the_largest_memory_are_named() -> None:
    rows = [[1.0, 3e9, 5e9], [4.0, 1e9, 6e9], [1.5, 2e9, 4e9]]
    assert figures_of(rows) == {
        "ranks/slowest": 1.0,
        "ranks/slowest_behind_seconds": 2.5,
        "ranks/device_memory_peak_gb": 3.0,
        "ranks/host_memory_gb": 6.0,
    }
    assert "ranks/slowest" not in figures_of(rows[:1]), "one rank waits for nobody"


# Prometheus


LINE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{[a-z]+="(?:[^"\\\n]|\\[\\"n])*"\})? (NaN|[+-]Inf|-?[0-9][0-9.e+-]*)')


def read(address: tuple[str, int], path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=PATIENCE_SECONDS) as reply:
        return reply.read().decode(), reply.headers["Content-Type"]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    found = Endpoint("127.0.0.1", 0, num_steps=9, incidents=Incidents(tmp_path), oldest_heartbeat=lambda: 1.5)
    yield found
    found.close()


def test_prometheus_reads_the_last_step(endpoint: Endpoint, tmp_path: Path) -> None:
    assert endpoint.address is not None
    endpoint._incidents.add("alarm", "something")
    values = {"loss": float("nan"), "seconds/rollout": 2.0, "reward/a b": -1e-9, 'decoder/pyav: "x\\y"\n\udcff': 3.0}
    endpoint.on_record(4, values)
    text, kind = read(endpoint.address)
    assert kind.startswith("text/plain; version=0.0.4")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in lines), "the format, for every name and value"
    wanted = ["ktr_step 4.0", "ktr_num_steps 9.0", "ktr_loss NaN", 'ktr_seconds{part="rollout"} 2.0']
    wanted += ['ktr_incidents_total{kind="alarm"} 1.0', "ktr_rank_heartbeat_age_seconds 1.5"]
    assert set(wanted) <= set(lines) and 'ktr_decoder{part="pyav: \\"x\\\\y\\"\\n?"} 3.0' in lines
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(endpoint.address, "/../secrets")
    # Other tests of this process may have left sockets open.
    listening = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == endpoint.address[1]] == ["127.0.0.1"]


def test_a_run_that_is_started_again_gets_its_port_again(endpoint: Endpoint, tmp_path: Path) -> None:
    """Its port is in TIME_WAIT, because the server closes connections first."""
    assert endpoint.address is not None
    read(endpoint.address)
    endpoint.close()
    again = Endpoint(*endpoint.address, num_steps=9, incidents=Incidents(tmp_path))
    try:
        assert again.address == endpoint.address and not again._incidents.counts
        assert "ktr_step 0.0" in read(endpoint.address)[0].splitlines()
    finally:
        again.close()


def test_a_run_that_goes_on_shows_the_steps_that_are_done(tmp_path: Path) -> None:
    found = Endpoint("127.0.0.1", 0, num_steps=9, first_step=5, incidents=Incidents(tmp_path))
    try:
        assert "ktr_step 4.0" in found.text().splitlines()
    finally:
        found.close()


def test_readers_that_say_nothing_keep_nobody_waiting(endpoint: Endpoint) -> None:
    assert endpoint.address is not None
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(endpoint.address))
        garbage = stack.enter_context(socket.create_connection(endpoint.address))
        garbage.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
        assert "ktr_step" in read(endpoint.address)[0]


def test_a_port_that_is_taken_is_an_incident_and_no_end(endpoint: Endpoint, tmp_path: Path) -> None:
    assert endpoint.address is not None
    with socket.socket() as taken:  # not ours: one that would not share its port
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = Endpoint("127.0.0.1", port, num_steps=9, incidents=Incidents(tmp_path))
        second.on_record(1, {})
        second.close()
    (incident,) = incidents_of(tmp_path)
    assert incident["kind"] == "metrics_port" and str(port) in incident["text"] and second.address is None


def test_samples_of_a_name_stand_together() -> None:
    samples = [sample_of(name, 1.0) for name in ("a", "seconds/x", "a/y", "seconds/z", "eval/set/accuracy")]
    lines = exposition(samples).splitlines()
    assert lines == [
        "# TYPE ktr_a gauge",
        "ktr_a 1.0",
        'ktr_a{part="y"} 1.0',
        "# TYPE ktr_seconds gauge",
        'ktr_seconds{part="x"} 1.0',
        'ktr_seconds{part="z"} 1.0',
        "# TYPE ktr_eval gauge",
        'ktr_eval{part="set/accuracy"} 1.0',
    ]


# wandb


class FakeWandb(types.ModuleType):
    """Remembers what it is told; ``trouble`` is raised by what it names. Like wandb it numbers rows and drops late
    ones: those below the last one, and in a part that goes on also further values of a row that an earlier part sent.
    Offline, it does not say where an earlier part ended.
    """

    is_offline = False

    def __init__(self, **trouble: Any) -> None:
        super().__init__("wandb")
        self.trouble, self.began, self.axes, self.is_finished = trouble, [], {}, False
        self.rows: dict[int, dict[str, float]] = {}
        self.next_row = 0

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **values: Any) -> FakeWandb:
        self._act("init")
        self.began.append(values)
        return self

    def define_metric(self, name: str, *, step_metric: str | None = None, hidden: bool = False) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._act("log")
        if step >= self.next_row:
            self.rows.setdefault(step, {}).update(values)
            self.next_row = step

    def finish(self) -> None:
        self._act("finish")
        self.is_finished = True
        self.next_row += 1

    @property
    def step(self) -> int:
        return 0 if self.is_offline else self.next_row

    @property
    def sent(self) -> list[dict[str, float]]:
        return [self.rows[number] for number in sorted(self.rows)]

    def _act(self, name: str) -> None:
        if (trouble := self.trouble.get(name)) is not None:
            if callable(trouble):
                trouble()
            else:
                raise trouble


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def send(run_dir: Path, records: Iterable[tuple[int, dict[str, float]]]) -> WandbWriter:
    writer = WandbWriter(run_dir, project="videos", incidents=Incidents(run_dir))
    for step, values in records:
        writer.on_record(step, values)
    writer.close()
    return writer


@pytest.mark.parametrize("is_offline", [False, True])
def test_wandb_gets_each_step_and_a_resumed_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_offline: bool
) -> None:
    """It makes up for the evaluation of the step that it goes on from, and does a step again."""
    fake = use(monkeypatch, FakeWandb())
    fake.is_offline = is_offline
    (tmp_path / "config.yaml").write_text("trainer:\n  train_steps: 9\n")
    send(tmp_path, [(step, {"loss": float(step)}) for step in (1, 2, 3)])
    send(tmp_path, [(2, {"eval/a/accuracy": 0.5}), (3, {"loss": 3.5}), (4, {"loss": 4.0}), (4, {"eval_loss": 0.1})])
    first, second = fake.began
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "videos"
    assert first["config"] == {"trainer": {"train_steps": 9}} and fake.is_finished
    assert fake.sent == [
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 2, "eval/a/accuracy": 0.5},
        {"step": 3, "loss": 3.5},
        {"step": 4, "loss": 4.0, "eval_loss": 0.1},
    ]
    assert fake.axes == {"step": None, "*": "step"} and list(fake.rows)[:3] == [1, 2, 3]
    assert incidents_of(tmp_path) == []


LOSSES = [(step, {"loss": float(step)}) for step in range(1, 9)]


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_wandb_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    use(monkeypatch, FakeWandb(**{place: ConnectionError("no\nnetwork")}))
    writer = send(tmp_path, LOSSES[:5])
    (incident,) = incidents_of(tmp_path)
    assert incident["kind"] == "wandb" and "ConnectionError: no network" in incident["text"]
    assert writer.num_lost == {"init": 6, "log": 5, "finish": 1}[place]


def test_wandb_that_hangs_holds_up_neither_steps_nor_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = threading.Event()
    use(monkeypatch, FakeWandb(init=hanging.wait))
    monkeypatch.setattr(wandb_writer, "CLOSING_SECONDS", 0.01)
    monkeypatch.setattr(wandb_writer, "MOST_WAITING", 3)
    writer = send(tmp_path, LOSSES)
    assert writer.num_lost == 5, "three wait"
    hanging.set()


# All displays


def test_displays_show_what_metrics_has_evaluations_and_counts_of_trouble_included(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = use(monkeypatch, FakeWandb())
    incidents = Incidents(tmp_path)
    optional = OptionalWrites(incidents)
    endpoint = Endpoint("127.0.0.1", 0, num_steps=9, incidents=incidents)
    displays = [endpoint, WandbWriter(tmp_path, project="videos", incidents=incidents)]
    writer = MetricsWriter(tmp_path, optional=optional)
    writer.listeners += [one.on_record for one in displays]
    writer.write(0, {"eval/set/accuracy": 0.1})
    writer.write(1, {"loss": 1.0, "save_failures": 2.0})
    optional.fail("rollouts", OSError("full"))
    writer.write(2, {"loss": 2.0})
    writer.add(2, {"eval/set/accuracy": 0.5, "seconds/evaluate": 3.0})
    optional.fail("rollouts", OSError("full"))
    writer.write(3, {"loss": 3.0})
    writer.close()
    shown = endpoint.text().splitlines()
    for one in displays:
        one.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert fake.sent == records and [one["step"] for one in records] == [0, 1, 2, 3]
    wanted = ["ktr_step 3.0", "ktr_evaluation_step 2.0", "ktr_loss 3.0", 'ktr_eval{part="set/accuracy"} 0.5']
    wanted += ['ktr_write_failures{part="rollouts"} 2.0', 'ktr_incidents_total{kind="write_failure"} 1.0']
    assert set(wanted) <= set(shown)


# Traces


def test_a_trace_has_phases_and_operators_of_its_steps_alone(tmp_path: Path) -> None:
    timer = PhaseTimer()
    trace = StepTrace(tmp_path, first=2, last=3, rank=7, timer=timer, incidents=Incidents(tmp_path))
    for step in range(1, 5):
        trace.before_step(step)
        with timer.phase("score"):
            torch.ones(step, 8) @ torch.ones(8, 8)
        with contextlib.suppress(ZeroDivisionError), timer.phase("update"):
            raise ZeroDivisionError
        trace.after_step(report(step))
    trace.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_7.json" and incidents_of(tmp_path) == []
    events = json.loads(path.read_text())["traceEvents"]
    named = [one["name"] for one in events if one.get("name", "").startswith(("phase: ", "step ")) and one["ph"] == "X"]
    assert sorted(named) == sorted(["step 2", "step 3", *["phase: score", "phase: update"] * 2])
    assert sum(one.get("name") == "aten::matmul" for one in events) == 2
    spans = {name: next(one for one in events if one.get("name") == name) for name in ("step 2", "phase: score")}
    assert spans["step 2"]["ts"] <= spans["phase: score"]["ts"], "phases lie in their step"


def test_a_trace_that_ends_early_or_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    for folder, is_blocked in ((tmp_path / "a", False), (tmp_path / "b", True)):
        folder.mkdir()
        if is_blocked:
            (folder / "profile").write_text("a file is in the way")
        trace = StepTrace(folder, first=1, last=9, rank=0, timer=PhaseTimer(), incidents=Incidents(folder))
        trace.before_step(1)
        trace.close()
        assert [one["kind"] for one in incidents_of(folder)] == (["profile"] if is_blocked else [])
    assert (tmp_path / "a" / "profile" / "rank_0.json").is_file()


# Options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(profile_steps=(3,)), "--profile-steps takes the first and the last step"),
        (dict(profile_steps=(3, 2)), "--profile-steps takes the first and the last step"),
        (dict(profile_steps=(0, 2)), "--profile-steps takes the first and the last step"),
        (dict(profile_steps=(1, 101)), "101 steps: at most 100"),
        (dict(profile_steps=(5, 6), train_steps=4), "begin after the last step"),
        (dict(wandb_project=" "), "--wandb-project must not be empty"),
        (dict(wandb_project="videos"), "needs the package wandb"),
        (dict(metrics_port=1, metrics_host=""), "--metrics-host must not be empty"),
    ],
)
def test_options_that_cannot_work_are_refused(values: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(words)):
        check(config_from_values({"model": "m", "data_path": "d", "engine": "hf", **values}))


# All of it, in a run


def watched_runs(context: Any, *, folder: Path) -> tuple[list[str], list[tuple[int, float]]]:
    """Two ranks, with everything switched on and without. Returns the threads of ours that are left, and the steps and
    accuracies that this rank has sent to wandb."""
    fake, before = FakeWandb(), threading.enumerate()
    sys.modules["wandb"] = fake
    evaluated = {"eval_data": (str(folder / "data" / "eval.json"),), "eval_interval": 2, "eval_at_start": True}
    everything = {"profile_steps": (2, 2), "heartbeat_seconds": 0.1, "wandb_project": "videos", **evaluated}
    for name, changes in (("run", everything), ("plain", {"heartbeat_seconds": 3600.0})):
        train(
            config_from_values(
                {
                    "model": str(folder / "model"),
                    "data_path": str(folder / "data" / "train.json"),
                    "prompt_template": str(folder / "model" / "prompt_template.txt"),
                    "video_num_frames": 4,
                    "video_max_pixels": 3136,
                    "engine": "hf",
                    "num_generations": 2,
                    "max_response_length": 4,
                    "reward_functions": ("accuracy", "format", "benchmarks.soak.reward:uneven"),
                    "reward_workers": 0,
                    "train_steps": 3,
                    "prompts_per_step": 2,
                    "run_dir": str(folder / name),
                    **changes,
                }
            )
        )
    del sys.modules["wandb"]
    new = [thread.name for thread in threading.enumerate() if thread not in before]
    left = [name for name in new if name in ("heartbeat", "metrics", "wandb")]
    accuracy = "eval/eval/accuracy"
    return left, [(int(row["step"]), row[accuracy]) for row in fake.sent if accuracy in row]


@pytest.mark.slow
def test_a_run_of_two_ranks_leaves_what_run_status_reads(ranks: Any, tmp_path: Path, capsys: Any) -> None:
    save_tiny_model(tmp_path / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(tmp_path / "data", num_train=4, num_eval=1)
    (left, sent), (also_left, sent_by_other) = ranks(watched_runs, 2, folder=tmp_path)
    assert left == also_left == sent_by_other == []
    run_dir = tmp_path / "run"
    assert all(RUN_ENTRY.fullmatch(path.name) for path in run_dir.iterdir()), "what --auto-resume may move"
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == ["rank_0.json", "rank_1.json"]
    start, *records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sent == [(one["step"], one["eval/eval/accuracy"]) for one in (start, records[1], records[2])]
    plain = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert records[2]["loss"] != records[1]["loss"], "it learns"
    for name in ("loss", "grad_norm", "reward_mean", "key_token_ratio"):
        assert [one[name] for one in records] == [one[name] for one in plain], "to the last bit"
    assert all(one["ranks/slowest"] in (0, 1) and one["ranks/device_memory_peak_gb"] > 0.1 for one in records)
    capsys.readouterr()
    assert run_status.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["state"], found["step"], found["num_steps"], found["looks_wrong"]) == ("finished", 3, 3, False)
    assert [(one["rank"], one["state"], one["last_done"]) for one in found["ranks"]] == [
        (0, "trained", 3),
        (1, "trained", 3),
    ]
    assert found["ranks"][0]["incarnation"] == found["ranks"][1]["incarnation"]
