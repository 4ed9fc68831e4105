"""New weights into a running vLLM engine, and everything forgotten that was computed with the old ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.files.hf_files import SafetensorsReader, published_name
from megatron_ktr.files.json_files import read_json_object


def load_weights(
    llm: Any, weights: Iterator[tuple[str, Tensor]] | Path | str, *, expected: frozenset[str] = frozenset()
) -> None:
    """Loads HF-named tensors, or a Hugging Face directory, into the workers of a ``vllm.LLM`` that has no request
    running.

    vLLM takes a tensor at a time and keeps no more than one of its layers' beside the model. Its ``reload_weights``
    empties the workers' encoder cache only. The scheduler still believes the media are there (the next request that
    shows one of them fails with "Encoder cache miss"), and the prefix cache still holds the old weights' keys and
    values; both are reset here.

    Raises:
        UserError: vLLM does not know a name, or one of the ``expected`` names did not come (vLLM would only log it).
    """
    if isinstance(weights, Path | str):
        request: dict[str, Any] = {"weights_path": str(weights)}
    else:
        request = {"weights_iterator": _complete(weights, expected)}
    try:
        llm.collective_rpc("reload_weights", kwargs=request)
    except ValueError as error:
        raise UserError(f"vLLM does not take these weights: {error}") from error
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")


def stored_names(model_dir: Path | str) -> frozenset[str]:
    """Published names of a Hugging Face directory's weights, as the trainer exports them: without a tied head."""
    names = {published_name(name) for name in SafetensorsReader(model_dir).infos}
    config = read_json_object(Path(model_dir) / "config.json", option="model")
    if config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)):
        names.discard("lm_head.weight")
    return frozenset(names)


def _complete(weights: Iterator[tuple[str, Tensor]], expected: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    missing = set(expected)
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor
    if missing:
        raise UserError(f"rollout engine: {len(missing)} weights were not sent, among them {sorted(missing)[0]}")
