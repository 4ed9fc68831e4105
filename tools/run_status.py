"""Whether a run is alive, where it is, what it left out, when it ends and what looks wrong, from its directory.

    python tools/run_status.py RUN [--verify] [--json] [--watch [SECONDS]]

RUN is the --run-dir of a training. Everything is read from files, also while the run writes them and from another
machine: heartbeats of its ranks (status/), metrics.jsonl, events.jsonl, checkpoints, options. Of processes on other
hosts it sees only the heartbeats. --verify reads every byte of the newest checkpoint; without it only sizes are
compared with checksums.json. --watch prints anew every few seconds for as long as the run is alive. With --json the
last line is one JSON object.

Exit code: 0 the run is alive, finished, or left when it was asked to; 1 something looks wrong (the run failed, died or
is silent, or a line begins with WRONG); 2 RUN is no run directory.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.errors import Parser, number, run_cli  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.run.status.judge import ALIVE_STATES, judge  # noqa: E402
from megatron_ktr.run.status.read import read_run_facts  # noqa: E402
from megatron_ktr.run.status.table import as_json, table  # noqa: E402

CLEAR = "\x1b[H\x1b[2J"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--verify", action="store_true", help="read every byte of the newest checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument(
        "--watch",
        type=number(low=0.2, high=3600),
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="print anew every so many seconds (5) while the run is alive",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    while True:
        run = read_run_facts(options.run, verifies=options.verify)
        verdict = judge(run)
        if options.json:
            print(to_json(as_json(run, verdict)), flush=True)
        else:
            if options.watch and sys.stdout.isatty():
                print(CLEAR, end="")
            print(table(run, verdict), flush=True)
        if not options.watch or verdict.state not in ALIVE_STATES:
            return 1 if verdict.looks_wrong else 0
        time.sleep(options.watch)


if __name__ == "__main__":
    run_cli(main)
