"""The doctor: each check on machines that are broken in just that, the command alone and on several ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.distributed.platform_probe import Gpu, GpuFacts
from megatron_ktr.doctor import attention, machine, ranks, requirements, sniff, software
from megatron_ktr.doctor.attention import NOT_HERE, AttentionFacts
from megatron_ktr.doctor.check import Check, as_text, error_of_import, merge_nodes
from megatron_ktr.doctor.machine import DiskFacts, LimitFacts
from megatron_ktr.doctor.ranks import WorldFacts
from megatron_ktr.doctor.sniff import Measure, check_sniff, slow_ranks
from megatron_ktr.doctor.software import Library
from megatron_ktr.errors import UserError
from megatron_ktr.stack import NEW, OLD, has_core_0_19
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85 * 10**9, 84 * 10**9)
EIGHT = GpuFacts(("NVIDIA H100 80GB HBM3",) * 8, "580.159.04", "2.13.0+cu130", (13, 0), (H100,) * 8)
CPU = GpuFacts(torch_version="2.13.0+cpu")
WORLD = WorldFacts(
    size=16,
    num_nodes=2,
    num_bytes=2**29,
    seconds=0.01,
    offsets=(0.0,) * 16,
    hosts=("node0",) * 8 + ("node1",) * 8,
    sees_directory=(True,) * 16,
    on_gpu=True,
)
GB = 10**9


def is_fine(check: Check) -> None:
    assert check.ok, check


def fails(check: Check, detail: str, remedy: str) -> None:
    """Says what it found and what to do, each in a line."""
    assert not check.ok, check
    assert detail in check.detail and remedy in check.remedy and "\n" not in check.detail + check.remedy


# GPUs


def test_machines_whose_gpus_work_pass():
    for facts in (CPU, EIGHT, replace(EIGHT, listed=(), driver=None), replace(EIGHT, seen=(H100,), is_restricted=True)):
        is_fine(machine.check_gpus(facts))
        is_fine(machine.check_driver(facts))
    assert "a CPU machine" in machine.check_gpus(CPU).detail and "8 x NVIDIA H100" in machine.check_gpus(EIGHT).detail


@pytest.mark.parametrize(
    ("changes", "detail", "remedy"),
    [
        (dict(torch_error="ImportError: libcudart.so"), "libcudart", "reinstall torch"),
        (dict(seen=(), toolkit=None, torch_version="2.13.0+cpu"), "2.13.0+cpu is a CPU build", "CUDA build"),
        (dict(seen=()), "sees none", "--gpus all"),
        (dict(seen=(H100,) * 7), "nvidia-smi lists 8", "restart"),
        (dict(seen=(H100,) * 7 + (replace(H100, name="A100", capability=(8, 0)),)), "several kinds", "one kind"),
        (dict(seen=(replace(H100, free_bytes=20 * GB),) * 8), "GPU 0: 76%", "processes"),
    ],
)
def test_gpus_that_cannot_be_used_are_named(changes, detail, remedy):
    fails(machine.check_gpus(replace(EIGHT, **changes)), detail, remedy)


def test_a_driver_older_than_torchs_cuda_is_named():
    fails(machine.check_driver(replace(EIGHT, driver="535.104.05")), "too old for torch's CUDA 13.0", "driver 580")
    is_fine(machine.check_driver(replace(EIGHT, driver="535.104.05", toolkit=(12, 8))))


def test_fp8_recipes_follow_the_generation_and_mixed_ones_fail():
    def detail(capability: tuple[int, int]) -> str:
        return software.check_fp8(replace(EIGHT, seen=(replace(H100, capability=capability),)), has_te=True).detail

    assert detail((8, 0)).startswith("recipes: none")
    assert detail((9, 0)).startswith("recipes: tensorwise, delayed, blockwise; not mxfp8")
    assert detail((10, 0)) == "recipes: tensorwise, delayed, blockwise, mxfp8"
    assert "Transformer Engine" in software.check_fp8(EIGHT, has_te=False).remedy
    is_fine(software.check_fp8(CPU, has_te=False))
    mixed = replace(EIGHT, seen=(H100, replace(H100, capability=(8, 0))))
    fails(software.check_fp8(mixed, has_te=True), "8.0, 9.0", "one generation")


def test_packed_attention_of_transformer_engine_needs_hopper_or_flash_attn():
    a100 = replace(EIGHT, seen=(replace(H100, capability=(8, 0)),) * 8)
    found = software.check_te_attention(a100, has_te=True, flash_attn=None)
    assert found.ok and "flash-attn 2.1.1 to 2.8.3, and none is installed" in found.detail and "varlen" in found.remedy
    for facts, version in ((EIGHT, None), (a100, "2.8.3"), (a100, "2.7.4.post1")):
        assert software.check_te_attention(facts, has_te=True, flash_attn=version).detail.startswith("fused")
    for version in ("2.1.0", "2.8.3.post1", "2.9"):
        assert software.check_te_attention(a100, has_te=True, flash_attn=version).detail.startswith("not used")
    is_fine(software.check_te_attention(CPU, has_te=False, flash_attn=None))


# Software


def test_transformer_engine_belongs_on_gpus_only_and_in_its_range():
    check = software.check_transformer_engine
    is_fine(check(Library(), has_gpu=False))
    is_fine(check(Library("2.11.0"), has_gpu=True, core="0.16.1"))
    for version in ("2.14.0", "2.17.1", "2.20.2"):
        is_fine(check(Library(version), has_gpu=True, core="0.19.2"))
    assert "install_gpu.sh --te" in check(Library(), has_gpu=True).remedy and check(Library(), has_gpu=True).ok
    fails(check(Library("2.11.0"), has_gpu=False), "on a CPU machine", "pip uninstall transformer-engine")
    for core, pinned, versions in (
        ("0.16.1", "2.11.0", ("2.8.0", "2.12.0")),
        ("0.19.2", "2.17.1", ("2.11.0", "2.21.0")),
    ):
        for version in versions:
            fails(check(Library(version), has_gpu=True, core=core), f"{version}; megatron-core {core}", pinned)
    broken = Library("2.11.0", "undefined symbol: x")
    found = check(broken, has_gpu=True, core="0.16.1")
    fails(found, "undefined symbol", "'transformer-engine-torch==2.11.0'")
    assert "--no-deps --no-cache-dir" in found.remedy, "it must not replace vLLM's torch, nor take another's build"


def test_attention_is_tried_and_its_failures_are_named():
    import torch

    assert attention.try_implementation("torch", device=torch.device("cpu")) == ""
    assert attention.try_implementation("te", device=torch.device("cpu")).startswith(NOT_HERE)
    assert "ValueError" in attention.try_implementation("none", device=torch.device("cpu"))
    here = {"torch": "", "merged": "", "varlen": f"{NOT_HERE}it runs on GPUs"}
    is_fine(attention.check_attention(AttentionFacts(here)))
    broken = AttentionFacts({**here, "te": "RuntimeError: CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH"})
    fails(attention.check_attention(broken), "te: RuntimeError: CUDNN_STATUS", "see the check cudnn")
    fails(attention.check_attention(AttentionFacts({}, error="it ended with code -11")), "code -11", "doctor.attention")


def test_two_cudnns_in_one_process_are_told(tmp_path):
    maps = tmp_path / "maps"
    lines = [f"7f00-7f10 r-xp 00000000 fe:00 12   {path}" for path in ("/v/lib/libcudnn.so.9", "/usr/lib/libc.so.6")]
    maps.write_text("\n".join([*lines, lines[0], "7fff-8000 rw-p 00000000 00:00 0   [stack]"]))
    assert attention.loaded_cudnn(str(maps)) == ["/v/lib/libcudnn.so.9"]
    is_fine(attention.check_cudnn([]))
    one = attention.check_cudnn(["/v/libcudnn.so.9", "/v/libcudnn_ops.so.9"], lacking=["libcudnn_x.so"])
    assert one.ok and one.detail == "/v: libcudnn.so.9, libcudnn_ops.so.9" and "lacks libcudnn_x.so" in one.remedy
    two = attention.check_cudnn(["/v/libcudnn.so.9", "/usr/lib/libcudnn_ops.so.9"])
    fails(two, "/usr/lib: ", "install_gpu.sh --te")


def test_other_libraries_fail_when_missing_old_or_broken():
    triton = software.check_triton
    is_fine(triton(Library(), has_gpu=False))
    is_fine(triton(Library("3.9.0"), has_gpu=True))
    fails(triton(Library(), has_gpu=True), "not installed", "triton>=3.5")
    fails(triton(Library("3.1.0"), has_gpu=False), "3.1.0; needed", "triton>=3.5")
    fails(triton(Library("3.9.0", "ImportError: x"), has_gpu=True), "ImportError", "triton")
    vllm = software.check_vllm
    for version in (None, "0.32.0", "0.32.0+cpu"):
        is_fine(vllm(Library(version), wanted=["vllm==0.32.0"]))
    fails(vllm(Library("0.31.1"), wanted=["vllm==0.32.0"]), "0.31.1, expected ==0.32.0", "vllm==0.32.0")
    fails(vllm(Library("0.32.0", "OSError: x"), wanted=["vllm==0.32.0"]), "OSError", "reinstall")
    is_fine(software.check_apex(None))
    is_fine(software.check_apex(True))
    fails(software.check_apex(False), "not NVIDIA's", "pip uninstall apex")


def test_an_unrelated_package_called_apex_is_told(tmp_path, monkeypatch):
    """Found, and hidden from megatron-core by our package on its import, as in a new process."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise RuntimeError('must not be imported')")
    script = "from megatron_ktr.doctor.software import read_apex; print(read_apex())"
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    assert doctor(sys.executable, "-c", script, PYTHONPATH=paths).stdout == "False\n"
    assert doctor(sys.executable, "-c", script, PYTHONPATH=str(REPOSITORY)).stdout == "None\n"


def test_decoders_are_tried_on_a_clip_and_wrong_pictures_are_seen(tmp_path, monkeypatch):
    assert [check.ok for check in software.check_decoders(software.read_decoders())] == [True, True]
    broken = software.check_decoders({"pyav": "OSError: no libavcodec", "decord": "DecordFailed: crash"})
    fails(broken[0], "libavcodec", "reinstall av")
    fails(broken[1], "crash", "uninstall decord")
    assert software.check_decoders({"pyav": "", "decord": "not installed"})[1].ok

    import megatron_ktr.data.media.frames as frames

    original = frames.read_frames
    mixed_up = lambda *a, **k: replace(read := original(*a, **k), frames_FCHW=read.frames_FCHW.flip(0))  # noqa: E731
    monkeypatch.setattr(frames, "read_frames", mixed_up)
    assert "other pictures" in software.read_decoder("pyav", tmp_path)
    monkeypatch.setattr(frames, "read_frames", lambda *a, **k: 1 / 0)
    assert software.read_decoder("pyav", tmp_path).startswith("ZeroDivisionError")


def test_an_import_is_tried_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os; os._exit(11)")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no GPU')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(3600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error_of_import("json") == ""
    assert error_of_import("crashes") == "its import ended with code 11"
    assert error_of_import("raises") == "RuntimeError: no GPU"
    assert error_of_import("hangs", timeout_seconds=1) == "its import did not end in 1 s"
    fails(requirements.check_core_import("RuntimeError: no GPU"), "no GPU", "Transformer Engine")
    is_fine(requirements.check_core_import(""))


def test_versions_are_compared_with_setup_py():
    declared = requirements.declared_requirements(REPOSITORY / "setup.py")
    core = (OLD if sys.version_info < (3, 12) else NEW).core
    assert any(text.startswith(f"megatron-core=={core};") for text in declared[""])
    assert declared["vllm"] == ["vllm==0.32.0"]
    assert any(text.startswith("decord") and "x86_64" in text for text in declared[""]), "f-strings are put together"
    for check in requirements.check_versions(declared[""]):
        is_fine(check)
    # What CI runs and what the check would accept are the same: the extras' ranges, too.
    pins = [text.partition("==")[2].partition(";")[0] for text in declared["te"]]
    assert pins == [stack.transformer_engine for stack in (OLD, NEW)]
    assert all(software._is_in(stack.transformer_engine, stack.transformer_engine_range) for stack in (OLD, NEW))

    installed = {"torch": "2.10.0", "megatron-core": None, "transformers": "5.16.0", "av": None, "httpx": "0.28"}
    found = requirements.check_versions(declared[""], installed=lambda name: installed.get(name, "99"))
    by_name = {check.name: check for check in found}
    fails(by_name["torch"], "2.10.0 (setup.py: >=2.11)", "pip install 'torch>=2.11'")
    fails(by_name["megatron-core"], "not installed", f"megatron-core=={core}")
    fails(by_name["transformers"], "5.16.0", "transformers")
    fails(by_name["packages"], "av not installed", "pip install 'av'")
    fails(requirements.check_python((3, 10, 4)), "3.10.4", "Python 3.11")
    is_fine(requirements.check_python())
    with pytest.raises(UserError, match="cannot read"):
        requirements.declared_requirements(REPOSITORY / "none.py")


# The machine


def test_disks_that_are_slow_full_or_closed_fail(tmp_path):
    facts = machine.read_disk(tmp_path / "not" / "made" / "yet", num_bytes=8 * 10**6)
    assert facts.directory == str(tmp_path) and facts.bytes_per_second > 0 and not list(tmp_path.iterdir())
    is_fine(machine.check_disk(DiskFacts("runs", 1e9, 500 * GB), has_gpu=True))
    is_fine(machine.check_disk(DiskFacts("runs", 50e6, 5 * GB), has_gpu=False))
    fails(machine.check_disk(DiskFacts("runs", 50e6, 500 * GB), has_gpu=True), "50 MB/s", "faster")
    fails(machine.check_disk(DiskFacts("runs", 1e9, 5 * GB), has_gpu=True), "5 GB free", "free 200 GB")
    fails(machine.check_disk(DiskFacts("runs", error="Read-only file system"), has_gpu=False), "Read-only", "--run-dir")
    assert machine.read_disk(Path("/proc/self"), num_bytes=1).error


def test_shared_memory_of_a_container_is_too_small_for_gpus():
    is_fine(machine.check_shared_memory(64 * 2**20, num_gpus=0))
    is_fine(machine.check_shared_memory(None, num_gpus=0))
    is_fine(machine.check_shared_memory(64 * GB, num_gpus=8))
    fails(machine.check_shared_memory(64 * 2**20, num_gpus=1), "0.07 GB", "--ipc=host")
    fails(machine.check_shared_memory(None, num_gpus=1), "not there", "tmpfs")
    assert machine.read_shared_memory("/none") is None


def test_limits_of_files_and_of_locked_memory():
    assert machine.read_limits().open_files != 0
    is_fine(machine.check_limits(LimitFacts(-1, 65536, has_infiniband=False)))
    is_fine(machine.check_limits(LimitFacts(65536, -1, has_infiniband=True)))
    fails(machine.check_limits(LimitFacts(256, -1, has_infiniband=False)), "256 open files", "ulimit -n")
    fails(machine.check_limits(LimitFacts(65536, 65536, has_infiniband=True)), "InfiniBand", "memlock=-1")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"OMP_NUM_THREADS": "8"}, True),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "32"}, True),
        ({"OMP_NUM_THREADS": "4", "LOCAL_WORLD_SIZE": "8"}, "OMP_NUM_THREADS=2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "OMP_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "\u00b2"}, "OMP_NUM_THREADS=1"),  # a digit to str.isdigit, no number to int
    ],
)
def test_threads_of_all_ranks_fit_the_cores(environment, expected):
    check = machine.check_threads(environment, num_cores=16)
    assert check.ok is (expected is True) and (expected is True or expected in check.remedy)


def test_one_connection_is_wanted_of_ranks_up_to_hopper():
    check = machine.check_connections
    is_fine(check({}, facts=CPU))
    is_fine(check({}, facts=EIGHT))
    is_fine(check({"LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}, facts=EIGHT))
    fails(check({"LOCAL_RANK": "0"}, facts=EIGHT), "not set", "CUDA_DEVICE_MAX_CONNECTIONS=1")
    blackwell = replace(EIGHT, seen=(replace(H100, capability=(10, 0)),) * 8)
    is_fine(check({"LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}, facts=blackwell))


# Ranks


def test_bandwidth_is_that_of_a_rank_on_the_wire():
    # 2 (n - 1) / n of half a GiB in 10 ms.
    assert WORLD.bus_gb_per_second == pytest.approx(2 * 15 / 16 * 2**29 / 0.01 / 1e9)
    is_fine(ranks.check_all_reduce(WORLD))
    is_fine(ranks.check_all_reduce(None))
    slow = replace(WORLD, seconds=1.0)
    fails(ranks.check_all_reduce(slow), "expected 5 or more", "NCCL_DEBUG=INFO")
    is_fine(ranks.check_all_reduce(replace(slow, on_gpu=False)))
    fails(ranks.check_all_reduce(replace(WORLD, is_sum_right=False)), "GB/s", "the sum is wrong")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_cannot_talk_are_a_finding_of_rank_0(monkeypatch, tmp_path, rank):
    def refuse(**options: Any) -> None:
        raise RuntimeError("connection refused\n  by node0")

    spec = importlib.util.spec_from_file_location("doctor_tool", REPOSITORY / "tools" / "doctor.py")
    doctor_tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doctor_tool)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="node0", MASTER_PORT="29500")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor_tool, "check_node", lambda run_dir: [Check("disk", True, "fast")])
    monkeypatch.setattr(ranks, "join_world", refuse)
    found = doctor_tool.examine(run_dir=tmp_path)
    if rank == "1":
        assert found is None
    else:
        assert found[0].name == "disk" and len(found) == 2
        fails(found[1], "the ranks cannot talk: connection refused by node0", "NCCL_DEBUG=INFO")


def test_clocks_and_directories_name_the_node_that_is_off():
    is_fine(ranks.check_clocks(None))
    is_fine(ranks.check_clocks(WORLD))
    late = replace(WORLD, offsets=(0.0,) * 8 + (-4.2,) + (0.0,) * 7)
    fails(ranks.check_clocks(late), "4.2 s", "chrony or ntpd on node1")
    is_fine(ranks.check_shared_directory(WORLD, directory="runs"))
    is_fine(ranks.check_shared_directory(None, directory="runs"))
    blind = replace(WORLD, sees_directory=(True,) * 8 + (False,) * 8)
    fails(ranks.check_shared_directory(blind, directory="runs"), "node1 does not see", "every node has mounted")


def test_a_slow_rank_is_named_with_its_node_and_a_fast_one_is_no_finding():
    def measure(*values: float) -> Measure:
        return Measure("GEMM throughput [TFLOP/s/GPU]", values)

    nan = float("nan")
    assert slow_ranks(measure(*[600.0, 610.0, 605.0, 590.0] * 4)) == (), "within a tenth of the median"
    assert slow_ranks(measure(*[600.0] * 9, 530.0, *[600.0] * 6)) == (9,)
    assert slow_ranks(measure(600.0, 600.0, 600.0, 900.0)) == ()
    assert slow_ranks(measure(600.0, nan, 600.0, 600.0, 400.0, nan)) == (4,), "ranks that took no part do not count"
    assert slow_ranks(measure(100.0, 200.0, 300.0, 400.0, 500.0)) == (0,), "wide spreads are only told at their end"
    assert slow_ranks(measure(600.0, 300.0)) == () and slow_ranks(measure(nan, nan, nan)) == ()

    is_fine(check_sniff((measure(*[600.0] * 16),), world=WORLD))
    found = check_sniff((measure(*[600.0] * 9, 530.0, *[600.0] * 6),), world=WORLD)
    fails(found, "rank 9 (node1) has 530, median 600 of GEMM throughput [TFLOP/s/GPU]", "on node1 (nvidia-smi -q)")
    many = check_sniff((measure(*[600.0] * 10, *[1.0] * 6),), world=WORLD)
    fails(many, "; and 2 more", "node1")
    assert "too few" in check_sniff((measure(600.0, 300.0),), world=replace(WORLD, size=2)).detail


def test_a_sniff_test_that_cannot_run_says_why_and_is_no_success(monkeypatch):
    fails(check_sniff((), world=None), "not run: it compares ranks", "torchrun")
    fails(check_sniff(sniff.read_measures_or_why(has_gpu=False), world=WORLD), "there is none here", "without --sniff")
    monkeypatch.setattr("megatron_ktr.stack.installed", lambda: OLD)
    fails(check_sniff(sniff.read_measures_or_why(has_gpu=True), world=WORLD), "needs megatron-core 0.19.2", "without")


@pytest.mark.skipif(not has_core_0_19(), reason="megatron-core 0.16 has no such test")
def test_measures_are_megatron_cores_and_the_same_on_every_rank(one_rank, monkeypatch):
    """Its own functions, with the clock and the device taken away."""
    import torch

    from megatron_ktr.distributed import sniff as measuring

    test = measuring.load_sniff_test()
    assert test.bench_all_reduce(None) == test.bench_reduce_scatter(None) == test.bench_sendrecv(None) == []
    monkeypatch.setattr(test, "STANDARD_GEMM_SHAPES", [(4, 8, 16)])
    monkeypatch.setattr(test, "_time_cuda_op", lambda run, warmup, iters: (run(), 1e-6)[1])
    on_host = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype: on_host(*size, dtype=dtype))
    ((name, tflops),) = test.bench_gemms()
    assert name == "GEMM throughput (4x8x16, bf16) [TFLOP/s/GPU]" and tflops == pytest.approx(2 * 4 * 8 * 16 / 1e6)

    for bench in ("bench_all_reduce", "bench_reduce_scatter", "bench_sendrecv"):
        monkeypatch.setattr(test, bench, lambda group, bench=bench: [(bench, 1.0)] if group is not None else [])
    monkeypatch.setattr(sniff, "gather", lambda value: [value, value, [(n, v / 2) for n, v in value]])
    monkeypatch.setattr(measuring, "load_sniff_test", lambda: test)
    measures = sniff.read_measures_or_why(has_gpu=True)
    others = ["bench_all_reduce", "bench_reduce_scatter", "bench_sendrecv"]
    assert [measure.name for measure in measures] == [name, *others]
    assert measures[0].values == (tflops, tflops, tflops / 2) and all(slow_ranks(m) == (2,) for m in measures)


def test_findings_of_nodes_become_one_that_names_the_nodes_that_fail():
    good, other = Check("disk", True, "1000 MB/s"), Check("disk", True, "900 MB/s")
    bad = Check("disk", False, "3 MB/s", "a faster one")
    assert merge_nodes({"a": [good]}) == [good]
    assert merge_nodes({"a": [good], "b": [good]}) == [Check("disk", True, "all 2 nodes: 1000 MB/s")]
    assert merge_nodes({"a": [good], "b": [other]})[0].detail == "a: 1000 MB/s; b: 900 MB/s"
    assert merge_nodes({"a": [good], "b": [bad], "c": [bad]}) == [Check("disk", False, "b, c: 3 MB/s", "a faster one")]


def test_the_table_ends_with_what_failed():
    text = as_text([Check("disk", True, "fast"), Check("clock skew", False, "4 s", "start ntpd")])
    assert text.splitlines()[0] == "ok    disk        fast"
    assert "to mend: start ntpd" in text and text.endswith("1 of 2 checks failed: clock skew")
    assert as_text([Check("disk", True, "fast")]).endswith("all is well")


def test_on_a_cpu_machine_it_says_which_commands_work():
    check = ranks.commands_that_work([Check("disk", True, ""), Check("torch", False, "")], has_gpu=False)
    is_fine(check)
    assert all(command in check.detail for command in ("make quickstart", "make replay", "make test"))
    fails(ranks.commands_that_work([Check("disk", False, "")], has_gpu=False), "but not here", "mend disk")


# The command


def doctor(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*command], cwd=REPOSITORY, env={**env, **environment}, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def report_of(done: subprocess.CompletedProcess) -> dict[str, dict[str, Any]]:
    (line,) = done.stdout.splitlines()
    content = json.loads(line)
    assert list(content) == ["checks"]
    assert all(list(check) == ["name", "ok", "detail", "remedy"] for check in content["checks"])
    return {check["name"]: check for check in content["checks"]}


def test_doctor_finds_this_machine_well_or_names_what_is_not(tmp_path):
    done = doctor(sys.executable, "tools/doctor.py", "--json", "--run-dir", str(tmp_path), OMP_NUM_THREADS="1")
    found = report_of(done)
    failed = [name for name, check in found.items() if not check["ok"]]
    assert done.returncode == bool(failed), found
    # What the tests themselves need is there; disk and memory of the machine are its own affair.
    assert set(failed) <= {"disk", "/dev/shm", "ulimit", "commands"}, found
    assert "make quickstart" in found["commands"]["detail"] or found["gpus"]["detail"] != "none: a CPU machine"


def test_doctor_exits_with_1_and_prints_for_people_what_to_mend(tmp_path):
    # A Python that sees no installed package but this repository: a newcomer's before `make setup`.
    done = doctor(sys.executable, "-S", "tools/doctor.py")
    assert done.returncode == 1 and done.stderr == ""
    assert "make setup, then: .venv/bin/python tools/doctor.py" in done.stdout
    assert re.search(r"^FAIL  packages .* lacks torch, numpy, packaging$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("1 of 3 checks failed: packages\n")


@pytest.mark.slow
def test_under_torchrun_rank_0_reports_once_for_all(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/doctor.py"]
    done = doctor(sys.executable, *launcher, "--json", "--run-dir", str(tmp_path), OMP_NUM_THREADS="1")
    found = report_of(done)
    assert re.fullmatch(r"[\d.]+ GB/s a rank \(4 MiB, 2 ranks, 1 nodes\)", found["all-reduce"]["detail"])
    assert found["all-reduce"]["ok"]
    # One machine, one clock; what is measured is also how long a busy machine holds up a rank between two lines.
    assert re.fullmatch(r"[\d.]+ m?s between 2 ranks", found["clock skew"]["detail"])
    assert found["OMP_NUM_THREADS"]["detail"].startswith("1 x 2 ranks")
    assert not list(tmp_path.iterdir())
