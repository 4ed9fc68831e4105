"""Prepares this process for vLLM's CPU build, and starts and stops its engine.

Four problems stop or slow the CPU build otherwise:

1. torchvision, which Hugging Face's video processors import, does not load by itself beside a CPU build of torch
   (``files/hf_model.py``).
2. vLLM inspects a model class in a child process, which lacks the remedy for 1. Registering the class itself avoids
   the inspection.
3. Four settings exist only as environment variables. They run the engine in this process, switch off thread pinning
   (which would also pin the trainer's threads), and keep the log quiet.
4. The sampler's small functions are compiled to C++ on first use. That takes half a minute, for a model that needs
   milliseconds.
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
"""Environment variables that vLLM reads when it is imported. Values that the user has set are kept."""


EXECUTOR_IN_RANKS = "megatron_ktr.rollout.vllm.cpu_executor.CpuRanksExecutor"
"""The ``distributed_executor_backend`` of an engine in several ranks on CPU; on GPUs it is "external_launcher"."""


WHOLE_PROMPTS = {"enable_chunked_prefill": False}
"""An option for engines on CPU whose requests have seeds. By default vLLM computes a prompt in parts if a step has no
room for all its tokens, and then resets the offset of the request's random generator. Generators on CPU cannot do this,
and the engine would crash. Without parts, a step must have room for the longest prompt and response."""


def set_environment() -> None:
    """Sets the environment variables. Call it before the first import of vLLM; it does no harm on a GPU machine."""
    choose_runner()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_vllm_on_cpu(model_dir: Path | str, *, kv_cache_bytes: int = 1 << 28, **options: Any) -> Any:
    """A ``vllm.LLM`` in this process, in fp32 and without compilation. ``options`` are passed to it and override the
    defaults.

    ``kv_cache_bytes`` are allocated at the start. vLLM's profiling run is skipped, as its purpose is to find this size.
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
                # Pixels are normalised in Hugging Face's processor. By default vLLM normalises inside the model, where
                # it silently feeds raw bytes if preprocessor_config.json leaves mean and deviation to their defaults.
                "mm_device_do_normalize": False,
                **options,
            },
        )
    finally:
        # vLLM replaces this function, for the whole process, by one that only warns.
        torch.set_num_threads = set_num_threads


def stop_vllm_in_process(llm: Any) -> None:
    """Ends an engine of this process and destroys vLLM's process groups, so that another engine can start.

    The trainer's process groups stay. vLLM's own shutdown cannot be used, because it would also end
    ``torch.distributed``, which the trainer started. So all its other steps are repeated here.
    """
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    client = llm.llm_engine.engine_core
    # Otherwise vLLM's own shutdown would still run when the engine is garbage-collected.
    client._finalizer.detach()
    core = client.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
