"""The commands that ``tools/check_installs.py`` asks pip about: all that are written down, cut where prose begins."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_installs", REPOSITORY / "tools" / "check_installs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_installs"] = module  # its dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("| `make setup`, or `pip install -e '.[cpu,dev]'` |", [("-e", ".[cpu,dev]")]),
        ("`pip install wheel` and `pip install '.[te]'` |", [("wheel",), (".[te]",)]),
        (
            "RUN pip install --upgrade pip \\\n    && pip install 'a==1' 'b'\nRUN x",
            [("--upgrade", "pip"), ("a==1", "b")],
        ),
        ("pip install --force-reinstall decord, or pip uninstall decord", [("--force-reinstall", "decord")]),
        ("pip install 'vllm==0.32.0' (CPU: make setup-vllm) for servers", [("vllm==0.32.0",)]),
        ("pip install .\nmore", [(".",)]),
        ("what pip installs", []),
    ],
)
def test_a_command_ends_where_prose_begins(tool: Any, text: str, expected: list[tuple[str, ...]]) -> None:
    assert [install.arguments for install in tool.installs_of(text, place="x")] == expected


def test_pages_dockerfile_and_doctor_are_read(tool: Any) -> None:
    found = {install.arguments: install.place for install in tool.find_installs()}
    assert found[("--editable", ".[vllm]")] == "install.md" and found[("-e", ".[cpu,dev]")] == "install.md"
    (rebuild,) = (arguments for arguments in found if any("transformer-engine-torch==" in word for word in arguments))
    assert found[rebuild] == "doctor" and {"--no-deps", "--no-build-isolation"} <= set(rebuild)
    assert "Dockerfile" in found.values() and "doctor" in found.values()
    words = {word for arguments in found for word in arguments}
    assert "apex" not in words and not words & {"and", "or", "it", "for"}, "prose"
