"""The benchmarks by name. To add one, write one file in ``benchmarks`` and add a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.benchmarks.question_file import benchmark_of_file

_FOLDER = "megatron_ktr.evaluation.benchmarks"
BENCHMARKS: Mapping[str, str] = {
    "video_holmes": f"{_FOLDER}.video_holmes:BENCHMARK",
    "video_mmmu": f"{_FOLDER}.video_mmmu:BENCHMARK",
    "mmvu": f"{_FOLDER}.mmvu:BENCHMARK",
    "tempcompass": f"{_FOLDER}.tempcompass:BENCHMARK",
    "videomme": f"{_FOLDER}.videomme:BENCHMARK",
    "mvbench": f"{_FOLDER}.mvbench:BENCHMARK",
    "vsibench": f"{_FOLDER}.vsibench:BENCHMARK",
}
"""Name -> module:attribute."""


def load_benchmark(name_or_file: str) -> Benchmark:
    """The benchmark of this name, or that of a question file of one's own, whose name is the file's without its ending.

    Raises:
        UserError: it is neither.
    """
    if name_or_file in BENCHMARKS:
        module, _, attribute = BENCHMARKS[name_or_file].partition(":")
        benchmark = getattr(importlib.import_module(module), attribute)
        assert isinstance(benchmark, Benchmark)
        return benchmark
    path = Path(name_or_file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is neither a benchmark nor a file"
        raise UserError(f"--benchmark {name_or_file} {what}: expected {', '.join(BENCHMARKS)}, or a question file")
    if path.stem in BENCHMARKS:
        raise UserError(
            f"--benchmark {name_or_file}: its results would look like those of the benchmark {path.stem}: give the "
            f"file another name, or evaluate --benchmark {path.stem}"
        )
    return benchmark_of_file(path, name=path.stem)
