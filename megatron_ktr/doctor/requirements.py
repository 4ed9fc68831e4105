"""Compares installed versions with those that setup.py asks for. These are read from its text, without running it."""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ktr.doctor.check import Check
from megatron_ktr.errors import UserError

OWN_LINES = ("torch", "megatron-core", "transformers")
"""The packages that have a check of their own; all others share one."""
LEAST_PYTHON = (3, 11)


def declared_requirements(setup_py: Path) -> dict[str, list[str]]:
    """The requirements by extra; ``""`` has those that are always installed.

    Constants in setup.py are evaluated as Python would: texts, names, f-strings of names, and lists and dicts of these.
    """
    try:
        tree = ast.parse(setup_py.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {setup_py}: {error.strerror}") from error
    known: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, known)
            if value is not None:
                known[node.targets[0].id] = value
    return {"": known["INSTALL_REQUIRES"], **known["EXTRAS_REQUIRE"]}  # type: ignore[dict-item]


def _value(node: ast.expr, known: dict[str, object]) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.FormattedValue):
        return _value(node.value, known)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_value(part, known)) for part in node.values)
    if isinstance(node, ast.List):
        return [_value(part, known) for part in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(k, known): _value(v, known) for k, v in zip(node.keys, node.values, strict=True) if k}
    return None


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    text = ".".join(map(str, version))
    is_new = version >= LEAST_PYTHON
    return Check("python", is_new, f"{text} on {platform.system()} {platform.machine()}", _python_remedy(is_new))


def _python_remedy(is_new: bool) -> str:
    return "" if is_new else "use Python 3.11, or 3.12 as on GPUs: make test PYTHON=/path/to/python3.12"


def check_versions(
    requirements: list[str], *, installed: Callable[[str], str | None] = installed_version
) -> list[Check]:
    """One check for each package of ``OWN_LINES``, and the check ``packages`` for all others of this machine."""
    from packaging.requirements import Requirement

    checks, others, problems = [], 0, []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = installed(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        is_fine = version is not None and requirement.specifier.contains(version, prereleases=True)
        detail = version or "not installed"
        if requirement.specifier:
            detail += f" (setup.py: {requirement.specifier})"
        if requirement.name in OWN_LINES:
            checks.append(Check(requirement.name, is_fine, detail, "" if is_fine else f"pip install '{wanted}'"))
        else:
            others += 1
            if not is_fine:
                problems.append((f"{requirement.name} {detail}", f"'{wanted}'"))
    remedy = f"pip install {' '.join(name for _, name in problems)}" if problems else ""
    detail = "; ".join(text for text, _ in problems) or f"{others} others as setup.py wants them"
    return [*checks, Check("packages", not problems, detail, remedy)]


def check_core_import(error: str) -> Check:
    """Checks that megatron.core can be imported. ``error`` is the message of its import; empty if it works."""
    remedy = "" if not error else "mend what the message names; on a CPU machine Transformer Engine breaks this import"
    return Check("megatron-core import", not error, error or "works", remedy)
