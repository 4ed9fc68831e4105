"""Transformer Engine's layers and the plain ones are one model: the same checkpoints, published names and numbers.

Transformer Engine does not run on CPU. Layers with its parameter names stand where its modules would be
(``tests/support/te_names.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.sections import ModelSection
from megatron_ktr.distributed.groups import ParallelSizes
from tests.support.layouts import sizes_of
from tests.support.parity import Medium, make_group, max_relative_difference, pack, weights_R
from tests.support.ranks import RankContext, RankPool
from tests.support.tiny import save_tiny_hf

MEDIA = (Medium("image", (1, 4, 6)), Medium("video", (2, 4, 4), seconds_per_grid=1.0))
LAYOUTS = {"one rank": ParallelSizes(), "tp2 sp pp2": sizes_of(2, 2, sp=True), "tp4 pads the vision MLP": sizes_of(4)}


def both_specs(context: RankContext, *, hf_dir: Path, sizes: ParallelSizes, folder: Path) -> dict[str, Any]:
    """What each specification exports and stores, what the other reads of it, and what both compute."""
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights
    from models.qwen2_5_vl.dist_weights import load_megatron_weights, save_megatron_weights
    from models.qwen2_5_vl.model import build_model
    from tests.support.te_names import te_layers

    groups = context.init(sizes)
    config = Qwen2_5_VLConfig.from_hf(hf_dir)
    found: dict[str, Any] = {}
    with te_layers():
        models = {
            impl: build_model(
                config, ranks=groups, options=ModelOptions.of(Config(model=ModelSection(transformer_impl=impl)))
            )
            for impl in ("local", "te")
        }
        for impl, model in models.items():
            load_hf_weights(model, hf_dir, ranks=groups)
            exported = {name: tensor.clone() for name, tensor in export_hf_tensors(model, ranks=groups)}
            names = [name for name, _ in model[0].named_parameters()]
            found[impl] = {"exported": exported, "stored": stored_tensors(model), "names": names}
        for source, target in (("local", "te"), ("te", "local")):
            directory = folder / source
            if context.rank == 0:
                directory.mkdir()
            torch.distributed.barrier()
            save_megatron_weights(models[source], directory)
            with torch.no_grad():
                for parameter in models[target][0].parameters():
                    parameter.zero_()
            load_megatron_weights(models[target], directory)
            found[target]["read"] = {n: t.clone() for n, t in export_hf_tensors(models[target], ranks=groups)}
    if sizes.model == 1:
        group = [make_group(config, media=MEDIA, response_lengths=(4, 1, 6), seed=5)]
        for impl, model in models.items():
            found[impl] |= forward_backward(model, pack(group), weights_R(group), groups=groups)
    return found


def forward_backward(chunks: list[Any], batch: Any, weight_R: Tensor, *, groups: Any) -> dict[str, Any]:
    from models.qwen2_5_vl.conversion import export_hf_tensors

    model = chunks[0]
    logprob_R = model.response_statistics(model(batch), batch).logprob_R
    (-(weight_R * logprob_R).sum()).backward()
    gradients = dict(export_hf_tensors(chunks, ranks=groups, tensor_of=lambda p: p.grad))
    return {"logprob": logprob_R.detach(), "gradients": gradients}


def stored_tensors(model: list[Any]) -> set[tuple[Any, ...]]:
    """Key, global shape and place of everything this rank would write; the layers' own states are not tensors."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from models.qwen2_5_vl.dist_weights import model_sharded_state_dict

    found = set()
    for value in model_sharded_state_dict(model)["model"].values():
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in built if isinstance(built, list) else [built]:
            if isinstance(part, ShardedTensor):
                found.add((part.key, part.global_shape, part.global_offset, part.local_shape, str(part.replica_id)))
    return found


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    save_tiny_hf(directory, vision_depth=2, vision_ffn_size=42)
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_specifications_export_store_and_read_the_same(
    ranks: RankPool, hf_dir: Path, tmp_path: Path, layout: str
) -> None:
    sizes = LAYOUTS[layout]
    for found in ranks(both_specs, sizes.model, hf_dir=hf_dir, sizes=sizes, folder=tmp_path):
        local, te = found["local"], found["te"]
        assert local["stored"] == te["stored"]
        expected = local["exported"]
        for tensors in (te["exported"], local["read"], te["read"]):
            assert list(tensors) == list(expected)
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert any(name.endswith("linear_fc1.layer_norm_weight") for name in te["names"])
        assert not any("layer_norm_weight" in name for name in local["names"])
        if "vision.patch_embed.weight" in te["names"]:
            assert "vision.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in te["names"]
        if sizes.model == 1:
            # The same operations in the same order.
            torch.testing.assert_close(te["logprob"], local["logprob"], rtol=0, atol=0)
            assert max_relative_difference(te["gradients"], local["gradients"]) <= 1e-6
