"""Checkpoints of a run: which there are, and whether their files are what was written.

    python tools/checkpoint.py list RUN [--json]
    python tools/checkpoint.py verify RUN [--json]

RUN is a run directory; its checkpoints and exports are looked at. It may also be one checkpoint, a converted one or an
export. ``list`` reads sizes and the small files that describe a checkpoint; ``verify`` reads every byte, compares with
``checksums.json``, and refuses pickles that could run code. Ends with 0 if everything is intact, with 1 if anything is
damaged or has no checksums, with 2 if there is nothing to look at. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, find_damage, read_manifest  # noqa: E402
from megatron_ktr.files.intact_checkpoint import TRAINING_FILE, checkpoint_damage, incompleteness  # noqa: E402

INTACT, COMPLETE, DAMAGED, UNKNOWN = "intact", "complete", "damaged", "no checksums"


@dataclass(frozen=True)
class Finding:
    """The result for one directory."""

    path: str
    kind: str
    """training, converted or export."""
    status: str
    """intact (verified), complete (not verified, but every file exists), damaged, or no checksums."""
    step: int | None
    """The training step after which it was saved."""
    num_files: int
    num_bytes: int
    damage: tuple[Damage, ...] = ()


def examine(directory: Path, *, is_thorough: bool) -> Finding:
    kind = kind_of(directory)
    assert kind is not None
    damage = _damage(directory, kind, is_thorough=is_thorough)
    files = [path for path in directory.rglob("*") if path.is_file()]
    status = DAMAGED if damage else INTACT if is_thorough else COMPLETE
    if not damage and not (directory / MANIFEST).exists():
        status = UNKNOWN
    return Finding(
        str(directory),
        kind,
        status,
        _step(directory) if kind == "training" else None,
        num_files=len(files),
        num_bytes=sum(path.stat().st_size for path in files),
        damage=tuple(damage),
    )


def kind_of(directory: Path) -> str | None:
    if (directory / TRAINING_FILE).exists() or directory.name.startswith(("step_", "damaged_step_")):
        return "training"
    if (directory / "metadata.json").exists():
        return "converted"
    is_model = (directory / MANIFEST).exists() or any(directory.glob("*.safetensors"))
    return "export" if is_model else None


def find_directories(run: Path) -> list[Path]:
    """Lists the checkpoints in the order of their steps, then damaged ones that were set aside, then exports."""
    if not run.is_dir():
        raise UserError(f"RUN {run}: no such directory")
    if kind_of(run) is not None:
        return [run]
    inside = run / "checkpoints"
    found = [*sorted(inside.glob("step_*")), *sorted(inside.glob("damaged_step_*")), *sorted(run.glob("export*"))]
    found = [path for path in found if path.is_dir() and kind_of(path) is not None]
    if not found:
        raise UserError(
            f"RUN {run}: no checkpoint or export in it; expected a run directory (with checkpoints/step_*), a "
            "checkpoint or an export"
        )
    return found


def _damage(directory: Path, kind: str, *, is_thorough: bool) -> list[Damage]:
    if not is_thorough:
        return (incompleteness(directory) if kind == "training" else []) or _missing_files(directory)
    damage = checkpoint_damage(directory) if kind == "training" else find_damage(directory)
    return damage or ([] if kind == "export" else _forbidden_pickles(directory))


def _missing_files(directory: Path) -> list[Damage]:
    try:
        names = read_manifest(directory) or {}
    except DamagedManifest as error:
        return [Damage(MANIFEST, str(error))]
    return [Damage(name, "missing") for name in names if not (directory / name).is_file()]


def _forbidden_pickles(directory: Path) -> list[Damage]:
    # This import loads torch, which takes seconds and which ``list`` does not need.
    from megatron_ktr.files.torch_dist_checks import check_chunks, require_tensors

    try:
        check_chunks(directory)
        require_tensors(directory, ())
    except UserError as error:
        path, _, reason = str(error).partition(": ")
        return [Damage(path.removeprefix(f"{directory}/"), reason)]
    return []


def _step(directory: Path) -> int | None:
    try:
        return int(json.loads((directory / TRAINING_FILE).read_bytes())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    run = Path(options.run)
    findings = []
    for directory in find_directories(run):
        findings.append(examine(directory, is_thorough=options.command == "verify"))
        if not options.json:
            print(_line(findings[-1]), flush=True)
    is_fine = all(finding.status in (INTACT, COMPLETE) for finding in findings)
    if options.json:
        plain = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"run": str(run), "ok": is_fine, "directories": plain}), flush=True)
    return 0 if is_fine or options.command == "list" else 1


def _line(finding: Finding) -> str:
    step = "" if finding.step is None else f", step {finding.step}"
    size = f"{finding.num_files} files, {finding.num_bytes / 1e9:.3f} GB"
    details = "".join(f"\n    {damage}" for damage in finding.damage)
    return f"{finding.path}: {finding.status} ({finding.kind}{step}, {size}){details}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, text in (("list", "what there is"), ("verify", "read every byte and compare with the checksums")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", help="run directory, checkpoint, converted checkpoint or export")
        command.add_argument("--json", action="store_true", help="one JSON object on the last line of output")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """Reports bad flags in one line, like every other user error."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


if __name__ == "__main__":
    run_cli(main)
