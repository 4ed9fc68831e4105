"""What other people's programs read of an export: lmms-eval, VLMEvalKit and ``vllm serve`` take it as any Qwen2.5-VL.

The source has the form in which Qwen2.5-VL is published: a flat config.json with ``torch_dtype``, and the chat template
in chat_template.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import CHAT_TEMPLATE, save_tiny_model
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.conversion import load_hf_weights, save_hf
from models.qwen2_5_vl.model import build_model
from models.qwen2_5_vl.published import to_hf_config

TEMPLATE_FILES = ("chat_template.json", "tokenizer_config.json")
OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>{{", "<|im_start|>the {{")
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]


def published_source(folder: Path) -> Path:
    """The tiny model as Qwen2.5-VL is published."""
    save_tiny_model(folder, corpus=corpus())
    config = to_hf_config(Qwen2_5_VLConfig.from_hf(folder))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    (folder / "video_preprocessor_config.json").unlink()
    return folder


@pytest.fixture
def export(one_rank, tmp_path: Path) -> Path:
    source = published_source(tmp_path / "source")
    model = build_model(Qwen2_5_VLConfig.from_hf(source), ranks=one_rank)
    load_hf_weights(model, source, ranks=one_rank)
    save_hf(model, tmp_path / "qwen2_5_vl_ktr", ranks=one_rank, hf_source_dir=source)
    save_hf(model, tmp_path / "other", ranks=one_rank, hf_source_dir=source, chat_template=OTHER_TEMPLATE)
    return tmp_path / "qwen2_5_vl_ktr"


def template_in(path: Path) -> str:
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


def test_an_export_has_every_file_and_every_form_of_the_chat_template_that_its_source_has(export: Path) -> None:
    source = export.parent / "source"
    missing = {path.name for path in source.iterdir()} - {path.name for path in export.iterdir()}
    assert not missing
    for name in TEMPLATE_FILES:
        assert template_in(export / name) == template_in(source / name) == CHAT_TEMPLATE
        assert template_in(export.parent / "other" / name) == OTHER_TEMPLATE, "a template of one's own is in all places"
    assert not (export / "chat_template.jinja").exists(), "no form that the source does not have"
    assert (export.parent / "other" / "chat_template.jinja").read_text() == OTHER_TEMPLATE


def test_an_export_names_the_class_and_the_precision_that_loaders_choose_by(export: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    written = json.loads((export / "config.json").read_text())
    assert written["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert written["model_type"] == "qwen2_5_vl" and written["torch_dtype"] == "float32", "the weights' own"
    config = AutoConfig.from_pretrained(export)
    assert config.model_type == "qwen2_5_vl" and config.dtype == torch.float32
    assert GenerationConfig.from_pretrained(export).eos_token_id is not None


def test_the_tokenizer_of_an_export_renders_a_conversation(export: Path) -> None:
    from transformers import AutoTokenizer

    for folder, start in ((export, "<|im_start|>user "), (export.parent / "other", "<|im_start|>the user ")):
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True
        )
        assert text == start + "<|vision_start|><|image_pad|><|vision_end|>red<|im_end|><|im_start|>assistant"


@pytest.mark.vllm
def test_a_harness_can_ask_an_export_about_a_picture(export: Path) -> None:
    """The calls that lmms-eval and VLMEvalKit make. The processor of transformers needs torchvision."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    from megatron_ktr.files.hf_model import hf_model_class

    for folder in (export, export.parent / "other"):
        processor = AutoProcessor.from_pretrained(folder, min_pixels=56 * 56, max_pixels=112 * 112)
        text = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert ("the user" in text) == (folder != export)
        picture = np.zeros((112, 112, 3), dtype=np.uint8)
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        model = hf_model_class().from_pretrained(folder, dtype="auto")
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] > inputs["input_ids"].shape[1]
