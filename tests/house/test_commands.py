"""The README's commands as a user runs them, in small: quickstart, recorded rollouts under torchrun, own videos."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.videos import CODECS, numbered_frames, shared_videos, write_codec, write_video


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def run_quietly(*command: str) -> str:
    """Standard output. Of a run that goes well nothing is on the error stream: not from megatron-core of either stack,
    torch or transformers."""
    done = run(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", "the console is for the run"
    return done.stdout


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def quickstart(out: Path, *flags: str) -> subprocess.CompletedProcess:
    small = ["--steps", "3", "--num-train", "24", "--num-eval", "8", "--nproc-per-node", "1"]
    return run("tools/quickstart.py", "--out", str(out), *small, *flags)


@pytest.mark.slow
def test_three_step_quickstart_writes_summary_and_report(tmp_path) -> None:
    out = tmp_path / "quickstart"
    done = quickstart(out)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    wanted = {
        "accuracy_initial",
        "accuracy_sft",
        "accuracy_sft_greedy",
        "accuracy_ktr",
        "accuracy_ktr_greedy",
        "accuracy_sft_continued",
        "order_accuracy_ktr",
        "order_accuracy_ktr_shuffled",
        "accuracy_ktr_blank",
        "key_token_ratio",
        "seconds_per_step",
        "steps",
        "num_eval",
        "standard_error",
    }
    assert wanted <= set(summary) and summary["steps"] == 3 and summary["num_eval"] == 8
    assert summary["rollout"] == "hf"
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "4_video_ktr" / "export" / "model.safetensors").is_file()
    assert [step["step"] for step in metrics(out / "4_video_ktr")] == [1, 2, 3]
    assert "accuracy on 8 held-out questions" in done.stdout
    again = run("tools/quickstart.py", "--out", str(out))
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: --out")


RL_ON_VLLM = """
import argparse, json, sys
from pathlib import Path
sys.path.insert(0, "tools")
import quickstart as tool
from megatron_ktr.distributed import platform

out = Path(sys.argv[1])
options = argparse.Namespace(out=out, seed=0, num_train=24, num_eval=8, steps=3, nproc_per_node=1, rollout="vllm")
platform.start("cpu")
quickstart = tool.Quickstart(options, [])
quickstart.make_inputs()
before = quickstart.evaluate(quickstart.model, sampling=tool.GREEDY)
model = quickstart.train(tool.Stage("4_video_ktr", "video_ktr", "train"), quickstart.model)
after = quickstart.evaluate(model, control="shuffled")
quickstart.close()
print(json.dumps([before.num_questions, after.num_questions]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_quickstart_trains_and_evaluates_on_vllm(tmp_path) -> None:
    """Its stage of reinforcement learning and two evaluations; the stages before do not depend on the engine."""
    pytest.importorskip("vllm", reason="the vLLM environment only")
    done = run("-c", RL_ON_VLLM, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [8, 8]
    stage = tmp_path / "4_video_ktr"
    assert "engine: vllm_colocated" in (stage / "config.yaml").read_text()
    steps = metrics(stage)
    assert [step["step"] for step in steps] == [1, 2, 3]
    # fp32 sums in another order; other weights than the trainer's differ by tenths.
    assert steps[0]["sampler_check/gap_mean"] < 1e-4
    assert (stage / "export" / "model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="the core environment only")
def test_quickstart_on_vllm_says_at_once_that_it_is_missing(tmp_path) -> None:
    done = run("tools/quickstart.py", "--out", str(tmp_path / "none"), "--rollout", "vllm")
    assert done.returncode == 2 and "make quickstart ROLLOUT=vllm" in done.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_recorded_rollouts_train_under_torchrun_as_in_one_process(tmp_path) -> None:
    example = tmp_path / "example"
    made = run("tools/make_replay_example.py", "--out", str(example), "--num-prompts", "6", "--num-generations", "4")
    assert made.returncode == 0, made.stderr[-2000:]
    flags = ["megatron_ktr.train", "--config", "examples/replay.yaml", "--model", str(example / "model")]
    flags += ["--replay-path", str(example / "rollouts.jsonl"), "--num-generations", "4", "--train-steps", "2"]
    flags += ["--prompt-template", str(example / "model" / "prompt_template.txt"), "--prompts-per-step", "2"]
    flags += ["--save-interval", "2"]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    alone = ["-m", *flags, "--run-dir", str(tmp_path / "alone")]
    parallel = [*ranks, *flags, *layout, "--run-dir", str(tmp_path / "parallel")]
    run_quietly(*alone)
    console = run_quietly(*parallel)
    for one, four in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "parallel"), strict=True):
        # 1e-3: fp32 sums in another order; in the second step also after an Adam step, which can turn the rounding
        # of a near-zero gradient into a whole step of lr on that weight.
        assert four["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert four["key_token_ratio"] == pytest.approx(one["key_token_ratio"], abs=0.05)
    assert "[token|signals' letters]" in console and (tmp_path / "parallel" / "export" / "config.json").is_file()
    # Loading, too, is as quiet as training and saving.
    for command in (alone, parallel):
        run_quietly(*command, "--resume", "--train-steps", "3")
    assert metrics(tmp_path / "alone")[-1]["step"] == metrics(tmp_path / "parallel")[-1]["step"] == 3


def video_files(folder: Path) -> list[Path]:
    """Generated files in several codecs, one of them cut in half, and the real ones where this machine has them."""
    folder.mkdir()
    made = [write_codec(folder, name, numbered_frames(12)) for name in list(CODECS)[:4]]
    cut = folder / "corrupt_cut.mp4"
    whole = write_video(folder / "whole.mp4", numbered_frames(30)).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    real = [Path(shutil.copy(path, folder)) for path in shared_videos()]
    return [*made, cut, folder / "whole.mp4", *real]


def own_reward(response: str, record: dict) -> float:
    """Unequal for an untrained model, whose responses earn nothing otherwise."""
    return len(response) % 7 / 7


@pytest.mark.slow
def test_own_video_files_train_and_damaged_ones_are_skipped_with_a_reason(tmp_path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model, corpus=corpus())
    videos = video_files(tmp_path / "videos")
    records = [
        {
            "problem_id": path.name,
            "video": path.name,
            "problem": "which colour is it",
            "problem_type": "multiple choice",
            "options": ["A red", "B green"],
            "solution": "<answer>A</answer>",
        }
        for path in videos
    ]
    damaged = [path.name for path in videos if "corrupt" in path.name]
    assert len(records) >= 4 and damaged
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(records))
    per_step = -(-len(records) // 3)
    done = run(
        *["-m", "megatron_ktr.train", "--config", "examples/real_video.yaml", "--model", str(model)],
        *["--data-path", str(questions), "--media-root", str(videos[0].parent), "--no-shuffle-data"],
        *["--prompt-template", str(model / "prompt_template.txt"), "--run-dir", str(tmp_path / "run")],
        *["--reward-functions", f"accuracy,format,{__name__}:own_reward", "--video-max-frames", "8"],
        *["--train-steps", "none", "--train-epochs", "1", "--prompts-per-step", str(per_step)],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # An epoch of three steps: prompts that are skipped on drawing make it no shorter.
    said = done.stdout.splitlines()[0]
    assert said.startswith(f"1 epochs x {len(records)} records / {per_step} prompts a step = 3 steps")
    steps = metrics(tmp_path / "run")
    assert [step["has_stepped"] for step in steps] == [1.0, 1.0, 1.0]
    assert steps[-1]["num_skipped"] >= len(damaged)
    for name in damaged:
        assert any("skipped" in line and name in line for line in done.stderr.splitlines())


def test_bad_input_is_one_error_line_and_nothing_is_written(tmp_path) -> None:
    done = run("-m", "megatron_ktr.train", "--config", "examples/replay.yaml", "--train-stpes", "3")
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "train-steps" in done.stderr
    done = run("-m", "megatron_ktr.train", "--model", str(tmp_path / "none"), "--replay-path", "x.jsonl")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error:")
    assert not any(tmp_path.iterdir())
