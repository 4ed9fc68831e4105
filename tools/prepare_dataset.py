"""Prepares question files: published layouts become records (docs/data.md), and records are checked and looked at.

    python tools/prepare_dataset.py convert --from video_r1 Video-R1-260k.json --out data
    python tools/prepare_dataset.py COMMAND --help

Every command reads its files as a stream, so that their size does not matter. With --json it prints one JSON object on
the last line of standard output.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.data import prepare  # noqa: E402
from megatron_ktr.errors import Parser, run_cli  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((argument for argument in arguments if argument in prepare.COMMANDS), None)
    modules = {}
    for name, summary in prepare.COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        # Only the module of the command that runs is imported: some need the model's tokenizer and a video decoder.
        if name == wanted:
            modules[name] = importlib.import_module(prepare.HOMES.get(name, f"{prepare.__name__}.{name}"))
            modules[name].add_arguments(subparser)
    options = parser.parse_args(arguments)
    return modules[options.command].run(options)


if __name__ == "__main__":
    run_cli(main)
