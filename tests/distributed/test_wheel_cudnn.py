"""cuDNN: the wheel's, whole and first, where Transformer Engine is installed; and nothing at all elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_ktr.distributed.wheel_cudnn import libraries, missing_libraries, use_wheels_cudnn, wheels_folder

NAMES = ("adv", "cnn", "engines_precompiled", "graph", "heuristic", "ops")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages ``nvidia.cudnn`` and ``transformer_engine`` that are found first; gives cuDNN's ``lib``."""
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    for name in ("", *(f"_{name}" for name in NAMES)):
        (folder / f"libcudnn{name}.so.9").write_bytes(b"")
    (folder / "libcudnn_graph.so.9").write_bytes(b"\x00libcudnn_heuristic.so\x00libcudnn_engines_tensor_ir.so\x00")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nvidia", "transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    # A package without __init__ has all places of its name: only the first here.
    (tmp_path / "nvidia" / "__init__.py").write_text("")
    monkeypatch.setenv("CUDNN_HOME", "")  # so that what is set here is taken back
    monkeypatch.delenv("CUDNN_HOME")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{os.pathsep}/system/lib")
    yield folder
    for name in ("nvidia", "nvidia.cudnn"):
        sys.modules.pop(name, None)


def test_all_of_the_wheels_cudnn_is_loaded_and_no_part_before_what_it_needs(wheel: Path) -> None:
    given: list[Path] = []
    assert use_wheels_cudnn(load=given.append) == given
    assert {path.parent for path in given} == {wheel} and len(given) == len(NAMES) + 1
    names = [path.name for path in given]
    assert names[:2] == ["libcudnn_graph.so.9", "libcudnn_ops.so.9"] and names[-1] == "libcudnn.so.9"
    # A child that imports Transformer Engine itself, without us, finds the same.
    assert os.environ["CUDNN_HOME"] == str(wheel.parent)
    assert os.environ["LD_LIBRARY_PATH"] == f"{wheel}{os.pathsep}/system/lib"
    use_wheels_cudnn(load=given.append)
    assert os.environ["LD_LIBRARY_PATH"].count(str(wheel)) == 1, "a rank of a launcher that has said so already"


def test_what_a_person_chose_stays_and_a_broken_library_is_named(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        if "adv" in path.name:
            raise OSError("file too short")

    with pytest.warns(UserWarning, match="libcudnn_adv.so.9 beside torch cannot be loaded .file too short."):
        assert len(use_wheels_cudnn(load=refuse)) == len(NAMES)
    monkeypatch.setenv("CUDNN_HOME", "/another")
    assert use_wheels_cudnn(load=refuse) == [] and os.environ["CUDNN_HOME"] == "/another"


def test_without_transformer_engine_nothing_is_loaded(wheel: Path) -> None:
    (wheel.parents[2] / "transformer_engine" / "__init__.py").unlink()
    (wheel.parents[2] / "transformer_engine").rmdir()
    assert use_wheels_cudnn(load=lambda path: pytest.fail(f"{path} was loaded")) == []
    assert "CUDNN_HOME" not in os.environ


def test_what_the_graph_library_looks_for_in_vain_is_found(wheel: Path) -> None:
    assert wheels_folder() == wheel
    assert missing_libraries(wheel) == ["libcudnn_engines_tensor_ir.so"]
    (wheel / "libcudnn_engines_tensor_ir.so.9").write_bytes(b"")
    assert missing_libraries(wheel) == [] and len(libraries(wheel)) == len(NAMES) + 2
