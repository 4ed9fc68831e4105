"""Loads new weights into a running vLLM engine, and resets all caches that were computed with the old ones."""

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
    """Loads tensors under Hugging Face's names, or a Hugging Face directory, into the workers of a ``vllm.LLM``.
    No request may be running.

    vLLM takes one tensor at a time, and holds the tensors of at most one layer beside the model. Its ``reload_weights``
    empties the encoder cache of the workers only. The scheduler would still believe that the media are cached there, so
    that the next request with one of them would fail with "Encoder cache miss". The prefix cache would still hold keys
    and values of the old weights. Both are therefore reset here.

    Raises:
        UserError: vLLM does not know a name, or one of the ``expected`` names is missing (vLLM would only log that).
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
    """The published names of the weights in a Hugging Face directory, as the trainer exports them. A head that is tied
    to the embedding is not among them."""
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


def without_encoder(names: frozenset[str]) -> frozenset[str]:
    """The names of weights that are not those of the vision encoder."""
    return frozenset(name for name in names if not name.startswith("visual."))
