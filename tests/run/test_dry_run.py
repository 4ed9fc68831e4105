"""``--dry-run``: its numbers are those of model and data, it refuses what training would, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.config import load_config, save_resolved
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.sections import ParallelSection
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.platform import start
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.run.dry_run.command import dry_run
from megatron_ktr.run.dry_run.model import parameters_by_stage
from megatron_ktr.train import main
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.videos import numbered_frames, write_video

PUBLISHED = ["--model", "nowhere/Qwen2.5-VL-7B-Instruct", "--data-path", "nowhere.json", "--engine", "hf", "--bf16"]
BIG_GPUS = ["--dry-run-gpus", "16", "--dry-run-gpu-memory-gb", "500"]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(folder, corpus=corpus())
    return folder


def page(*flags: Any) -> str:
    return dry_run(load_config([*map(str, flags), "--dry-run"]), find_held_out=find_held_out)


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("size", "layout", "options"),
    [
        ("3B", Layout(), ParallelSection()),
        ("3B", Layout(pipeline=2), ParallelSection()),
        ("7B", Layout(tensor=4, context=2, pipeline=2), ParallelSection()),
        ("7B", Layout(tensor=2, vision_parallel="frame"), ParallelSection(vision_parallel="frame")),
        ("32B", Layout(tensor=8, pipeline=4, virtual=4), ParallelSection()),
        ("72B", Layout(tensor=8, pipeline=4, virtual=5), ParallelSection()),
    ],
)
def test_the_built_shapes_are_those_that_the_memory_is_reckoned_from(
    size: str, layout: Layout, options: ParallelSection
) -> None:
    config = PUBLISHED_CONFIGS[size]
    sizes = ParallelSizes(layout.tensor, layout.pipeline, layout.context, layout.virtual)
    found = parameters_by_stage(config, sizes=sizes, options=ModelOptions(parallel=options), platform=start("cpu"))
    assert found == [count_parameters(config, layout, rank=rank).total for rank in range(layout.pipeline)]


def test_stages_of_different_length_are_built_as_the_options_split_them() -> None:
    config, options = PUBLISHED_CONFIGS["7B"], ParallelSection(account_for_vision_in_pipeline_split=8)
    sizes = ParallelSizes(tensor=2, pipeline=4)
    found = parameters_by_stage(config, sizes=sizes, options=ModelOptions(parallel=options), platform=start("cpu"))
    layer = count_parameters(config, Layout(tensor=2, pipeline=4), rank=1).total // 7
    even = [count_parameters(config, Layout(tensor=2, pipeline=4), rank=rank).total for rank in range(4)]
    assert [number - (count - 7) * layer for number, count in zip(found, (1, 9, 9, 9), strict=True)] == even


def questions(folder: Path, *, num_missing: int, num_there: int) -> Path:
    write_video(folder / "there.mp4", numbered_frames(8))
    videos = ["there.mp4"] * num_there + ["missing.mp4"] * num_missing
    records = [
        {
            "problem_id": number,
            "video": video,
            "problem": "which colour is it",
            "problem_type": "multiple choice",
            "options": ["A red", "B green"],
            "solution": "<answer>A</answer>",
        }
        for number, video in enumerate(videos)
    ]
    path = folder / "questions.json"
    path.write_text(json.dumps(records))
    return path


def small_run(model: Path, data: Path, run_dir: Path) -> list[str]:
    flags = ["--model", model, "--data-path", data, "--prompt-template", model / "prompt_template.txt"]
    flags += ["--engine", "hf", "--video-max-pixels", 3136, "--run-dir", run_dir]
    return [*map(str, flags), "--prompts-per-step", "2", "--train-epochs", "1"]


def test_records_are_counted_as_training_counts_them_and_nothing_is_written(tiny_dir, tmp_path, capfd) -> None:
    data = questions(tmp_path, num_missing=1, num_there=5)
    before = sorted(tmp_path.rglob("*"))
    flags = small_run(tiny_dir, data, tmp_path / "run")
    assert main([*flags, "--max-skip-share", "0.5", "--dry-run"]) == 0
    said = joined(capfd.readouterr().out)
    assert "questions: 6 records, 1 left out" in said
    assert "1 epochs x 5 records / 2 prompts a step = 3 steps" in said and "3 steps, 6 prompts" in said
    assert "not estimated: in fp32" in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="1 of 6 records cannot be used"):
        page(*flags)


def test_a_run_that_cannot_be_resumed_is_refused(tiny_dir, tmp_path) -> None:
    flags = small_run(tiny_dir, questions(tmp_path, num_missing=0, num_there=4), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    (checkpoint / "hf").mkdir(parents=True)
    save_resolved(load_config(flags), checkpoint / "config.yaml")
    (checkpoint / "hf" / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match="is not empty"):
        page(*flags)
    # How many GPUs there are, and that this is a dry run, may change.
    assert f"resume from {checkpoint}, after step 2" in joined(page(*flags, "--resume", "--dry-run-gpus", "1"))
    with pytest.raises(UserError, match="--lr was 2e-06"):
        page(*flags, "--auto-resume", "--lr", "1")


def test_what_is_not_there_is_named_and_is_no_error(tiny_dir, tmp_path) -> None:
    (tiny_dir / "model.safetensors").rename(tiny_dir / "aside")
    try:
        said = joined(page(*small_run(tiny_dir, tmp_path / "later.json", tmp_path / "run")))
    finally:
        (tiny_dir / "aside").rename(tiny_dir / "model.safetensors")
    assert (
        f"unchecked the weights of {tiny_dir}" in said and f"unchecked the records of {tmp_path / 'later.json'}" in said
    )
    assert "the number of steps is known once all files are there" in said
    data = questions(tmp_path, num_missing=0, num_there=4)
    with_data = [str(data) if flag == "nowhere.json" else flag for flag in PUBLISHED]
    said = joined(page(*with_data, *BIG_GPUS, "--train-epochs", "2"))
    assert "published for Qwen2.5-VL-7B" in said and f"{data}: 4 records" in said
    assert "2 epochs x 4 records / 32 prompts a step = 1 steps" in said
    assert "16 GPUs = tensor 1 x pipeline 1 x context 1 x data 16" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run-gpus", "12", "--tensor-model-parallel-size", "8"], "--dry-run-gpus 12: .*multiple of"),
        (["--dry-run-gpus", "3"], "--prompts-per-step 32 must be a multiple"),
        (["--tensor-model-parallel-size", "3"], "attention heads"),
        (["--dry-run-gpus", "8", "--dry-run-gpu-memory-gb", "40"], "on paper training needs .* with 8 GPUs"),
        ([], "on paper training needs .*--dry-run-gpus says how many"),
        (["--model", "nowhere/my-model"], "--model nowhere/my-model is not there"),
        (["--model", "nowhere/Qwen2.5-VL-8B"], "3B, 7B, 32B, 72B"),
        (["--reward-functions", "acuracy", "--length-bonus", "0"], "acuracy"),
        (["--num-generations", "100000"], "no GPU holds 100000 responses"),
        (["--resume"], "no complete checkpoint"),
        (["--train-steps", "3", "--lr-warmup-steps", "4"], "exceeds the 3"),
    ],
)
def test_what_training_would_refuse_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        page("--run-dir", tmp_path, *PUBLISHED, *flags)


def test_it_is_for_one_process_and_for_a_new_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(UserError, match="is not empty"):
        page(*PUBLISHED, "--run-dir", tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process"):
        page(*PUBLISHED)


def test_options_of_gpus_are_said_to_be_unchecked_where_there_is_none() -> None:
    fp8 = "--fp8-format hybrid --fp8-param-gather --transformer-impl te --attention-impl te".split()
    said = joined(page(*PUBLISHED, *BIG_GPUS, *fp8))
    assert "unchecked what needs a GPU" in said
    with pytest.raises(UserError, match="--platform cpu"):
        page(*PUBLISHED, *fp8, "--platform", "cpu")


def test_more_is_saved_on_the_device_where_options_move_it_to_the_host() -> None:
    def training(*flags: str) -> float:
        text = joined(page(*PUBLISHED, *BIG_GPUS, *flags))
        return float(text.split("memory training ")[1].split()[0])

    plain = training()
    # 8.29 billion parameters: 2 bytes each of a reference model, 8 of moments over 16 replicas.
    assert plain - training("--offload-reference") == pytest.approx(16.6, abs=0.2)
    assert plain - training("--offload-optimizer-states") == pytest.approx(8 * 8.29 / 16, abs=0.2)
    # Two groups in a micro-batch keep twice the activations.
    assert training("--micro-batch-groups", "2") > plain + 20


def test_held_out_questions_are_checked_as_training_checks_them(tiny_dir, tmp_path) -> None:
    data = questions(tmp_path, num_missing=0, num_there=4)
    flags = small_run(tiny_dir, data, tmp_path / "run")
    asked = [*flags, "--eval-interval", "2", "--eval-data"]
    held_out = tmp_path / "held_out.json"
    held_out.write_bytes(data.read_bytes())
    said = joined(page(*asked, held_out, "--keep-best", "eval/held_out/accuracy"))
    assert "evaluation every 2 steps, by hf" in said and "evaluation on held_out: 4 questions" in said
    assert "unchecked the held-out" not in said
    with pytest.raises(UserError, match="--keep-best eval/held_out/acuracy: expected one of"):
        page(*asked, held_out, "--keep-best", "eval/held_out/acuracy")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="evaluation on questions: the media of 4 of 5 questions"):
        page(*asked, questions(tmp_path / "other", num_missing=4, num_there=1))
    # What is not there is named, and what is there is checked all the same.
    benchmark = ["--eval-benchmark", "mmvu,videomme=nowhere", "--eval-benchmark-root", tmp_path]
    said = joined(page(*asked, f"{held_out},away.json", *benchmark, "--keep-best", "eval/away/format"))
    assert "held-out questions of away.json, mmvu, videomme=nowhere, which are not there" in said
    assert "whether evaluation gives --keep-best eval/away/format" in said and "evaluation on held_out" in said
    with pytest.raises(UserError, match="--eval-benchmark mmvu: say where"):
        page(*asked, held_out, "--eval-benchmark", "mmvu")
    assert not (tmp_path / "run").exists()


def test_an_engine_that_only_evaluates_takes_memory(tmp_path) -> None:
    flags = [*PUBLISHED, "--objective", "sft", "--loss-aggregation", "token", "--kl-beta", "0", *BIG_GPUS]
    assert "rollout" not in joined(page(*flags)).split("time ")[0].split("memory ")[1]
    said = joined(page(*flags, "--eval-interval", "5", "--eval-data", "nowhere_either.json"))
    assert "with hf awake" in said and "held-out questions, without the model" in said
