"""One HTML page about one or more training runs: curves, rollouts with their key tokens and frames, options.

    python tools/report.py --run-dir runs/quickstart/sft runs/quickstart/ktr --summary runs/quickstart/summary.json

The page holds everything itself (no network, no scripts) and is written to report.html in the last run directory
unless --out names a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.errors import Parser, UserError, run_cli, whole  # noqa: E402
from megatron_ktr.files.json_files import read_json_object  # noqa: E402
from megatron_ktr.report.html import Most, write_report  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", type=Path, nargs="+", required=True, metavar="DIR", help="run directories, in the page's order"
    )
    parser.add_argument("--title", nargs="+", default=[], metavar="TEXT", help="one per run (default: its objective)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the last run)")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="headline numbers (default: the runs' summary.json)"
    )
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="directory of the media (default: as in the run)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model whose tokenizer made the responses")
    parser.add_argument("--max-groups", type=whole(low=0), default=4, metavar="N", help="questions to show per run (4)")
    parser.add_argument(
        "--max-frames", type=whole(low=0), default=16, metavar="N", help="pictures to show per video (16)"
    )
    parser.add_argument("--json", action="store_true", help="say what was written as one JSON object")
    return parser.parse_args(argv)


def read_summary(path: Path | None, run_dirs: list[Path]) -> dict | None:
    """Reads ``path``, or summary.json of the first run directory that has one; None if there is neither."""
    if path is None:
        path = next((run_dir / "summary.json" for run_dir in run_dirs if (run_dir / "summary.json").is_file()), None)
    if path is None:
        return None
    return read_json_object(path, option="--summary")


def main() -> int:
    options = parse_arguments()
    if options.title and len(options.title) != len(options.run_dir):
        raise UserError(f"--title: {len(options.title)} titles for {len(options.run_dir)} run directories")
    titles = options.title or [None] * len(options.run_dir)
    written = write_report(
        list(zip(titles, options.run_dir, strict=True)),
        out=options.out or options.run_dir[-1] / "report.html",
        summary=read_summary(options.summary, options.run_dir),
        media_root=options.media_root,
        model=options.model,
        most=Most(groups=options.max_groups, frames=options.max_frames),
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(written)))
        return 0
    for stage in written.stages:
        print(f"{stage.title}: {stage.num_steps} steps, {stage.num_groups} questions, {stage.num_frames} frames")
        for note in stage.notes:
            print(f"  {note}")
    print(f"wrote {written.out} ({written.num_bytes / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_cli(main)
