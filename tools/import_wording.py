"""Reads the exact wording of a release out of your checkout of its repository, and writes it as a --prompt-template.

    python tools/import_wording.py ~/Video-R1 --of video_r1 --out video_r1.jinja

The text of a release is its authors' and no part of this project. Its source is parsed; nothing of it is run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.data.wording import BUILT_IN, WordingTemplate  # noqa: E402
from megatron_ktr.data.wording_import.importer import import_wording  # noqa: E402
from megatron_ktr.data.wording_import.releases import RELEASES  # noqa: E402
from megatron_ktr.errors import Parser, UserError, run_cli  # noqa: E402
from megatron_ktr.files.atomic import write_atomically  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release_dir", type=Path, metavar="RELEASE_DIR", help="your checkout of the repository")
    parser.add_argument("--of", required=True, choices=tuple(RELEASES), help="which release it is")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="template to write; it must not exist")
    parser.add_argument("--part", help="train or eval, where the release has both (default: train)")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the release that its text depends on (tw_grpo: model_args.question_type=single)",
    )
    parser.add_argument("--json", action="store_true", help="say what was written as one JSON object")
    return parser.parse_args(argv)


def main() -> int:
    options = parse_arguments()
    settings = dict(_setting(written) for written in options.setting)
    imported = import_wording(options.release_dir, release=options.of, part=options.part, settings=settings)
    if str(options.out) in BUILT_IN:
        raise UserError(f"--out {options.out}: a wording of ours has that name; name the file {options.out}.jinja")
    if options.out.exists():
        raise UserError(f"--out {options.out} already exists")
    try:
        write_atomically(options.out, imported.template)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}") from error
    wording = WordingTemplate(options.out)
    if options.json:
        facts = {**imported.facts, "names": dict(imported.names), "settings": dict(imported.settings)}
        print(to_json({"out": str(options.out), "digest": wording.digest, **facts}))
        return 0
    lines = ", ".join(f"{name} (line {line})" for name, line in imported.names.items())
    print(f"wrote {wording.describe()}")
    print(f"found {lines} in {imported.facts['file']}; use it with --prompt-template {options.out}")
    return 0


def _setting(written: str) -> tuple[str, str]:
    name, sign, value = written.partition("=")
    if not sign:
        raise UserError(f"--setting {written!r}: expected NAME=VALUE")
    return name, value


if __name__ == "__main__":
    run_cli(main)
