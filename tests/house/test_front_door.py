"""The first pages: figures are what their script draws, links lead somewhere, printed output is the tool's own."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.paths import REPOSITORY as ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/paper/README.md", *sorted(DOCS.glob("*.md"))]


def draw_figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "tools" / "draw_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_figures_are_what_the_script_draws(tmp_path: Path) -> None:
    drawn = draw_figures().write_figures(tmp_path)
    assert [path.name for path in drawn] == ["method.svg", "architecture.svg"]
    for path in drawn:
        assert path.read_bytes() == (DOCS / "figures" / path.name).read_bytes(), "run tools/draw_figures.py"


def test_the_readme_shows_the_table_of_the_committed_quickstart() -> None:
    """As the tool prints it; only that function is run, because the tool's imports take longer than all tests here."""
    source = (ROOT / "tools" / "quickstart.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "_table"]
    names: dict[str, Any] = {"Any": Any}
    exec(compile(ast.Module(body=nodes, type_ignores=[]), "quickstart", "exec"), names)
    summary = json.loads((DOCS / "quickstart" / "summary_seed0.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert names["_table"](summary) in readme
    with_two = json.loads((DOCS / "quickstart" / "summary_seed0_two_processes.json").read_text(encoding="utf-8"))
    assert (summary["num_processes"], with_two["num_processes"]) == (1, 2)
    assert f"ends at {summary['accuracy_ktr']:.3f} with one" in readme
    assert f"at {with_two['accuracy_ktr']:.3f} with two" in readme


def anchors(page: Path) -> set[str]:
    """The names GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_the_list_of_pages_names_every_page_once() -> None:
    listed = re.findall(
        r"^- \[[^]]*\]\(([a-z0-9_]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")
