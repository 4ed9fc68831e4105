"""Checkpoints of a run: which there are, whether their files are what was written, and exports of them.

    python tools/checkpoint.py list RUN [--json]
    python tools/checkpoint.py verify RUN [--json]
    python tools/checkpoint.py export RUN --out DIR [--step N] [--json]

RUN is a run directory; its checkpoints and exports are looked at. It may also be one checkpoint, a converted one or an
export. ``list`` reads sizes and the small files that describe a checkpoint; ``verify`` reads every byte, compares with
``checksums.json``, and refuses pickles that could run code. Ends with 0 if everything is intact, with 1 if anything is
damaged or has no checksums, with 2 if there is nothing to look at, or a file cannot be read, with 74 where that may
pass. With --json the last line is one JSON object.

``export`` writes a Hugging Face directory, which transformers and vLLM load, from any checkpoint: that of step N, or of
a run the newest. It verifies the checkpoint first, needs one process and no GPU, about the memory of the largest
tensor, and DIR appears only when it is complete. A checkpoint of adapters (LoRA) holds no whole model and is refused.
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

from megatron_ktr.errors import Parser, UserError, run_cli, whole  # noqa: E402
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, find_damage, read_manifest  # noqa: E402
from megatron_ktr.files.intact_checkpoint import TRAINING_FILE, checkpoint_damage, incompleteness  # noqa: E402
from megatron_ktr.files.listing import paths_below, paths_in  # noqa: E402

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
    files = [path for path in paths_below(directory) if path.is_file()]
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
    is_named = directory.name.startswith(("step_", "damaged_step_")) and directory.parent.name != "exports"
    if (directory / TRAINING_FILE).exists() or is_named:
        return "training"
    if (directory / "metadata.json").exists():
        return "converted"
    is_model = (directory / MANIFEST).exists() or bool(paths_in(directory, "*.safetensors"))
    return "export" if is_model else None


def find_directories(run: Path) -> list[Path]:
    """Lists the checkpoints in the order of their steps, then damaged ones that were set aside, then exports."""
    if not run.is_dir():
        raise UserError(f"RUN {run}: no such directory")
    if kind_of(run) is not None:
        return [run]
    inside = run / "checkpoints"
    found = [
        *paths_in(inside, "step_*"),
        *paths_in(inside, "damaged_step_*"),
        *paths_in(run, "export*"),
        *paths_in(run / "exports", "step_*"),
    ]
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


def export(run: Path, out: Path, *, step: int | None, as_json: bool) -> int:
    """Writes the export of one checkpoint of ``run``, or of the checkpoint ``run`` itself."""
    # It loads torch and the model's tables, which the other commands do not need.
    from models.qwen2_5_vl.dist_checkpoint import convert_to_hf

    checkpoint = find_checkpoint(run, step=step)
    report = convert_to_hf(checkpoint, out, is_export=True)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), **dataclasses.asdict(report)}), flush=True)
    else:
        print(f"{report.out}: {report.num_tensors} tensors, {report.num_bytes / 1e9:.3f} GB, of {checkpoint}")
    return 0


def find_checkpoint(run: Path, *, step: int | None) -> Path:
    """The checkpoint that is meant: ``run`` itself if it is one, else that of ``step``, or the newest."""
    found = [path for path in find_directories(run) if path == run or path.parent == run / "checkpoints"]
    found = [path for path in found if not path.name.startswith("damaged_") or path == run]
    found = [path for path in found if kind_of(path) in ("training", "converted")]
    if step is not None:
        chosen = [path for path in found if _step(path) == step]
        if not chosen:
            known = ", ".join(str(_step(path)) for path in found) or "none"
            raise UserError(f"--step {step}: no such checkpoint in {run}; there are: {known}")
        return chosen[0]
    if not found:
        raise UserError(f"RUN {run}: no checkpoint in it to export")
    return found[-1]


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    run = Path(options.run)
    if options.command == "export":
        return export(run, Path(options.out), step=options.step, as_json=options.json)
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    texts = {
        "list": "what there is",
        "verify": "read every byte and compare with the checksums",
        "export": "write a Hugging Face directory from a checkpoint",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", help="run directory, checkpoint, converted checkpoint or export")
        command.add_argument("--json", action="store_true", help="one JSON object on the last line of output")
        if name == "export":
            command.add_argument("--out", required=True, metavar="DIR", help="new directory to write")
            command.add_argument(
                "--step", type=whole(low=0, high=10**12), metavar="N", help="of this step (the newest)"
            )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
