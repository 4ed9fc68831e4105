"""What ``tools/prepare_dataset.py`` does: one module of this folder per subcommand.

A module ``NAME.py`` has two functions, and a line in ``COMMANDS`` makes it the subcommand ``NAME``:

    add_arguments(parser: argparse.ArgumentParser) -> None    adds its options to the subcommand's parser
    run(options: argparse.Namespace) -> int                   does it and returns the exit code

With ``--json`` a subcommand prints exactly one JSON object, on the last line of standard output. Text for people goes
to standard output without it, and progress goes to standard error.
"""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "convert": "turn published files into question files for --data-path",
    "validate": "check every record of a question file and the media it shows",
    "preview": "write a page with some samples as the model will see them",
    "stats": "measure media, prompts and decoding, and suggest options for a token budget",
}
"""Subcommand -> what it does, in one line."""

HOMES: Mapping[str, str] = {"preview": "megatron_ktr.report.preview"}
"""Subcommands whose module is not in this folder: a page is made in ``report``, which may import this wing."""
