"""Conversion between Hugging Face directories and live Megatron models: exact in both directions, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights, named_model_parameters, save_hf
from models.qwen2_5_vl.model import build_model
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from models.qwen2_5_vl.weight_map import TE_NAMES, weight_specs
from tests.support.tiny import save_tiny_hf

UNTIED = dict(num_layers=4, vision_depth=2, vision_ffn_size=42)
TIED = dict(num_layers=4, vision_depth=2, tie_word_embeddings=True, num_kv_heads=1)
"""4 does not divide 42, nothing divides 199 (the vocabulary), and one key-value head serves all tensor ranks."""


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory) -> dict[str, Path]:
    directories = {}
    for name, options in (("untied", UNTIED), ("tied", TIED)):
        directories[name] = tmp_path_factory.mktemp(name)
        save_tiny_hf(directories[name], **options)
    return directories


def differing_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing, extra or not equal bit for bit."""
    names = sorted(set(actual) | set(expected))
    return [n for n in names if n not in actual or n not in expected or not torch.equal(actual[n], expected[n])]


def loaded_model(hf_dir: Path | str, groups):
    model = build_model(Qwen2_5_VLConfig.from_hf(hf_dir), ranks=groups)
    load_hf_weights(model, hf_dir, ranks=groups)
    return model


def load_and_export(context, *, hf_dir: str, sizes: ParallelSizes, gather_to: str) -> dict[str, torch.Tensor]:
    groups = context.init(sizes)
    model = loaded_model(hf_dir, groups)
    return {name: t.clone() for name, t in export_hf_tensors(model, ranks=groups, gather_to=gather_to)}


LAYOUTS = [
    pytest.param("untied", ParallelSizes(tensor=4), 4, id="tp4 pads vision mlp"),
    pytest.param("untied", ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), 4, id="tp2 pp2 sp"),
    pytest.param("untied", ParallelSizes(pipeline=2, virtual_pipeline=2), 4, id="pp2 two chunks dp2"),
    pytest.param("tied", ParallelSizes(tensor=2, pipeline=2), 4, id="tied tp2 pp2, shared kv head"),
    pytest.param("tied", ParallelSizes(tensor=2), 2, id="tied tp2"),
]


@pytest.mark.parametrize("name, sizes, world_size", LAYOUTS)
def test_load_then_export_is_bit_exact_on_every_rank(ranks, hf_dirs, name, sizes, world_size):
    results = ranks(load_and_export, world_size=world_size, hf_dir=str(hf_dirs[name]), sizes=sizes, gather_to="all")
    expected = load_file(hf_dirs[name] / "model.safetensors")
    for exported in results:
        assert differing_tensors(exported, expected) == []


def test_export_to_source_yields_on_the_source_rank_only(ranks, hf_dirs):
    sizes = ParallelSizes(tensor=2, pipeline=2)
    results = ranks(load_and_export, hf_dir=str(hf_dirs["untied"]), sizes=sizes, gather_to="source")
    assert differing_tensors(results[0], load_file(hf_dirs["untied"] / "model.safetensors")) == []
    assert results[1:] == [{}, {}, {}]


def shard_facts(context, *, hf_dir: str) -> dict[str, bool | list[str]]:
    """What must hold inside a TP 4 shard, checked against the file by hand."""
    groups = context.init(ParallelSizes(tensor=4))
    (model,) = loaded_model(hf_dir, groups)
    hf = load_file(Path(hf_dir) / "model.safetensors")
    rank, p = groups.tensor_rank, dict(model.named_parameters())
    # 199 words padded to 200: 50 a rank, the last row of the last rank is padding.
    words = p["language.embedding.word_embeddings.weight"]
    expected_words = torch.cat([hf["model.embed_tokens.weight"], torch.zeros(1, 64)])[rank * 50 : (rank + 1) * 50]
    # 42 padded to 44: 11 gate rows, then 11 up rows a rank; the last two of each on rank 3 are padding.
    gate, up = (hf[f"visual.blocks.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    rows = slice(rank * 11, min(rank * 11 + 11, 42))
    padding = torch.zeros(11 - (rows.stop - rows.start), 32)
    expected_fc1 = torch.cat([gate[rows], padding, up[rows], padding])
    down = torch.cat([hf["visual.blocks.1.mlp.down_proj.weight"][:, rows], padding.T], dim=1)
    return {
        "words": torch.equal(words, expected_words),
        "gate and up": torch.equal(p["vision.decoder.layers.1.mlp.linear_fc1.weight"], expected_fc1),
        "down": torch.equal(p["vision.decoder.layers.1.mlp.linear_fc2.weight"], down),
    }


def test_padding_is_zero_and_sits_behind_the_true_rows_of_each_shard(ranks, hf_dirs):
    for facts in ranks(shard_facts, hf_dir=str(hf_dirs["untied"])):
        assert all(facts.values()), facts


def test_qkv_rows_are_grouped_as_megatron_attention_splits_them(one_rank, hf_dirs):
    """4 query heads and 2 key-value heads of 16: group 0 is q0 q1 k0 v0, group 1 is q2 q3 k1 v1."""
    (model,) = loaded_model(hf_dirs["untied"], one_rank)
    hf = load_file(hf_dirs["untied"] / "model.safetensors")
    q, k, v = (hf[f"model.layers.2.self_attn.{part}_proj.bias"].view(-1, 16) for part in "qkv")
    expected = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    assert torch.equal(model.language.decoder.layers[2].self_attention.linear_qkv.bias, expected)
    # Vision: 4 heads of 8, q, k and v of each head together.
    fused = hf["visual.blocks.0.attn.qkv.bias"].view(3, 4, 8)
    assert torch.equal(model.vision.decoder.layers[0].self_attention.linear_qkv.bias, fused.transpose(0, 1).reshape(-1))


def test_gradients_come_out_under_hf_names_and_absent_ones_are_left_out(one_rank, hf_dirs):
    model = loaded_model(hf_dirs["untied"], one_rank)
    for _, parameter in named_model_parameters(model):
        parameter.grad = 2 * parameter.detach()
    model[0].vision.patch_embed.weight.grad = None
    exported = dict(export_hf_tensors(model, ranks=one_rank, tensor_of=lambda parameter: parameter.grad))
    expected = {name: 2 * t for name, t in load_file(hf_dirs["untied"] / "model.safetensors").items()}
    del expected["visual.patch_embed.proj.weight"]
    assert differing_tensors(exported, expected) == []


# Names


@pytest.mark.parametrize("size", PUBLISHED_CONFIGS)
def test_table_calls_for_exactly_the_tensors_of_the_published_sizes(size):
    """The oracle is transformers' own model on the meta device, under the names it writes."""
    config = PUBLISHED_CONFIGS[size]
    expected = {
        name: tuple(tensor.shape) for name, tensor in meta_hf_state(config).items() if name_is_stored(name, config)
    }
    ours = {
        name: shape
        for spec in weight_specs(config)
        if not spec.is_tied_copy
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
    assert ours == expected


def name_is_stored(name: str, config: Qwen2_5_VLConfig) -> bool:
    return not (name == "lm_head.weight" and config.tie_word_embeddings)


def meta_hf_state(config: Qwen2_5_VLConfig) -> dict[str, torch.Tensor]:
    from transformers import Qwen2_5_VLConfig as HFConfig

    text, vision = config.text, config.vision
    hf_config = HFConfig(
        text_config=dict(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(text.mrope_section)},
        ),
        vision_config=dict(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_heads=vision.num_heads,
            out_hidden_size=vision.out_hidden_size,
        ),
        tie_word_embeddings=config.tie_word_embeddings,
    )
    with torch.device("meta"):
        state = HFModel(hf_config).state_dict()
    # In memory transformers 5 nests both halves under "model."; files keep the published names.
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in state.items()
    }


def test_transformer_engine_names_are_understood():
    """Modules with TE's names stand in for TE, which does not run here."""

    class FusedNormLinear(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(2))

    layer = torch.nn.Module()
    layer.layer_number = 7
    layer.self_attention, layer.mlp = torch.nn.Module(), torch.nn.Module()
    layer.self_attention.linear_qkv, layer.mlp.linear_fc1 = FusedNormLinear(), FusedNormLinear()
    model = torch.nn.Module()
    model.language = torch.nn.Module()
    model.language.decoder = torch.nn.Module()
    model.language.decoder.layers = torch.nn.ModuleList([layer])
    names = {name for name, _ in named_model_parameters(model)}
    prefix = "language.decoder.layers.6."
    assert {prefix + plain for plain in TE_NAMES.values()} <= names
    assert prefix + "mlp.linear_fc1.weight" in names
    assert names <= {spec.name for spec in weight_specs(PUBLISHED_CONFIGS["72B"])} | {prefix + "mlp.linear_fc1.bias"}


def test_in_memory_names_of_transformers_5_load_too(one_rank, hf_dirs, tmp_path):
    tensors = load_file(hf_dirs["untied"] / "model.safetensors")
    nested = {}
    for name, tensor in tensors.items():
        new = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        nested[new] = tensor
    rewrite(hf_dirs["untied"], tmp_path / "nested", nested)
    model = loaded_model(tmp_path / "nested", one_rank)
    assert differing_tensors(dict(export_hf_tensors(model, ranks=one_rank)), tensors) == []


# Errors


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def misshapen(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def extra(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "damage, message",
    [
        (misshapen, r"model\.norm\.weight: expected shape \(64,\), got \(63,\)"),
        (missing, r"1 tensor missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (extra, r"1 tensor that config\.json does not call for: model\.layers\.9\.mlp\.up_proj\.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(one_rank, hf_dirs, tmp_path, damage, message):
    tensors = load_file(hf_dirs["untied"] / "model.safetensors")
    damage(tensors)
    rewrite(hf_dirs["untied"], tmp_path, tensors)
    with pytest.raises(UserError, match=message):
        loaded_model(tmp_path, one_rank)


def test_head_of_a_tied_model_is_accepted_only_if_it_equals_the_embedding(one_rank, hf_dirs, tmp_path):
    tensors = load_file(hf_dirs["tied"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    loaded_model(rewrite(hf_dirs["tied"], tmp_path, tensors), one_rank)
    tensors["lm_head.weight"][-1, -1] += 1
    rewrite(hf_dirs["tied"], tmp_path, tensors)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        loaded_model(tmp_path, one_rank)


def test_damaged_file_is_reported_by_name(one_rank, hf_dirs, tmp_path):
    rewrite(hf_dirs["tied"], tmp_path, load_file(hf_dirs["tied"] / "model.safetensors"))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        loaded_model(tmp_path, one_rank)


# Saving


def save_shards(context, *, hf_dir: str, out_dir: str) -> str | None:
    groups = context.init(ParallelSizes(tensor=2))
    model = loaded_model(hf_dir, groups)
    try:
        save_hf(model, out_dir, ranks=groups, hf_source_dir=hf_dir, max_shard_bytes=200_000)
    except UserError as error:
        return str(error)
    return None


def test_saved_directory_is_sharded_complete_and_loads_in_transformers(ranks, hf_dirs, tmp_path):
    source, out = hf_dirs["tied"], tmp_path / "export"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert ranks(save_shards, hf_dir=str(source), out_dir=str(out)) == [None] * 4
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 2
    assert all(path.stat().st_size < 210_000 for path in files), "a shard is its tensors and a small header"
    expected = load_file(source / "model.safetensors")
    saved = {name: safe_open(out / file, "pt").get_tensor(name) for name, file in index["weight_map"].items()}
    assert differing_tensors(saved, expected) == []
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).is_file(), name
    loaded, report = HFModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight, expected["model.embed_tokens.weight"])
    # Once more: every rank reports that the target exists, nobody hangs, nothing is left behind.
    errors = ranks(save_shards, hf_dir=str(source), out_dir=str(out))
    assert all("already exists" in error for error in errors)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
