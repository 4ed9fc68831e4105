"""What vLLM's CPU build needs before it can be imported and started inside our process.

Four things, each of which stops or slows it otherwise:

1. torchvision, which HF's video processors import, does not load by itself beside a CPU torch (``files/hf_model.py``).
2. vLLM inspects a model class in a child process, which does not know of 1; registering the class itself avoids that.
3. Four settings have environment variables only: the engine in this process, no thread pinning (it would pin the
   trainer too), a quiet log.
4. The sampler's small functions are compiled to C++ on first use: half a minute, for a model that needs milliseconds.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from megatron_ktr.files.hf_model import make_torchvision_importable
from megatron_ktr.rollout.vllm.runner import choose_runner

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Read by vLLM when it is imported. A value the user has set stays."""


EXECUTOR_IN_RANKS = "megatron_ktr.rollout.vllm.cpu_executor.CpuRanksExecutor"
"""``distributed_executor_backend`` of an engine in several ranks; on GPUs it is "external_launcher"."""


WHOLE_PROMPTS = {"enable_chunked_prefill": False}
"""An option for engines whose requests have seeds. vLLM computes a prompt in parts where a step's tokens are used up,
and then turns back the request's random generator, which CPU generators cannot: the engine would be lost. Without parts
a step must have room for the longest prompt and response."""


def set_environment() -> None:
    """Call before the first import of vLLM; harmless where there is a GPU."""
    choose_runner()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_vllm_on_cpu(model_dir: Path | str, *, kv_cache_bytes: int = 1 << 28, **options: Any) -> Any:
    """A ``vllm.LLM`` in this process, in fp32, without compilation; ``options`` are its own and win.

    ``kv_cache_bytes`` is allocated at once. vLLM's warm-up run is skipped, as its purpose is to find that number.
    """
    set_environment()
    make_torchvision_importable()
    import torch._dynamo

    torch._dynamo.config.disable = True
    from vllm import LLM, ModelRegistry  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)
    set_num_threads = torch.set_num_threads
    try:
        return LLM(
            str(model_dir),
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "kv_cache_memory_bytes": kv_cache_bytes,
                "disable_log_stats": True,
                "use_tqdm_on_load": False,
                # Normalise in HF's processor. Inside the model, its default, vLLM feeds raw bytes without a word where
                # preprocessor_config.json leaves mean and deviation to HF's defaults.
                "mm_device_do_normalize": False,
                **options,
            },
        )
    finally:
        # vLLM replaces it by a function that only warns, for the whole process.
        torch.set_num_threads = set_num_threads


def stop_vllm_in_process(llm: Any) -> None:
    """Ends an engine of this process and leaves vLLM's process groups, so that another can start; the trainer's own
    groups stay. vLLM's own shutdown ends ``torch.distributed``, whoever started it; so its steps are taken here."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    client = llm.llm_engine.engine_core
    # Else vLLM's own shutdown would still run, whenever the garbage collector comes to the engine.
    client._finalizer.detach()
    core = client.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
