"""Run files of ``examples/``: each is a valid configuration, and the paper's says what the release's run was."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from PIL import Image

from megatron_ktr.config import OPTIONS, config_from_values, load_config
from megatron_ktr.config.checks import ABSENT_OPTIONS, check
from megatron_ktr.config.cli import read_yaml, show_value
from megatron_ktr.config.objective_registry import BUILT_IN, objective_entry
from megatron_ktr.config.words import Selection
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.run.dry_run.command import dry_run
from tests.support.paths import REPOSITORY
from tests.support.videos import numbered_frames, write_video

PAPER = REPOSITORY / "examples" / "paper" / "video_ktr_7b.yaml"

RELEASE = {
    "model": "Qwen2.5-VL-7B-COT-SFT",
    "params_dtype": "bf16",
    "data_path": "Video-R1-data/Video-R1-Holmes-16k.json",
    "max_prompt_length": 16384,
    "video_fps": 2.0,
    "video_max_frames": 16,
    "video_min_pixels": 128 * 28 * 28,
    "video_max_pixels": int(128 * 28 * 28 * 1.05),
    "image_min_pixels": 4 * 28 * 28,
    "image_max_pixels": 256 * 28 * 28,
    "num_generations": 8,
    "max_response_length": 768,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 50,
    "answer_protocol": "official",
    "length_bonus": 0.2,
    "length_bonus_min": 320,
    "length_bonus_max": 512,
    "selection_ratio": (0.2,),
    "kl_beta": 0.04,
    "lr": 2e-6,
    "lr_decay_style": "cosine",
    "weight_decay": 0.01,
    "weight_decay_norms": True,
    "clip_grad": 5.0,
    "train_epochs": 1.0,
    "prompts_per_step": 8,
}
"""From the authors' repository: its launch script, what its trainer writes itself, and its copy of qwen-vl-utils."""


def run_files() -> list[Path]:
    """Everything but what is for another program."""
    found = sorted((REPOSITORY / "examples").rglob("*.yaml"))
    return [path for path in found if "apiVersion" not in yaml.safe_load(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", run_files(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_run_file_is_a_valid_configuration(path: Path) -> None:
    values = read_yaml(path, options=OPTIONS, notes=ABSENT_OPTIONS)
    # The quickstart's files are given model and data by its command.
    given: dict[str, Any] = {"model": "m"}
    if "replay_path" not in values:
        given["data_path"] = "d.json"
    check(config_from_values({**given, **values}))


@pytest.fixture(scope="module")
def made_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands before some of the files make: the tiny model, and the clips of the questions."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(folder / "model", corpus=corpus())
    for record in json.loads((REPOSITORY / "examples/real_video/questions.json").read_text(encoding="utf-8")):
        if "video" in record:
            write_video(folder / record["video"], numbered_frames(8))
        else:
            Image.fromarray(numbered_frames(1)[0]).save(folder / record["image"])
    return folder


@pytest.mark.parametrize("path", run_files(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_run_file_passes_a_dry_run_at_its_real_size(path: Path, made_inputs: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    values = read_yaml(path, options=OPTIONS, notes=ABSENT_OPTIONS)
    flags = ["--config", str(path), "--dry-run"]
    if "Qwen2.5-VL" in values.get("model", ""):
        if in_name := re.search(r"_(\d+)gpus$", path.stem):
            assert values["dry_run_gpus"] == int(in_name[1])
    else:
        flags += ["--model", str(made_inputs / "model")]
        flags += ["--prompt-template", str(made_inputs / "model" / "prompt_template.txt")]
        if values.get("data_path") == "examples/real_video/questions.json":
            flags += ["--media-root", str(made_inputs)]
        elif "replay_path" not in values:
            flags += ["--data-path", "runs/quickstart/questions.json"]
    said = dry_run(load_config(flags), find_held_out=find_held_out)
    assert "this run is sound" in said
    assert f"{values.get('dry_run_gpus', 1)} GPU" in said


def test_the_comparison_runs_every_objective_that_samples_and_its_lines_are_valid() -> None:
    folder = REPOSITORY / "examples" / "algorithms"
    text = (folder / "README.md").read_text(encoding="utf-8")
    names, *_ = re.findall(r"^for objective in (.*); do$", text, re.MULTILINE)
    assert names.split() == [name for name in BUILT_IN if not objective_entry(name).is_supervised]
    named = read_yaml(folder / "compare.yaml", options=OPTIONS, notes=ABSENT_OPTIONS)
    for name in BUILT_IN:
        assert not (objective_entry(name).defaults.keys() & named.keys()), "what the file gives would win"
    lines = re.findall(r"^\| `(--[^`]*)` \|", text, re.MULTILINE)
    lines += [f"--objective {name}" for name in BUILT_IN] + [f"--selection {word}" for word in get_args(Selection)]
    for line in lines:
        check(
            load_config(["--config", str(folder / "compare.yaml"), "--model", "m", "--data-path", "d", *line.split()])
        )
    assert len(lines) > len(BUILT_IN) + 6


def test_the_kubernetes_job_passes_a_dry_run(monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    job = yaml.safe_load((REPOSITORY / "examples/launch/kubernetes.yaml").read_text(encoding="utf-8"))
    pods = job["spec"]["pytorchReplicaSpecs"]
    container = pods["Master"]["template"]["spec"]["containers"][0]
    words = shlex.split(container["args"][0])
    flags = words[words.index("examples/launch/torchrun.sh") + 1 :]
    said = dry_run(load_config([*flags, "--dry-run"]), find_held_out=find_held_out)
    num_gpus = sum(pods[kind]["replicas"] for kind in pods) * container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"{num_gpus} GPUs = " in said


def test_the_papers_file_is_the_run_of_the_release() -> None:
    trainer = load_config(["--config", str(PAPER)]).trainer
    assert trainer.train_steps is None, "as long as its epoch"
    values = read_yaml(PAPER, options=OPTIONS, notes=ABSENT_OPTIONS)
    assert {name: values[name] for name in RELEASE} == RELEASE


def resolved(path: Path) -> dict[str, Any]:
    """Every option of a run file by name, defaults filled in."""
    config = config_from_values(read_yaml(path, options=OPTIONS, notes=ABSENT_OPTIONS))
    return {name: getattr(getattr(config, option.section), name) for name, option in OPTIONS.items()}


def test_the_ablation_is_the_papers_run_with_every_subset_of_its_signals() -> None:
    paper = resolved(PAPER)
    signals = {"e": "entropy", "v": "visual", "t": "temporal"}
    files = sorted((PAPER.parent / "ablation").glob("*.yaml"))
    assert len({frozenset(path.stem) for path in files}) == 2 ** len(signals) - 1 == len(files)
    for path in files:
        wanted = tuple(signals[letter] for letter in path.stem)
        assert resolved(path) == {**paper, "signals": wanted}, path.name


def test_the_grpo_baseline_is_the_papers_run_but_for_objective_and_rate() -> None:
    baseline = resolved(PAPER.parent / "grpo_7b.yaml")
    assert baseline == {**resolved(PAPER), "objective": "grpo", "lr": 1e-6, "selection": None}
    t_grpo = resolved(PAPER.parent / "t_grpo_7b.yaml")
    assert t_grpo == {**baseline, "objective": "t_grpo", "temporal_bonus": 0.3}, "one line changes"


def test_the_other_settings_of_the_paper_differ_from_its_run_as_they_say() -> None:
    """Layout, length of a step and output aside."""
    paper = resolved(PAPER)
    own = {name for name, option in OPTIONS.items() if option.section == "parallel" or name.startswith("rollout_")}
    own |= {"prompts_per_step", "save_interval", "dry_run_gpus"}

    def difference(name: str) -> dict[str, Any]:
        found = resolved(PAPER.parent / f"{name}.yaml")
        return {key: value for key, value in found.items() if key not in own and value != paper[key]}

    for size in ("3b", "32b", "72b"):
        assert difference(f"video_ktr_{size}") == {"model": f"Qwen2.5-VL-{size.upper()}-Instruct"}
    tw_grpo = {"objective": "tw_grpo", "loss_aggregation": "token", "clip_high": 0.28, "kl_beta": 0.0, "lr": 1e-6}
    tw_grpo["selection"] = None  # every token carries the loss
    assert difference("tw_grpo_7b_same_data") == tw_grpo
    sft = difference("sft_7b")
    assert (sft["objective"], sft["data_path"]) == ("sft", "Video-R1-data/Video-R1-COT-165k.json")
    for frames in (32, 64):
        assert difference(f"sft_7b_{frames}_frames") == {**sft, "video_max_frames": frames}


def test_beside_each_of_its_values_stands_whether_it_is_our_default() -> None:
    lines = [line for line in PAPER.read_text(encoding="utf-8").splitlines() if re.match(r"  \w", line)]
    names = [line.split(":")[0].strip() for line in lines]
    values = read_yaml(PAPER, options=OPTIONS, notes=ABSENT_OPTIONS)
    assert sorted(names) == sorted(values)
    for name, line in zip(names, lines, strict=True):
        default = OPTIONS[name].default
        if values[name] == default:
            assert line.endswith("  # our default"), line
        else:
            stated = re.search(r"  # default ([^;]+?)(;|$)", line)
            assert stated and stated[1] == show_value(default), line


def test_the_page_of_deviations_names_every_default_that_is_not_the_releases() -> None:
    page = (REPOSITORY / "docs" / "deviations.md").read_text(encoding="utf-8")
    text = page.split("## The defaults beside the release's run")[1].split("\n## ")[0]
    values = read_yaml(PAPER, options=OPTIONS, notes=ABSENT_OPTIONS)
    other = {name for name, value in values.items() if value != OPTIONS[name].default}
    # The last line of that paragraph: model, data, engine and layout; and what is only about this run's files.
    other -= {name for name in other if OPTIONS[name].section == "parallel" or name.startswith("rollout_")}
    other -= {"model", "data_path", "media_root", "engine", "reward_functions", "save_interval", "peak_tflops"}
    other -= {"dry_run_gpus"}
    assert set(re.findall(r"`(--[a-z-]+)`", text)) == {OPTIONS[name].flag for name in other}
