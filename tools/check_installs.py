"""Dry-resolves every `pip install` that the documentation, the Dockerfile and the doctor name, and prints a table.

    .venv/bin/python tools/check_installs.py [--match te]
    .venv312/bin/python tools/check_installs.py

The pip (22.2 or newer) of the Python that runs it is asked with --dry-run, as if nothing were installed; nothing is.
Run it once with each Python: which versions belong together depends on it. What is built without isolation needs a
CUDA build of torch there. It needs the network, and minutes: not part of `make test`. docs/log.md has results. Ends
with 1 if a command fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_ktr.errors import Parser, UserError, run_cli  # noqa: E402

TOKEN = re.compile(r"\s+('[^'\n]+'|--?[a-z][a-z-]*|\.(?=[\s`)]|$)|[A-Za-z][\w.\[\],=<>-]*\w)")
NOT_RESOLVED = ("--force-reinstall", "--upgrade", "--quiet", "--no-deps", "--no-cache-dir")
"""Options about installed packages or about dependencies. They are dropped, because the dry run regards nothing as
installed and resolves everything."""
SHOWN = ("torch", "megatron-core", "vllm", "transformers", "transformer-engine", "av")


@dataclass(frozen=True)
class Install:
    place: str
    arguments: tuple[str, ...]
    """The arguments after ``pip install``."""


def installs_of(text: str, *, place: str) -> list[Install]:
    """Finds the ``pip install`` commands in a page, a Dockerfile or a remedy.

    A command ends where prose begins: after a comma, at a bracket, or at the end of a line without a backslash.
    """
    text = text.replace("\\\n", " ")
    found = []
    for match in re.finditer(r"(?<!\w)pip install(?= )", text):
        arguments, at = [], match.end()
        while token := TOKEN.match(text, at):
            if "\n" in token[0]:
                break
            arguments.append(token[1].strip("'"))
            at = token.end()
            if text[at : at + 1] == ",":
                break
        if arguments:
            found.append(Install(place, tuple(arguments)))
    return found


def remedies() -> list[str]:
    """The remedies that the doctor gives on a machine that lacks everything."""
    from megatron_ktr.doctor import requirements, software

    declared = requirements.declared_requirements(ROOT / "setup.py")
    missing = software.Library()
    checks = [
        *requirements.check_versions(declared[""], installed=lambda name: None),
        software.check_transformer_engine(missing, has_gpu=True),
        software.check_transformer_engine(software.Library("1.0"), has_gpu=True),
        software.check_triton(missing, has_gpu=True),
        *software.check_decoders({"pyav": "broken", "decord": "not installed"}),
        software.check_vllm(missing, wanted=declared["vllm"]),
    ]
    return [check.remedy for check in checks]


def find_installs() -> list[Install]:
    """Finds every install command once, in the order of the pages."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "Dockerfile"]
    found: dict[tuple[str, ...], Install] = {}
    for path in pages:
        # A package that is built from a clone (NVIDIA's apex) is not on any index, so its commands are removed.
        text = re.sub(r"RUN git clone(?:.*\\\n)*.*\n", "", path.read_text(encoding="utf-8"))
        for install in installs_of(text, place=path.name):
            found.setdefault(install.arguments, install)
    for remedy in remedies():
        for install in installs_of(remedy, place="doctor"):
            found.setdefault(install.arguments, install)
    return list(found.values())


def resolve(install: Install) -> tuple[bool, str]:
    """Whether pip finds a set of versions; and the most important of them, or else pip's error."""
    arguments = [argument for argument in install.arguments if argument not in NOT_RESOLVED]
    with tempfile.TemporaryDirectory(prefix="check-installs-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", str(report)]
        # A build without isolation needs the installed torch, so installed packages must not be ignored.
        if "--no-build-isolation" not in arguments:
            command.append("--ignore-installed")
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip(" |") for line in done.stderr.splitlines()]
            # The exception of a failed build says more than pip's own message about it.
            found = [line for line in lines if re.match(r"\w*Error: ", line)] or [ln for ln in lines if "ERROR" in ln]
            return False, (found or ["no words"])[-1][:200]
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in entries}
    shown = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
    return True, ", ".join([*shown, f"{len(versions)} packages"])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only commands that contain this text")
    options = parser.parse_args(argv)
    is_good = True
    installs = [install for install in find_installs() if options.match in " ".join(install.arguments)]
    if not installs:
        raise UserError(f"--match {options.match}: no install command contains it")
    for install in installs:
        command = " ".join(install.arguments)
        resolved, words = resolve(install)
        is_good &= resolved
        print(f"{'ok  ' if resolved else 'FAIL'}  {install.place}: pip install {command}\n      {words}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    run_cli(main)
