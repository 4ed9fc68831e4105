"""Evaluates a model on published benchmarks: one command, the official figures and honest ones beside them.

    python tools/evaluate.py --model DIR|URL --benchmark NAME[=PATH],...|FILE --frames 16,32,64 --out DIR
    python tools/evaluate.py compare DIR_A DIR_B          two evaluations, paired by item
    python tools/evaluate.py report DIR                   tables and page again, without a model
    python tools/evaluate.py --score-responses FILE.jsonl --protocol official

Each command has its own --help. docs/evaluation.md explains benchmarks, protocols and the output directory.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.errors import Parser, UserError, run_cli  # noqa: E402

EXAMPLES = """examples:
  All five benchmarks of the paper, with the three numbers of frames of its table, on the GPUs at hand. Below bench/
  lie the folders that you downloaded: bench/video_holmes, bench/mmvu, ...

    python tools/evaluate.py --model exports/ktr --benchmark video_holmes,video_mmmu,mmvu,tempcompass,videomme \\
        --benchmark-root bench --frames 16,32,64 --paper --out runs/ktr

  The command again goes on where it was ended, in whatever way. The same --out takes more columns:

    ... --frames 32 --control shuffled,blank,hidden --out runs/ktr     what order and sight are worth
    ... --frames 32 --votes 8 --out runs/ktr                           the majority of 8 answers
    ... --test-time-scaling sparse_to_dense --out runs/ktr             Video-RTS

  Are all questions and videos there? (Needs no model.)

    python tools/evaluate.py --benchmark mmvu=downloads/MMVU --check

  100 questions of your own file on a running server; the key is in the variable MY_KEY:

    python tools/evaluate.py --server-url https://host/v1 --served-model name --api-key-env MY_KEY \\
        --benchmark questions.json --limit 100 --out runs/served
"""
COMMANDS = {
    "compare": "two evaluations, paired by item, with tests of significance by category",
    "report": "tables and page of an evaluation again, or one page for several, without a model",
}
SCORE = "--score-responses"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        raise UserError(
            "say what to evaluate: --model DIR|URL --benchmark NAME=PATH --out DIR, or one of the commands "
            f"{', '.join(COMMANDS)}; --help has examples"
        )
    if arguments[0] in COMMANDS:
        # Only the module of the command that runs is imported: an evaluation needs the model's code.
        module = importlib.import_module(f"megatron_ktr.evaluation.commands.{arguments[0]}")
        parser = _parser(f"{COMMANDS[arguments[0]]}.", prog=f"evaluate.py {arguments[0]}")
        module.add_arguments(parser)
        return module.run(parser.parse_args(arguments[1:]))
    if any(argument.partition("=")[0] == SCORE for argument in arguments):
        return _score(arguments)
    from megatron_ktr.evaluation.commands import evaluate
    from megatron_ktr.evaluation.commands import options as evaluate_options

    parser = _parser(__doc__, prog="evaluate.py", epilog=EXAMPLES)
    evaluate_options.add_arguments(parser)
    return evaluate.run(parser.parse_args(arguments))


def _score(arguments: list[str]) -> int:
    from megatron_ktr.evaluation.commands import score_responses
    from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES

    parser = _parser("Judges stored responses anew.", prog=f"evaluate.py {SCORE}")
    parser.add_argument(
        SCORE,
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines {"question": {"problem_type": ..., "solution": ..., ...}, "model_output": "..."}',
    )
    parser.add_argument("--protocol", choices=PROTOCOL_NAMES, default="official", help="who judges (official)")
    parser.add_argument("--json", action="store_true", help="print {num, accuracy, format}")
    return score_responses.run(parser.parse_args(arguments))


def _parser(description: str | None, *, prog: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    run_cli(main)
