"""The verification tool: it agrees with Hugging Face on good weights, notices bad ones, and says what it cannot use."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.distributed.groups import destroy_parallel
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.hf_parity import HFAnswer, max_abs_difference, max_relative_difference
from models.qwen2_5_vl.dist_checkpoint import convert_to_megatron
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ranks import RankContext, RankPool
from tests.support.tiny import IMAGE_TOKEN_ID, PAD_ID, VIDEO_TOKEN_ID, VOCAB_SIZE, save_tiny_hf
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

TOOL = REPOSITORY / "tools" / "verify_checkpoint.py"
KEYS = {
    "max_abs_logprob_diff",
    "max_rel_grad_diff",
    "num_response_tokens",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
}
LOGPROB_TOLERANCE = 1e-5
"""fp32 on both sides, sums of at most 128 terms in different orders. Seen: 2e-6."""
GRADIENT_TOLERANCE = 1e-4
"""Relative, per tensor. Seen: 1e-5."""


def load_tool():
    spec = importlib.util.spec_from_file_location("verify_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``bare`` (config and weights only), ``chat`` (bf16, tied, with a tokenizer), media, and ``megatron``."""
    root = tmp_path_factory.mktemp("verify")
    save_tiny_hf(root / "bare", vision_ffn_size=42)
    save_tiny_hf(root / "chat", tie_word_embeddings=True, dtype=torch.bfloat16, seed=1)
    save_tiny_tokenizer(root / "chat")
    write_video(root / "clip.mp4", numbered_frames(20))
    Image.fromarray(numbered_frames(1, height=90, width=60)[0]).save(root / "picture.png")
    convert_to_megatron(root / "chat", root / "megatron")
    return root


@pytest.fixture
def verify(capsys):
    """Runs the tool in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = load_tool().main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    yield run
    destroy_parallel()


def assert_agreement(report: dict, *, tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> None:
    assert report.keys() == KEYS
    assert 0 < report["max_abs_logprob_diff"] < LOGPROB_TOLERANCE, "exactly 0 would mean that nothing was compared"
    assert 0 < report["max_rel_grad_diff"] < GRADIENT_TOLERANCE
    assert report["num_response_tokens"] == 32
    assert report["tensor_model_parallel_size"] == tensor
    assert report["pipeline_model_parallel_size"] == pipeline
    assert report["sequence_parallel"] is sequence_parallel


def test_directory_of_config_and_weights_alone_is_checked_on_a_drawn_video(verify, folder, tmp_path):
    code, out, err = verify("--hf", folder / "bare", "--json", "--dump", tmp_path / "d.npz")
    assert code == 0
    assert_agreement(json.loads(out))
    assert err == "note: random text around the media: no tokenizer in the directory\n"
    dump = np.load(tmp_path / "d.npz")
    time, height, width = dump["position_ids"][:, dump["token_ids"] == VIDEO_TOKEN_ID]
    assert np.ptp(time) > max(np.ptp(height), np.ptp(width)), "the two position rules must differ on the drawn video"


def test_media_are_mixed_in_the_order_of_the_command_line(verify, folder, tmp_path):
    """Tokenizer without chat template; everything Hugging Face needs to recompute the log-probs is in the dump."""
    clip, picture = folder / "clip.mp4", folder / "picture.png"
    media = ("--video", clip, "--image", picture, picture, "--video", clip)
    code, out, err = verify("--hf", folder / "chat", *media, "--json", "--dump", tmp_path / "dump")
    assert (code, err) == (0, "")
    assert_agreement(json.loads(out))
    dump = np.load(tmp_path / "dump")
    tokens, positions, num_response = dump["token_ids"], dump["position_ids"], len(dump["logprobs"])
    runs = [id for i, id in enumerate(tokens) if id in (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID) and id != tokens[i - 1]]
    assert runs == [VIDEO_TOKEN_ID, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID]
    assert positions.shape == (3, len(tokens))
    assert dump["image_grid_thw"].shape == dump["video_grid_thw"].shape == (2, 3)

    model = HFModel.from_pretrained(folder / "chat", dtype=torch.float32)
    inputs = {name: torch.from_numpy(dump[name]) for name in dump.files if "pixel" in name or "grid" in name}
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(tokens)[None], position_ids=torch.from_numpy(positions)[:, None], **inputs
        ).logits[0]
    rows = torch.arange(len(tokens) - num_response, len(tokens))
    recomputed = logits.log_softmax(dim=-1)[rows - 1, torch.from_numpy(tokens)[rows]]
    assert np.abs(recomputed.numpy() - dump["logprobs"]).max() < LOGPROB_TOLERANCE
    assert np.abs(recomputed.numpy() - dump["hf_logprobs"]).max() < LOGPROB_TOLERANCE


def test_response_is_the_same_for_every_run_without_visual_and_padding_tokens(verify, folder, tmp_path):
    verify("--hf", folder / "bare", "--dump", tmp_path / "a")
    verify("--hf", folder / "bare", "--image", folder / "picture.png", "--dump", tmp_path / "b")
    responses = [np.load(tmp_path / name)["token_ids"][-32:] for name in "ab"]
    assert (responses[0] == responses[1]).all()
    assert not np.isin(responses[0], (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, PAD_ID)).any()
    assert responses[0].max() < VOCAB_SIZE


def test_padding_token_in_the_prompt_keeps_its_gradient(verify, folder, tmp_path):
    """Hugging Face's embedding has no gradient for it, unless told otherwise."""
    chat = tmp_path / "chat"
    shutil.copytree(folder / "chat", chat)
    (chat / "chat_template.jinja").write_text(
        "<|endoftext|>{{ messages[0]['content'] }}<|endoftext|>{% if add_generation_prompt %}a{% endif %}"
    )
    code, out, err = verify("--hf", chat, "--json", "--dump", tmp_path / "dump")
    assert (code, err) == (0, "")
    assert_agreement(json.loads(out))
    assert (np.load(tmp_path / "dump")["token_ids"] == PAD_ID).sum() == 2


def test_table_for_people_names_both_numbers_and_their_limits(verify, folder):
    code, out, _ = verify("--hf", folder / "bare")
    assert code == 0
    assert "limit 0.0001" in out and "limit 0.001" in out and out.endswith("passed\n")


def test_megatron_checkpoint_in_bf16_is_verified(verify, folder):
    code, out, _ = verify("--hf", folder / "chat", "--megatron", folder / "megatron", "--json")
    assert code == 0
    assert_agreement(json.loads(out))


def test_one_wrong_vision_bias_in_a_megatron_checkpoint_is_noticed(verify, folder, tmp_path):
    bad = tmp_path / "bad"
    save_tiny_hf(bad, tie_word_embeddings=True, dtype=torch.bfloat16, seed=1)
    tensors = load_file(bad / "model.safetensors")
    bias = next(name for name in tensors if name.endswith("blocks.1.mlp.gate_proj.bias"))
    tensors[bias][3] += 1.0
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    convert_to_megatron(bad, tmp_path / "megatron")
    code, out, err = verify("--hf", folder / "chat", "--megatron", tmp_path / "megatron", "--json")
    report = json.loads(out)
    assert code == 1
    # One of 44 hidden units of one vision layer: a hundred times the limits, far from a total loss.
    assert report["max_rel_grad_diff"] > 1e-1 or report["max_abs_logprob_diff"] > 1e-2
    assert err == "FAILED: the differences exceed the limits\n"
    code, _, _ = verify(
        *("--hf", folder / "chat", "--megatron", tmp_path / "megatron"),
        *("--logprob-tolerance", 100, "--gradient-tolerance", 100),
    )
    assert code == 0


def test_not_a_number_is_a_failure_in_valid_json(verify, folder, tmp_path):
    bad = tmp_path / "bad"
    save_tiny_hf(bad, tie_word_embeddings=True, seed=1)
    tensors = load_file(bad / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("layers.3.mlp.up_proj.weight"))[0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    convert_to_megatron(bad, tmp_path / "megatron")
    code, out, _ = verify("--hf", folder / "chat", "--megatron", tmp_path / "megatron", "--json")
    assert code == 1
    assert json.loads(out)["max_abs_logprob_diff"] is None
    with pytest.raises(UserError, match="log-probs are not finite"):
        verify("--hf", bad)


def test_differences_are_measured_as_documented():
    theirs = HFAnswer(torch.tensor([1.0, 2.0]), {"big": torch.tensor([3.0, 4.0]), "tiny": torch.tensor([1e-6, 0.0])})
    worst = max_relative_difference(
        [("big", torch.tensor([3.0, 4.5])), ("tiny", torch.tensor([1e-6, 1e-3]))], theirs.gradients
    )
    # big: 0.5 / 5; tiny: 1e-3 / (1e-3 * 5), not 1e-3 / 1e-6
    assert (worst.name, worst.value) == ("tiny", pytest.approx(0.2))
    with pytest.raises(ValueError, match="tiny"):
        max_relative_difference([("big", torch.zeros(2))], theirs.gradients)
    assert max_abs_difference(torch.tensor([1.0, 2.5]), theirs.logprob_R) == 0.5
    assert max_abs_difference(torch.tensor([1.0, torch.nan]), theirs.logprob_R) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hf", "{root}/nowhere"), r"--hf .*nowhere: no such directory"),
        (("--hf", "{root}"), r"config\.json"),
        (("--hf", "{root}/bare", "--megatron", "{root}/nowhere"), r"--megatron .*nowhere: no such directory"),
        (("--hf", "{root}/bare", "--megatron", "{root}/bare"), r"bare"),
        (("--hf", "{root}/bare", "--megatron", "{root}/megatron"), r"megatron: .*(missing|expected shape)"),
        (("--hf", "{root}/bare", "--video", "{root}/picture.txt"), r"--video .*picture\.txt"),
        (("--hf", "{root}/bare", "--image", "{root}/clip.mp4"), r"--image .*clip\.mp4"),
        (("--hf", "{root}/bare", "--dump", "{root}/nowhere/x.npz"), r"--dump .*existing directory"),
        (("--hf", "{root}/bare", "--tensor-model-parallel-size", "2"), r"world size 1 .* must be a multiple"),
        (("--hf", "{root}/bare", "--tensor-model-parallel-size", "0"), r"from 1 to \d+, got '0'"),
        (("--hf", "{root}/bare", "--sequence-parallel"), r"--sequence-parallel needs"),
        (("--hf", "{root}/bare", "--vidoe", "x"), r"unrecognized arguments: --vidoe"),
    ],
)
def test_input_that_cannot_be_used_is_named(verify, folder, arguments, message):
    with pytest.raises(UserError, match=message):
        verify(*(argument.format(root=folder) for argument in arguments))


def verify_on_rank(context: RankContext, *, arguments: list[str]) -> bool:
    tool = load_tool()
    return tool.verify(tool.parse_arguments(arguments))


@pytest.mark.parametrize(
    "layout",
    [
        ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
        (),  # two replicas with the same input
    ],
)
def test_interleaved_pipeline_and_replicas_agree_too(ranks: RankPool, folder, layout):
    limits = ("--logprob-tolerance", str(LOGPROB_TOLERANCE), "--gradient-tolerance", str(GRADIENT_TOLERANCE))
    arguments = ["--hf", str(folder / "chat"), *layout, *limits]
    assert ranks(verify_on_rank, world_size=2, arguments=arguments) == [True, True]


def run_process(*command: object, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, str(TOOL), *map(str, command)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_command_alone_reports_bad_input_in_one_line(folder):
    done = run_process("--hf", folder / "bare", "--video", folder / "picture.txt", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --video") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_torchrun_on_four_ranks_prints_one_json_object(folder):
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")
    weights = ("--hf", folder / "chat", "--megatron", folder / "megatron")
    done = run_process(*weights, *layout, "--video", folder / "clip.mp4", "--json", ranks=4)
    assert done.returncode == 0, done.stderr
    assert_agreement(json.loads(done.stdout), tensor=2, pipeline=2, sequence_parallel=True)


@pytest.mark.slow
def test_torchrun_reports_bad_input_once(folder):
    done = run_process("--hf", folder / "bare", "--tensor-model-parallel-size", 3, "--json", ranks=2)
    assert done.returncode != 0
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: world size 2 (torchrun --nnodes x --nproc-per-node) must be a multiple of "
        "--tensor-model-parallel-size 3 x --pipeline-model-parallel-size 1 x --context-parallel-size 1 = 3"
    ]
