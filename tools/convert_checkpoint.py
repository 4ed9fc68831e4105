"""Converts Qwen2.5-VL weights between Hugging Face and Megatron, streaming, bit for bit.

    python tools/convert_checkpoint.py to-megatron --hf DIR --out DIR
    python tools/convert_checkpoint.py to-hf --megatron DIR --out DIR

The Megatron side is a distributed checkpoint that every tensor x pipeline layout loads, whichever layout saved it.
Memory: about the largest tensor (twice that for a checkpoint saved by several ranks). The target must not exist; it
appears only when it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.errors import Parser, number, run_cli  # noqa: E402
from models.qwen2_5_vl.dist_checkpoint import ConversionReport, convert_to_hf, convert_to_megatron  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    to_megatron = commands.add_parser("to-megatron", help="Hugging Face directory -> Megatron checkpoint")
    to_megatron.add_argument("--hf", required=True, metavar="DIR", help="directory with config.json and *.safetensors")
    to_hf = commands.add_parser("to-hf", help="Megatron checkpoint -> Hugging Face directory")
    to_hf.add_argument("--megatron", required=True, metavar="DIR", help="distributed checkpoint (has metadata.json)")
    to_hf.add_argument(
        "--hf-config", metavar="DIR", help="config, tokenizer, ... come from here (default: hf/ in the checkpoint)"
    )
    to_hf.add_argument(
        "--max-shard-gb",
        type=number(above=0.0, high=1e6),
        default=5.0,
        metavar="N",
        help="size of a safetensors file in 10^9 bytes (5)",
    )
    for command in (to_megatron, to_hf):
        command.add_argument("--out", required=True, metavar="DIR", help="new directory to write")
        command.add_argument("--json", action="store_true", help="report as one JSON object")
    return parser.parse_args(argv)


def main() -> int:
    options = parse_arguments()
    start = time.monotonic()
    if options.command == "to-megatron":
        report = convert_to_megatron(options.hf, options.out)
    else:
        report = convert_to_hf(
            options.megatron,
            options.out,
            side_files_dir=options.hf_config,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
        )
    _print_report(report, time.monotonic() - start, as_json=options.json)
    return 0


def _print_report(report: ConversionReport, seconds: float, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "seconds": round(seconds, 3)}))
    else:
        print(f"{report.out}: {report.num_tensors} tensors, {report.num_bytes / 1e9:.3f} GB, {seconds:.1f} s")


if __name__ == "__main__":
    run_cli(main)
