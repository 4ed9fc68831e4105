"""Whether a run that lasts holds more and more of its machine: memory, files, threads.

    python benchmarks/soak/run.py                                             transformers' engine, lag 0 and 1
    .venv-vllm/bin/python benchmarks/soak/run.py --case vllm_colocated:0 --case vllm_server:1
    python benchmarks/soak/run.py --steps 300 --out FILE.json

Each case is ``engine:lag``. It trains a tiny model for ``--steps`` steps as a process of its own, the way a user does:
with data workers, a frame cache, files of rollouts every 10 steps and a checkpoint every 10. After each step the
process and all its descendants are looked at from outside (``measures.py``). Memory, files and threads may grow by less
than 2% from steps 21 to 40 to the last 20 steps; a case that grows ends the command with exit code 1. The server of
``vllm_server`` is measured, too, as processes of its own. A training that is sent SIGUSR1 ends early, and the report
says how many steps it had.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import psutil  # noqa: E402

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from benchmarks.soak.measures import SETTLED, WINDOW, Holding, growth_of, holding_of, thinned  # noqa: E402
from megatron_ktr.data.synthetic import corpus, make_dataset  # noqa: E402
from megatron_ktr.data.tiny_model import save_tiny_model  # noqa: E402
from megatron_ktr.distributed import platform as platforms  # noqa: E402
from megatron_ktr.errors import EXIT_SAVED, Parser, UserError, run_cli, whole  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.run.metrics import FILE as METRICS  # noqa: E402

ENGINES = ("hf", "vllm_colocated", "vllm_server")


@dataclass(frozen=True)
class Case:
    engine: str
    lag: int


def case_of(text: str) -> Case:
    engine, _, lag = text.partition(":")
    if engine not in ENGINES or lag not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ENGINES)}, a colon and 0 or 1, got {text[:40]!r}")
    return Case(engine, int(lag))


def make_inputs(folder: Path) -> None:
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2)
    make_dataset(folder / "data", num_train=24, num_eval=1)


def options_of(case: Case, *, inputs: Path, run_dir: Path, steps: int) -> dict[str, Any]:
    return {
        "model": inputs / "model",
        "data-path": inputs / "data" / "train.json",
        "prompt-template": inputs / "model" / "prompt_template.txt",
        "video-num-frames": 8,
        "video-max-pixels": 3136,
        "engine": case.engine,
        "lag": case.lag,
        "num-generations": 4,
        "max-prompt-length": 512,
        "max-response-length": 12,
        **({"rollout-kv-cache-gb": 0.05} if case.engine == "vllm_colocated" else {}),
        "reward-functions": "accuracy,format,benchmarks.soak.reward:uneven",
        "lr": 1e-4,
        "kl-beta": 0.04,
        "importance-sampling": "token",
        "train-steps": steps,
        "prompts-per-step": 2,
        "data-workers": 1,
        "frame-cache-dir": run_dir.with_name(f"{run_dir.name}_frames"),
        "save-interval": 10,
        "rollout-log-interval": 10,
        "log-interval": 50,
        "run-dir": run_dir,
    }


def run_case(case: Case, *, inputs: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Trains, and returns the growth of the run and of its server."""
    run_dir = folder / f"{case.engine}_{case.lag}"
    options = options_of(case, inputs=inputs, run_dir=run_dir, steps=steps)
    with contextlib.ExitStack() as stack:
        server = None
        if case.engine == "vllm_server":
            server, url = stack.enter_context(_server(inputs / "model", log=folder / "server.log"))
            options |= {"server-urls": url, "weight-transfer": "directory"}
        command = [sys.executable, "-m", "megatron_ktr.train"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        log = run_dir.with_suffix(".log")
        # Also where the package is installed elsewhere: the reward is a file of this repository.
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with log.open("w") as file:
            process = stack.enter_context(
                _ended_at_last(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
            )
            runs = {"run": psutil.Process(process.pid)} | ({"server": psutil.Process(server.pid)} if server else {})
            holdings = _watch(process, runs, run_dir=run_dir, name=f"{case.engine}:{case.lag}")
        if process.returncode not in (0, EXIT_SAVED):
            raise UserError(f"{case.engine}:{case.lag} ended with {process.returncode}: {log.read_text()[-1500:]}")
    return {
        name: {**growth_of(found), "steps": found[-1].step, "samples": thinned(found, every=10)}
        for name, found in holdings.items()
    }


def _watch(
    process: subprocess.Popen, runs: dict[str, psutil.Process], *, run_dir: Path, name: str
) -> dict[str, list[Holding]]:
    """What each of ``runs`` held after each step that the training wrote, until it ends."""
    holdings: dict[str, list[Holding]] = {one: [] for one in runs}
    step, position, new = 0, 0, b""
    while process.poll() is None:
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError), (run_dir / METRICS).open("rb") as file:
            file.seek(position)
            new = file.read()
            position += len(new)
        if not (num_new := new.count(b"\n")):
            continue
        step += num_new  # a new run has one line for each step
        for one, root in runs.items():
            if (holding := holding_of(root, step=step)) is not None:
                holdings[one].append(holding)
        if step % 25 == 0 and holdings["run"]:
            last = holdings["run"][-1]
            say(
                f"{name} step {step}: own {last.own_bytes / 1e6:.1f} MB, resident {last.rss_bytes / 1e6:.1f} MB, "
                f"{last.num_files} files, {last.num_threads} threads, {last.num_processes} processes"
            )
    return holdings


@contextlib.contextmanager
def _server(model: Path, *, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_ktr.rollout.server.serve", str(model), "--port", str(port)]
    # The cache is small, so that every page of it has been touched before the first window.
    command += ["--host", "127.0.0.1", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 25)]
    with log.open("w") as file, _ended_at_last(subprocess.Popen(command, stdout=file, stderr=file)) as server:
        url = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None:
                raise UserError(f"the server ended with {server.returncode}: {log.read_text()[-1500:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=60):
                break
            time.sleep(0.5)
        yield server, url


@contextlib.contextmanager
def _ended_at_last(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            left = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(left, timeout=30)
            for one in alive:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.wait()


def run_benchmark(cases: list[Case], *, steps: int, folder: Path, out: Path | None) -> dict[str, Any]:
    """The report; ``out`` has it after each case, so that a later one that fails loses nothing."""
    make_inputs(folder)
    report = {
        "machine": {**about_machine(platforms.start("cpu")), "cores": os.cpu_count()},
        "steps": steps,
        "windows": {"first_steps": [SETTLED + 1, SETTLED + WINDOW], "last_steps": WINDOW},
        "results": [],
    }
    for case in cases:
        found = run_case(case, inputs=folder, folder=folder, steps=steps)
        report["results"].append({"engine": case.engine, "lag": case.lag, **found})
        say(_line(report["results"][-1]))
        write_report(report, out=out, figure=None, draw=str)
    return report


def _parts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: result[name] for name in ("run", "server") if name in result}


def _line(result: dict[str, Any]) -> str:
    lines = []
    for name, found in _parts(result).items():
        numbers = ", ".join(
            f"{found[key]['first']:g} -> {found[key]['last']:g} {word}"
            for key, word in (("num_files", "files"), ("num_threads", "threads"), ("num_processes", "processes"))
        )
        lines.append(
            f"{result['engine']}:{result['lag']} {name}: own memory {found['own_bytes']['first'] / 1e6:.1f} MB "
            f"{found['own_bytes']['growth']:+.2%}, resident {found['rss_bytes']['growth']:+.2%}, {numbers}: "
            f"{'steady' if found['is_steady'] else 'GROWS'}"
        )
    return "\n".join(lines)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=case_of, action="append", metavar="ENGINE:LAG", help="default: hf:0 and hf:1")
    parser.add_argument("--steps", type=whole(low=SETTLED + 2 * WINDOW + 1), default=300)
    parser.add_argument("--json", action="store_true", help="JSON on standard output in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs here, in a new directory")
    arguments = parser.parse_args()
    if arguments.keep is not None and arguments.keep.exists():
        raise UserError(f"--keep {arguments.keep} is there already: name a new directory")
    cases = arguments.case or [Case("hf", 0), Case("hf", 1)]
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = run_benchmark(cases, steps=arguments.steps, folder=folder, out=arguments.out)
    print(to_json(report) if arguments.json else "\n".join(map(_line, report["results"])))
    return 0 if all(part["is_steady"] for one in report["results"] for part in _parts(one).values()) else 1


if __name__ == "__main__":
    run_cli(_main)
