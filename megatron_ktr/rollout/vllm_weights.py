"""New weights into a running vLLM engine, and everything forgotten that was computed with the old ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


def load_weights(llm: Any, weights: Iterator[tuple[str, Tensor]] | Path | str) -> None:
    """Loads HF-named tensors, or a Hugging Face directory, into the workers of a ``vllm.LLM`` that has no request
    running.

    vLLM's ``reload_weights`` empties the workers' encoder cache only. The scheduler still believes the media are
    there (the next request that shows one of them fails with "Encoder cache miss"), and the prefix cache still holds
    the old weights' keys and values; both are reset here.
    """
    named = "weights_path" if isinstance(weights, Path | str) else "weights_iterator"
    value = str(weights) if named == "weights_path" else weights
    llm.collective_rpc("reload_weights", kwargs={named: value})
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
