"""Rules of the house that no single file can see: who may import what, who may name a device, what stays out."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

CODE_FOLDERS = ("megatron_ktr", "models", "tools", "examples", "benchmarks")
ENVIRONMENTS = (".venv", ".git", "build", "dist", "runs")

WINGS = (
    ("types", "terminal", "errors", "stack", "transfer", "sums"),
    ("files",),
    ("processes", "web"),
    ("config",),
    ("ops", "attribution", "rewards"),
    ("objectives", "batch", "distributed", "data"),
    ("models",),
    ("policy", "accounting"),
    ("step",),
    ("rollout",),
    ("run",),
    ("trainer", "launching"),
    ("loop",),
    ("train", "launch"),
)
"""From the ground up. A wing imports from those below it, never from one beside or above it; within itself as it likes.
``models`` is the package of that name; modules at the top of ``megatron_ktr`` are wings of their own, and those on the
ground may import one another."""
FOR_ENTRY_POINTS = ("report", "doctor", "evaluation")
"""They may import anything, and are imported by ``train``, ``loop`` and the tools alone."""

MAY_NAME_CONFIG = (
    "megatron_ktr/config/*",
    "megatron_ktr/train.py",
    "megatron_ktr/rollout/build.py",
    "megatron_ktr/rollout/questions.py",
    "megatron_ktr/evaluation/training/build.py",
    "megatron_ktr/evaluation/training/dry_run.py",
    "megatron_ktr/run/preflight.py",
    "megatron_ktr/run/directory.py",
    "megatron_ktr/run/finished.py",
    "megatron_ktr/run/dry_run/*",
    "megatron_ktr/accounting/objective_costs.py",  # builds a configuration of its own for each objective
)
"""Where the whole ``Config`` is taken apart; what is built there receives its own sections, or facts."""
MAX_TOP_MODULES = 10

MAY_IMPORT = {
    "megatron": (
        "megatron_ktr/policy/policy.py",
        "megatron_ktr/run/checkpoint_state.py",
        "megatron_ktr/distributed/*",
        "megatron_ktr/stack.py",
        "models/*",
        "benchmarks/head/methods.py",  # what we are measured against
    ),
    "models": (
        "models/*",
        "tools/*",
        "megatron_ktr/policy/*",
        "megatron_ktr/run/checkpoint_state.py",
        "megatron_ktr/run/preflight.py",
        "megatron_ktr/run/dry_run/*",
        "megatron_ktr/train.py",
        "megatron_ktr/accounting/*",  # sizes of models, no modules
        "megatron_ktr/evaluation/engines/local.py",  # placeholders and positions, no modules
        "benchmarks/*",
    ),
    "vllm": ("megatron_ktr/rollout/*",),
    "transformer_engine": (
        "models/*/layer_specs.py",
        "benchmarks/gpu_suite/te.py",  # asks it directly
        "megatron_ktr/doctor/attention.py",  # likewise
    ),
    "apex": ("megatron_ktr/distributed/nvidia_apex.py",),
    "decord": ("megatron_ktr/data/media/video*.py",),
    "av": ("megatron_ktr/data/media/video*.py", "megatron_ktr/data/synthetic*.py"),
}
"""Top-level package -> files (patterns) that may import it."""

MAY_NAME_DEVICES = (
    "megatron_ktr/distributed/platform*.py",
    "megatron_ktr/config/words.py",  # the values of --platform
)
MAX_FILE_LINES = 400  # the card says "about 300": this stops the ones that have grown past any reading
MAX_FUNCTION_LINES = 60  # docstring and signature count here
MAX_PARAMETERS = 8  # without self and cls
KERNELS = "megatron_ktr/ops/*_triton_kernels.py"
"""Triton takes every pointer, size and stride as an argument of its own."""


def code_files() -> list[Path]:
    return [path for folder in CODE_FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported_packages(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level packages of absolute imports, also inside functions and ``importlib.import_module("...")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value).split(".")[0], node.lineno


@cache
def packages_of(path: Path) -> tuple[tuple[str, int], ...]:
    """``imported_packages`` of a file, which several rules look at."""
    return tuple(imported_packages(ast.parse(path.read_text(encoding="utf-8"))))


def device_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Identifiers and strings that name a device or backend; docstrings and comments may talk about them."""
    pattern = re.compile(r"\b(cuda|nccl|gloo)\b")
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = node.value
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
        else:
            continue
        if pattern.search(text):
            yield text, node.lineno


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_is_imported_only_inside_its_border(package):
    offenders = [
        f"{name_of(path)}:{line}"
        for path in code_files()
        for found, line in packages_of(path)
        if found == package and not any(fnmatch(name_of(path), pattern) for pattern in MAY_IMPORT[package])
    ]
    assert not offenders, f"{package} may be imported only by {MAY_IMPORT[package]}"


def wing_of(module: str) -> str:
    """``megatron_ktr.step.plan`` -> ``step``; anything in ``models`` -> ``models``; the package itself -> nothing."""
    parts = module.split(".")
    return "models" if parts[0] == "models" else parts[1] if len(parts) > 1 else ""


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Wings of this repository's packages that a file imports, also inside functions, not for type checkers alone."""
    for node in ast.walk(without_typing_imports(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # "from megatron_ktr import stack" names a module.
            is_package = node.module == "megatron_ktr"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
        else:
            continue
        yield from ((wing_of(name), node.lineno) for name in names if name.split(".")[0] in ("megatron_ktr", "models"))


def without_typing_imports(tree: ast.Module) -> ast.Module:
    """Without ``if TYPE_CHECKING:`` at the top: such an import names a type and runs nothing."""
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return tree


def test_imports_go_downward_only():
    level = {wing: height for height, wings in enumerate(WINGS) for wing in wings}
    offenders = []
    for path in code_files():
        name = name_of(path)
        if not name.startswith(("megatron_ktr/", "models/")) or name == "megatron_ktr/__init__.py":
            continue
        own = wing_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert own in level or own in FOR_ENTRY_POINTS, f"{name}: which floor is {own} on?"
        for wing, line in own_imports(path):
            if not wing or wing == own or own in FOR_ENTRY_POINTS:
                continue
            is_entry = own in ("train", "loop") and wing in FOR_ENTRY_POINTS
            is_ground = own in WINGS[0] and wing in WINGS[0]
            if not (is_entry or is_ground or level.get(wing, len(WINGS)) < level[own]):
                offenders.append(f"{name}:{line} {own} imports {wing}")
    assert not offenders


def test_few_modules_stand_at_the_top():
    modules = [path.stem for path in (REPOSITORY / "megatron_ktr").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= MAX_TOP_MODULES, sorted(modules)


def names_config(path: Path) -> bool:
    """Whether a file has the name ``Config`` of ``megatron_ktr.config``, in annotations too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("megatron_ktr.config")
        and any(alias.name == "Config" for alias in node.names)
        for node in ast.walk(tree)
    )


def test_config_stops_at_the_door():
    offenders = [
        name_of(path)
        for path in code_files()
        if name_of(path).startswith(("megatron_ktr/", "models/"))
        and names_config(path)
        and not any(fnmatch(name_of(path), pattern) for pattern in MAY_NAME_CONFIG)
    ]
    assert not offenders, "hand over a section, or facts that are worked out once"


def test_no_module_imports_the_packages_that_were_replaced():
    unwanted = {"torchvision", "torchaudio", "torchcodec", "qwen_vl_utils", "trl", "verl"}
    offenders = [
        f"{name_of(path)}:{line} {found}"
        for path in code_files()
        for found, line in packages_of(path)
        if found in unwanted and name_of(path) != "benchmarks/data.py"  # what decoding is measured against
    ]
    assert not offenders


def test_only_the_platform_names_devices_and_backends():
    offenders = [
        f"{name_of(path)}:{line} {text!r}"
        for path in code_files()
        if not any(fnmatch(name_of(path), pattern) for pattern in MAY_NAME_DEVICES)
        for text, line in device_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not offenders


def test_device_rule_sees_strings_and_attributes_but_not_prose():
    source = '"""cuda in prose"""\nx.cuda()\ny = "cuda:0"\nz = torch.cuda\nmodel_parallel_cuda_seed()\n# cuda\n'
    assert sorted(line for _, line in device_names(ast.parse(source))) == [2, 3, 4]


def published_files() -> list[Path]:
    """Text files that belong to the repository: tracked ones, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode == 0:
        paths = [REPOSITORY / line for line in listing.stdout.split("\0") if line]
    else:  # an unpacked archive
        paths = [
            path
            for path in REPOSITORY.rglob("*")
            if not any(part.startswith(ENVIRONMENTS) for part in path.relative_to(REPOSITORY).parts)
        ]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def test_no_path_of_a_machine_and_no_package_index_is_written_down():
    # Put together from pieces, so that this file does not contain what it forbids.
    paths = [f"/{folder}/" for folder in ("work", "root", "home", "opt", "tmp", "Users")]
    addresses = ["://py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "--index" + "-url"]
    boundary = r"(?<![\w.*\-}/])"  # "self.work/x" and "a/tmp/b" are no absolute paths
    pattern = re.compile("|".join([boundary + re.escape(path) for path in paths] + [re.escape(a) for a in addresses]))
    offenders = [
        f"{name_of(path)}:{number} {line.strip()[:80]}"
        for path in published_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not offenders


def test_nothing_installs_the_unrelated_apex_package():
    setup = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(setup) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names = [re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower() for text in strings]
    assert "megatron-core" in names, "the parsing above must see requirements"
    assert "apex" not in names


def test_files_and_functions_stay_readable():
    offenders = []
    for path in code_files():
        source = path.read_text(encoding="utf-8")
        num_lines = source.count("\n")
        if num_lines > MAX_FILE_LINES:
            offenders.append(f"{name_of(path)}: {num_lines} lines")
        if fnmatch(name_of(path), KERNELS):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    offenders.append(f"{name_of(path)}:{node.lineno} {node.name}: {length} lines")
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                number = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
                if number > MAX_PARAMETERS:
                    offenders.append(f"{name_of(path)}:{node.lineno} {node.name}: {number} parameters")
    assert not offenders, (
        f"{MAX_FILE_LINES} lines a file; {MAX_FUNCTION_LINES} lines, {MAX_PARAMETERS} parameters a function"
    )


def test_every_module_with_code_says_what_it_is_for():
    offenders = []
    for path in code_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            offenders.append(name_of(path))
    assert not offenders
