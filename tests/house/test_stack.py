"""The two stacks: pinned alike wherever they are written, and refused in words where a feature wants the newer one."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from pathlib import Path

import pytest

from megatron_ktr import stack
from megatron_ktr.config import config_from_values, save_resolved
from megatron_ktr.doctor.requirements import declared_requirements
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import check_same_run
from tests.support.paths import REPOSITORY


def test_setup_py_pins_both_stacks_and_the_older_one_is_for_python_3_11_alone():
    from packaging.requirements import Requirement

    declared = declared_requirements(REPOSITORY / "setup.py")
    for python, expected in (("3.11", stack.OLD), ("3.12", stack.NEW), ("3.13", stack.NEW)):
        chosen = {}
        for requirement in map(Requirement, declared[""] + declared["te"]):
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""}):
                chosen[requirement.name] = str(requirement.specifier)
        assert chosen["megatron-core"] == f"=={expected.core}", python
        assert chosen["transformer-engine"] == f"=={expected.transformer_engine}", python


def test_the_installed_stack_is_the_one_of_the_installed_megatron_core():
    assert stack.installed().core == importlib.metadata.version("megatron-core")
    assert [stack.of_core(version) for version in ("0.16.1", "0.17.0", "0.19.2", "0.20.0rc1", "1.0")] == [
        stack.OLD,
        *[stack.NEW] * 4,
    ]


def test_options_of_the_newer_stack_are_refused_on_the_older_one(monkeypatch):
    monkeypatch.setattr(stack, "installed", lambda: stack.OLD)
    with pytest.raises(UserError, match=r"--some-option needs megatron-core 0\.19\.2, .* Python 3\.12"):
        stack.require_core_0_19("--some-option")
    monkeypatch.setattr(stack, "installed", lambda: stack.NEW)
    stack.require_core_0_19("--some-option")


def test_a_run_saved_on_the_newer_stack_is_judged_by_what_this_one_is_asked_for(monkeypatch, tmp_path: Path):
    checkpoint = tmp_path / "step_00000001"
    (checkpoint / "hf").mkdir(parents=True)
    for folder in (checkpoint / "hf", tmp_path):
        (folder / "config.json").write_text("{}")
    values = dict(model=str(tmp_path), replay_path="r.jsonl")
    monkeypatch.setattr(stack, "installed", lambda: stack.NEW)
    save_resolved(config_from_values({**values, "mlp_chunks": 4}), checkpoint / "config.yaml")
    monkeypatch.setattr(stack, "installed", lambda: stack.OLD)
    check_same_run(config_from_values(values), checkpoint)
    save_resolved(config_from_values({**values, "grad_norm_skip_threshold": 9.0}), checkpoint / "config.yaml")
    with pytest.raises(UserError, match="--grad-norm-skip-threshold was 9.0 when .* was saved, now it is None"):
        check_same_run(config_from_values(values), checkpoint)


def test_advice_is_silenced_by_its_exact_words_and_nothing_else_is():
    """Asked of the logger's filters, not of what is logged: other tests may have set levels and handlers."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    for message, is_heard in (("GPTModel IS DEPRECATED. Use another.", False), ("GPTModel has a problem", True)):
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 1, message, (), None)
        assert bool(logger.filter(record)) is is_heard, message


def test_no_other_module_asks_for_the_version_of_megatron_core():
    asking = re.compile(r"core_version|megatron\.core\.__version__|package_info|version\(.megatron-core.\)")
    folders = [REPOSITORY / name for name in ("megatron_ktr", "models", "tools", "benchmarks")]
    code = [path for folder in folders for path in folder.rglob("*.py")]
    found = [str(path.relative_to(REPOSITORY)) for path in code if asking.search(path.read_text(encoding="utf-8"))]
    assert found == ["megatron_ktr/stack.py"]


PAGES = ("README.md", "CONTRIBUTING.md", "Dockerfile", "tools/make_gpu_bundle.sh", "megatron_ktr/stack.py")
PAGES += tuple(f"docs/{name}.md" for name in ("architecture", "gpu", "install", "launching", "precision"))


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_pinned_versions_only(page: str):
    """Whole versions, as in 0.19.2; ranges and "0.19" are prose."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = {
        "megatron-core": {stack.OLD.core, stack.NEW.core},
        "transformer-engine": {stack.OLD.transformer_engine, stack.NEW.transformer_engine},
    }
    patterns = {
        "megatron-core": r"megatron-core[^\n.]{0,40}?[ =|`](0\.\d+\.\d+)",
        "transformer-engine": r"(?i)transformer.engine[^\n.]{0,40}?[ =|`](2\.\d+\.\d+)",
    }
    for name, pattern in patterns.items():
        found = set(re.findall(pattern, text))
        assert found <= named[name], f"{page} names {name} {found - named[name]}"
        if page in ("docs/install.md", "docs/architecture.md"):
            assert found, f"{page} has the table"
