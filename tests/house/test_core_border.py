"""The border to megatron-core: docs/architecture.md lists every name the code takes, and each is there in what is
installed. A name that core moves fails here by its name, before anything else fails in words of its own."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from megatron_ktr import stack
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = [path for folder in ("megatron_ktr", "models", "tools") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
ONLY_ON = {
    "megatron.core.models.gpt.gpt_model.GPTModel._postprocess": (stack.OLD,),
    "megatron.core.optimizer.optimizer.get_grads_for_grad_norm": (stack.NEW,),
    "megatron.core.optimizer.optimizer.get_main_grads_for_grad_norm": (stack.OLD,),
    "megatron.core.tensor_parallel.random._get_share_storage": (stack.NEW,),
    "megatron.training.gpu_sniff_test": (stack.NEW,),
}
"""What is not used, or not there, on every stack."""
BOTH = (stack.OLD, stack.NEW)


def rows(section: str) -> list[list[str]]:
    """Cells of the table between two marks of the page, without its head."""
    text = PAGE.split(f"<!-- {section}: begin -->")[1].split(f"<!-- {section}: end -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)).removeprefix("megatron_ktr/")


def imported() -> dict[tuple[str, str], set[str]]:
    """(module of megatron-core, name) -> files that import it; the name is empty for a whole module."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                for alias in node.names:
                    found[node.module, alias.name].add(short(path))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("megatron."):
                        found[alias.name, ""].add(short(path))
    return found


def listed() -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for module, names, files, _ in rows("core names"):
        (where,) = quoted(module)
        for name in quoted(names) or [""]:
            found[where, name] = set(quoted(files))
    for name, files, *_ in rows("private names"):
        module, _, last = quoted(name)[0].rpartition(".")
        found[module, last] = set(quoted(files))
    return found


@cache
def names_in(module: str) -> frozenset[str]:
    """What a module's text defines or imports at any depth, and ``Class.attribute``; without running it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is gone"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def is_there(module: str, name: str) -> bool:
    try:
        is_module = importlib.util.find_spec(f"{module}.{name}" if name else module) is not None
    except ModuleNotFoundError:
        is_module = False
    return is_module or name in names_in(module)


def test_the_page_lists_what_the_code_imports_and_nothing_else() -> None:
    def has_import(module: str, name: str) -> bool:
        return (module, name) in imports

    imports = imported()
    page = {key: files for key, files in listed().items() if has_import(*key) or not key[1].startswith("_")}
    assert page == imports


@pytest.mark.parametrize(("module", "name"), sorted(imported()), ids=lambda value: value or "module")
def test_every_imported_name_is_in_the_installed_megatron_core(module: str, name: str) -> None:
    assert is_there(module, name), f"{name} is gone from {module}"


def test_private_names_are_listed_used_and_there() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    own: set[str] = set()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    own.add(node.attr)
    for path, tree in trees.items():
        if not re.search(r"megatron[.-]core", path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.startswith("_") and not name.startswith("__") and name not in own | NOT_OF_CORE:
                    used[name].add(short(path))
    page = {quoted(name)[0].rpartition(".")[2]: set(quoted(files)) for name, files, *_ in rows("private names")}
    assert page == dict(used)
    for name, *_ in rows("private names"):
        whole = quoted(name)[0]
        if stack.installed() not in ONLY_ON.get(whole, BOTH):
            continue
        module, _, last = whole.rpartition(".")
        if importlib.util.find_spec(module.rpartition(".")[0]) and not module.rpartition(".")[2].islower():
            module, _, class_name = module.rpartition(".")
            last = f"{class_name}.{last}"
        assert last in names_in(module), f"{whole} is gone"


NOT_OF_CORE = {
    *("_C", "_get_function_stack_at", "_len_torch_function_stack", "_engine_run_backward", "_world", "_getframe"),
    *("_StorageInfo", "_StoragePrefix"),
    *("_cdata", "_create_file_view", "_current_frames", "_foreach_norm"),
    "_keeps_steps_apart",
}
"""Of torch and of Python, and a mark of our own on an optimizer, in the same files."""


OWN_OPTIONS = {"gradient_accumulation_fusion"}
"""Internals of core whose name is also that of an option here, so that files name it without using core's."""


def test_internals_are_used_where_the_page_says_and_still_there() -> None:
    def words(path: Path) -> set[str]:
        """Names in the code of a file: of attributes, functions, variables, texts of one word; not in comments."""
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for field in ("attr", "name", "id", "arg", "value"):
                value = getattr(node, field, None)
                found |= {value} if isinstance(value, str) and value.isidentifier() else set()
        return found

    in_code = {short(path): words(path) for path in CODE}
    for names, module, files, *_ in rows("internals"):
        (where,) = quoted(module)
        found = {name: {file for file, known in in_code.items() if name in known} for name in quoted(names)}
        assert all(found.values()), f"{[name for name in found if not found[name]]} are not used any more"
        used = set().union(*found.values())
        assert used >= set(quoted(files)), f"files that use {names}"
        assert used == set(quoted(files)) or set(found) & OWN_OPTIONS, f"files that use {names}"
        if stack.installed() not in ONLY_ON.get(where, BOTH):
            continue
        package, _, last = where.rpartition(".")
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        here = {name for name in quoted(names) if stack.installed() in ONLY_ON.get(f"{where}.{name}", BOTH)}
        gone = here - words(Path(folder, f"{last}.py"))
        assert not gone, f"{gone} are gone from {where}"


def test_the_tests_that_the_page_names_exist() -> None:
    sections = ("core names", "private names", "internals")
    cells = [row[-1] for section in sections for row in rows(section)]
    named = {name for cell in cells for name in quoted(cell)}
    assert named and named <= {path.name for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert all(quoted(cell) for cell in cells), "each row names one"
