"""What the scenarios share: the zygote, tiny inputs, and uninterrupted runs that the faulted ones must equal."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from tests.faults.injector import Plan
from tests.faults.invariants import (
    Facts,
    check_checkpoints,
    check_clean,
    check_same,
    check_same_but_for_skips,
    facts_of,
)
from tests.faults.zygote import Ended, Job, Process, Zygote
from tests.support.evaluations import write_questions
from tests.support.fake_server import FakeServer
from tests.support.ports import free_port

NUM_STEPS = 4
TRAIN = "megatron_ktr.train:main"
CONVERT = "tools.convert_checkpoint:main"
EVALUATE = "tools.evaluate:main"
NO_FAULT = Plan(action="none")
SCRATCH = "tmp"
"""The part of a scenario's folder that is the TMPDIR of its commands."""
NODE_ADDRESSES = ("10.213.79.1", "10.213.79.2")
VARIANTS: dict[str, dict[str, object]] = {
    "one rank": {},
    "data workers": {"data_workers": 1},
    "two ranks": {},
    "servers": {"engine": "vllm_server", "no_check_sampler": True},
    "servers, no lag": {"engine": "vllm_server", "no_check_sampler": True, "lag": 0},
}
"""Options beside those of ``World.training``, by the name of the uninterrupted run."""


@dataclass(frozen=True)
class Oracle:
    """An uninterrupted command."""

    run_dir: Path
    counts_of_ranks: tuple[Mapping[str, int], ...]
    """Calls of each point of ``injector.py``, on every rank."""
    cpu_seconds: float
    facts: Facts

    @property
    def counts(self) -> dict[str, int]:
        """Those of rank 0."""
        return dict(self.counts_of_ranks[0])


@dataclass(frozen=True)
class Fault:
    """What a scenario did."""

    kind: str
    """For the table."""
    has_fired: bool = True
    """False where the command ended before its moment came, so that nothing happened to it."""


class World:
    """Everything is made once; ``close`` ends the zygote. Scenarios may use it from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zygote = Zygote()
        self._oracles: dict[str, Oracle] = {}
        self._lock = threading.Lock()
        self.making = threading.RLock()
        """Held while something is made that all scenarios of an area share."""
        inputs = folder / "inputs"
        shutil.rmtree(inputs, ignore_errors=True)
        save_tiny_model(inputs / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
        make_dataset(inputs / "data", num_train=8, num_eval=1)
        records = json.loads((inputs / "data" / "train.json").read_text())
        for name, part in (("a", records[:5]), ("b", records[5:])):
            (inputs / "data" / f"{name}.json").write_text(json.dumps(part))
        write_questions(inputs / "questions.json", number=6)
        self.inputs = inputs

    def close(self) -> None:
        self.zygote.close()

    def training(self, run_dir: Path, variant: str = "one rank", **more: object) -> tuple[str, ...]:
        """Flags of a run with lag 1, a mixture and group filtering."""
        data = self.inputs / "data"
        values = {
            "model": self.inputs / "model",
            "data_path": f"{data}/a.json:0.7,{data}/b.json:0.3",
            "prompt_template": self.inputs / "model" / "prompt_template.txt",
            "video_num_frames": 4,
            "video_max_pixels": 3136,
            "engine": "hf",
            "lag": 1,
            "filter_groups": "equal",
            "importance_sampling": "token",
            "num_generations": 3,
            "max_response_length": 6,
            "reward_functions": "accuracy,tests.faults.rewards:uneven_reward",
            "reward_workers": 0,
            "length_bonus": 0.0,
            "kl_beta": 0.04,
            "lr": 0.05,
            "train_steps": NUM_STEPS,
            "prompts_per_step": 2,
            "save_interval": 1,
            "keep_checkpoints": 3,
            "rollout_log_interval": 1,
            "run_dir": run_dir,
            **VARIANTS[variant],
            **more,
        }
        return flags_of(values)

    def oracle(self, variant: str = "one rank") -> Oracle:
        """The uninterrupted run of a variant."""
        with self._lock:
            if variant not in self._oracles:
                self._oracles[variant] = self._run_oracle(variant)
            return self._oracles[variant]

    def _run_oracle(self, variant: str) -> Oracle:
        folder = self.folder / f"oracle {variant}".replace(" ", "_")
        for name in ("first", "oracle"):
            shutil.rmtree(folder, ignore_errors=True)
            seconds = 0.0
            server = FakeServer() if variant.startswith("servers") else None
            more = {} if server is None else {"server_urls": server.url}
            arguments = self.training(folder / "run", variant, **more)
            processes = self.start_ranks(TRAIN, arguments, folder, name, world_size=2 if variant == "two ranks" else 1)
            for _ in processes[0].looks(0.01):
                seconds = processes[0].cpu_seconds
            ended = [process.wait() for process in processes]
            if server is not None:
                server.kill()
            assert all(one.code == 0 for one in ended), ended
            # What it imported by itself took time that the commands after it do not need: the moments of their faults
            # would lie behind their end.
            if not self.warm_from(folder, processes[0].job.label):
                break
        counts = tuple(self.counts_of(folder, process.job.label) for process in processes)
        return Oracle(folder / "run", counts, seconds, facts_of(folder / "run", num_steps=NUM_STEPS))

    def copy_run(self, folder: Path, *, without: Sequence[str] = ()) -> Path:
        """The uninterrupted run again, as ``folder/run``, without some of its parts."""
        run_dir = folder / "run"
        shutil.copytree(self.oracle().run_dir, run_dir)
        for path in (run_dir / name for name in without):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run_dir

    def counts_of_resumed(self, *, without: Sequence[str] = ()) -> dict[str, int]:
        """Calls of a run that was done but for some of its parts, and is started again."""
        folder = self.folder / "_".join(("resumed", *without)).replace("/", "_")
        with self.making:
            if not folder.exists():
                arguments = self.training(self.copy_run(folder, without=without), auto_resume=True)
                ended = self.run(TRAIN, arguments, folder, "resumed", plan=Plan())
                assert ended.code == 0, ended
        return self.counts_of(folder, "resumed")

    def warm_from(self, folder: Path, label: str) -> bool:
        """The zygote imports what a counting run imported by itself. Whether that was anything."""
        modules = (folder / f"{label}.modules").read_text().splitlines()
        self.zygote.warm(modules)
        return bool(modules)

    def counts_of(self, folder: Path, label: str) -> dict[str, int]:
        return json.loads((folder / f"{label}.counts").read_text())

    def start(
        self,
        entry: str,
        arguments: Sequence[str],
        folder: Path,
        label: str,
        *,
        plan: Plan = NO_FAULT,
        environment: Mapping[str, str] | None = None,
        network: str | None = None,
    ) -> Process:
        scratch = folder / SCRATCH
        scratch.mkdir(parents=True, exist_ok=True)
        environment = {"TMPDIR": str(scratch), **(environment or {})}
        return self.zygote.start(Job(entry, tuple(arguments), folder, label, plan, environment, network))

    def run(self, entry: str, arguments: Sequence[str], folder: Path, label: str, *, plan: Plan = NO_FAULT) -> Ended:
        """Runs a command to its end; one that stops itself is let go on."""
        return finish(self.start(entry, arguments, folder, label, plan=plan))

    def start_ranks(
        self,
        entry: str,
        arguments: Sequence[str],
        folder: Path,
        label: str,
        *,
        world_size: int,
        plans: Mapping[int, Plan] | None = None,
        nodes: Sequence[str] = (),
    ) -> list[Process]:
        """A command on several ranks, as a launcher starts it; the labels are ``<label>0``, ``<label>1``, ...
        Where no plans are given, calls are counted. ``nodes`` are network namespaces, one for each rank."""
        plain = NO_FAULT if plans is not None else Plan()
        if world_size == 1:
            return [self.start(entry, arguments, folder, label, plan=(plans or {}).get(0, plain))]
        address = NODE_ADDRESSES[0] if nodes else "127.0.0.1"
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        if nodes:
            shared["GLOO_SOCKET_IFNAME"] = "eth0"
        return [
            self.start(
                entry,
                arguments,
                folder,
                f"{label}{rank}",
                plan=(plans or {}).get(rank, plain),
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(0 if nodes else rank)},
                network=nodes[rank] if nodes else None,
            )
            for rank in range(world_size)
        ]


def finish(process: Process, *, rng: random.Random | None = None) -> Ended:
    """Waits for the end. A process that stops itself goes on, or with ``rng`` may be killed while it stands still."""
    for _ in process.looks(0.005):
        if process.is_stopped:
            process.send(signal.SIGKILL if rng is not None and rng.random() < 0.5 else signal.SIGCONT)
    return process.wait()


def flags_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """Command-line flags; True is a flag without a value."""
    return tuple(
        text
        for name, value in values.items()
        for text in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
    )


def check_finished(world: World, folder: Path, *, variant: str = "one rank") -> None:
    """The run in ``folder`` is done, equals the uninterrupted one, and left nothing else."""
    run_dir = folder / "run"
    check_checkpoints(run_dir)
    check = check_same_but_for_skips if variant == "data workers" else check_same
    check(facts_of(run_dir, num_steps=NUM_STEPS), world.oracle(variant).facts)
    check_clean(run_dir)
