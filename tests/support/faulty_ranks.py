"""Training whose ranks fail on purpose, as a rank of a launcher: ``faulty_ranks.py PLAN [flags of training]``.

PLAN is a JSON file: a list of ``{"step", "rank", "fault"}``. In the middle of that step, before its update, that rank
does what the fault says; the others go on into their collectives. A fault happens once, also when its step is repeated:
a file beside PLAN remembers it.

Of a rank that hangs, time is what tells. Here no time passes: where a rank waits that will wait for ever, its watchdog
is told that it has waited for long. So the limit of a hang may be longer than anything that a busy machine does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LONG_SECONDS = 1e6


def fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "loop":
        while True:
            time.sleep(0.01)
    elif fault == "kill the agent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)  # the kernel ends this process
    elif fault == "kill the launcher":
        agent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        os.kill(int(agent[1]), signal.SIGKILL)
        time.sleep(3600)
    elif fault == "cut":
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    else:
        raise ValueError(fault)


def done_file(plan: Path, fault: dict[str, Any]) -> Path:
    return plan.with_name(f"done_{fault['step']}")


def make_hangs_old(watchdog: Any, *, faults: list[dict[str, Any]], plan: Path, rank: int) -> None:
    """Makes the phase of this rank old when the rank will stay where it is: in its own loop, or in the collective of
    the update in which it waits for a rank that is stopped."""
    from megatron_ktr.processes.frames import place_of_main_thread

    def stays(fault: dict[str, Any]) -> bool:
        place = place_of_main_thread()
        if fault["fault"] == "loop":
            return fault["rank"] == rank and "faulty_ranks.py" in place.function
        return fault["rank"] != rank and place.is_collective and place.caller.startswith("policy/policy.py")

    ahead = [one for one in faults if one["fault"] in ("loop", "stop") and not done_file(plan, one).exists()]
    while not any(done_file(plan, fault).exists() and stays(fault) for fault in ahead):
        time.sleep(0.1)
    watchdog._since -= LONG_SECONDS


def main() -> None:
    from megatron_ktr.errors import run_cli
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.run.watchdog import Watchdog
    from megatron_ktr.train import main as train
    from megatron_ktr.trainer import Trainer

    plan = Path(sys.argv[1])
    faults = json.loads(plan.read_text())
    watch = Watchdog.__init__

    def watch_and_make_old(self: Watchdog, *args: Any, **kwargs: Any) -> None:
        watch(self, *args, **kwargs)
        values = {"faults": faults, "plan": plan, "rank": kwargs["rank"]}
        threading.Thread(target=make_hangs_old, args=(self,), kwargs=values, daemon=True).start()

    train_step, update = Trainer.train_step, Policy.update
    now = {"step": 0}

    def step_and_remember(self: Trainer, step: int) -> Any:
        now["step"] = step
        return train_step(self, step)

    def fail_and_update(self: Policy, *args: Any, **kwargs: Any) -> Any:
        for fault in faults:
            done = done_file(plan, fault)
            if fault["step"] == now["step"] and fault["rank"] == self.ranks.rank and not done.exists():
                print(f"fault: {fault['fault']} in step {fault['step']}, process {os.getpid()}", flush=True)
                done.touch()
                fail(fault["fault"])
        return update(self, *args, **kwargs)

    Trainer.train_step, Policy.update = step_and_remember, fail_and_update
    Watchdog.__init__ = watch_and_make_old
    run_cli(lambda: train(sys.argv[2:]))


if __name__ == "__main__":
    main()
