"""Training whose ranks fail on purpose, as a rank of a launcher: ``faulty_ranks.py PLAN [flags of training]``.

PLAN is a JSON file: a list of ``{"step", "rank", "fault"}``. In the middle of that step, before its update, that rank
does what the fault says; the others go on into their collectives. A fault happens once, also when its step is repeated:
a file beside PLAN remembers it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


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


def main() -> None:
    from megatron_ktr.errors import run_cli
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.train import main as train
    from megatron_ktr.trainer import Trainer

    plan = Path(sys.argv[1])
    faults = json.loads(plan.read_text())
    train_step, update = Trainer.train_step, Policy.update
    now = {"step": 0}

    def step_and_remember(self: Trainer, step: int) -> Any:
        now["step"] = step
        return train_step(self, step)

    def fail_and_update(self: Policy, *args: Any, **kwargs: Any) -> Any:
        for fault in faults:
            done = plan.with_name(f"done_{fault['step']}")
            if fault["step"] == now["step"] and fault["rank"] == self.ranks.rank and not done.exists():
                done.touch()
                print(f"fault: {fault['fault']} in step {fault['step']}, process {os.getpid()}", flush=True)
                fail(fault["fault"])
        return update(self, *args, **kwargs)

    Trainer.train_step, Policy.update = step_and_remember, fail_and_update
    run_cli(lambda: train(sys.argv[2:]))


if __name__ == "__main__":
    main()
