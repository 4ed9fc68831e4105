"""The commands of ``examples/paper/README.md``: training commands pass a dry run, tools read the flags of theirs."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ktr.config import load_config
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.run.dry_run.command import dry_run
from tests.support.paths import REPOSITORY

README = REPOSITORY / "examples" / "paper" / "README.md"
UNCHECKED = ("hf", "find", "git", "mkdir", "export", "source", "python3.12", "PYTHON=.venv-gpu/bin/python")
"""Downloads and the shell's own."""


class Parsed(BaseException):
    """Raised in place of what a tool would do after it has read its flags."""


def commands() -> Iterator[list[str]]:
    """The words of every command; one of a loop for each value of its variable."""
    for block in re.findall(r"^```bash\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        variable, values = "", [""]
        for line in block.replace("\\\n", " ").splitlines():
            if loop := re.fullmatch(r"for (\w+) in (.+); do", line):
                variable, values = f"${loop[1]}", loop[2].split()
            elif line == "done":
                variable, values = "", [""]
            elif line:
                for value in values:
                    yield shlex.split(line.replace(variable, value) if variable else line)


def of_program(*programs: str) -> list[list[str]]:
    return [words for words in commands() if words[0] in programs]


def test_every_command_is_checked_here_or_is_known_not_to_be() -> None:
    checked = ("python", "examples/launch/torchrun.sh", "sbatch")
    unknown = [words for words in commands() if words[0] not in (*checked, *UNCHECKED)]
    assert not unknown
    assert len(of_program("examples/launch/torchrun.sh")) > 10, "the loops are seen"


def training_flags() -> list[list[str]]:
    by_hand = [words[2 + words.index("-m") :] for words in of_program("python") if "-m" in words]
    scripts = [words[1:] for words in of_program("examples/launch/torchrun.sh")]
    return [*by_hand, *scripts, *(words[2:] for words in of_program("sbatch"))]


@pytest.mark.parametrize("flags", training_flags(), ids=lambda flags: " ".join(flags)[:90])
def test_every_training_command_passes_a_dry_run(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert "this run is sound" in dry_run(load_config([*flags, "--dry-run"]), find_held_out=find_held_out)


def tool_commands() -> list[list[str]]:
    return [words[1:] for words in of_program("python") if "-m" not in words]


@pytest.mark.parametrize("words", tool_commands(), ids=lambda words: " ".join(words)[:90])
def test_every_tool_reads_the_flags_of_its_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        parse(self, *arguments, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        raise Parsed

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        runpy.run_path(words[0], run_name="__main__")


def test_the_table_names_every_file_of_the_folder() -> None:
    named = set(re.findall(r"\]\((\w+\.yaml)\)", README.read_text(encoding="utf-8")))
    assert named == {path.name for path in README.parent.glob("*.yaml")}
    ablation = {Path(words[2]).name for words in of_program("examples/launch/torchrun.sh") if "ablation" in words[2]}
    assert ablation == {path.name for path in (README.parent / "ablation").glob("*.yaml")} - {"evt.yaml"}
