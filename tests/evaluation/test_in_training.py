"""Evaluation between steps: its figures are those of the tool, and training is the same with and without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.checks import check
from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import EXIT_SAVED, UserError
from megatron_ktr.evaluation.asking.outcomes import read_evaluation
from megatron_ktr.evaluation.engines.prompts import PromptMaker
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.evaluation.training.held_out import (
    HeldOut,
    held_out_of_run,
    read_held_out,
    require_known_metric,
)
from megatron_ktr.evaluation.training.in_training import TrainingEvaluation
from megatron_ktr.evaluation.training.same_sets import require_unchanged, write_settings
from megatron_ktr.files.chat_template import set_chat_template
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.run.dry_run.model import find_model
from megatron_ktr.run.interruption import LeaveRequest
from megatron_ktr.train import train
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

NUM_QUESTIONS = 25
BROKEN = "eval-3"
ACCURACY = "eval/held_out/accuracy"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """``model``, ``data/sft.json``, ``data/train.json``, and ``data/held_out.json``, one of whose videos is damaged."""
    folder = tmp_path_factory.mktemp("in_training")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=16, num_eval=NUM_QUESTIONS)
    (folder / "data" / "broken.mp4").write_bytes(b"no video")
    records = json.loads((folder / "data" / "eval.json").read_text())
    damaged = [record | ({"path": "broken.mp4"} if record["problem_id"] == BROKEN else {}) for record in records]
    (folder / "data" / "held_out.json").write_text(json.dumps(damaged))
    return folder


def settings(inputs: Path, run_dir: Path, **changes: Any) -> Config:
    """Supervised fine-tuning that is evaluated twice."""
    values = {
        "model": str(inputs / "model"),
        "prompt_template": str(inputs / "model" / "prompt_template.txt"),
        "data_path": str(inputs / "data" / "sft.json"),
        "video_num_frames": 8,
        "video_max_pixels": 3136,
        "engine": "hf",
        "objective": "sft",
        "loss_aggregation": "token",
        "kl_beta": 0.0,
        "length_bonus": 0.0,
        "max_response_length": 24,
        "lr": 1e-2,
        "train_steps": 40,
        "prompts_per_step": 4,
        "num_generations": 3,
        "rollout_log_interval": 0,
        "log_interval": 100,
        "eval_data": (str(inputs / "data" / "held_out.json"),),
        "eval_interval": 20,
        "run_dir": str(run_dir),
        **changes,
    }
    config = config_from_values(values)
    check(config)
    return config


OFF = {"eval_data": (), "eval_interval": 0}


def rl_settings(inputs: Path, tuned: Path, run_dir: Path, **changes: Any) -> Config:
    """Reinforcement learning on the fine-tuned model."""
    return settings(
        inputs,
        run_dir,
        **{
            "model": str(tuned / "export"),
            "data_path": str(inputs / "data" / "train.json"),
            "objective": "grpo",
            "loss_aggregation": "sequence",
            "importance_sampling": "token",
            "lr": 1e-4,
            "lr_decay_style": "constant",
            "train_steps": 4,
            "eval_interval": 2,
            **changes,
        },
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluated(run_dir: Path) -> dict[int, dict[str, float]]:
    """The figures of every evaluated step."""
    found = {line["step"]: {n: v for n, v in line.items() if n.startswith("eval/")} for line in metrics(run_dir)}
    return {step: figures for step, figures in found.items() if figures}


def answers(run_dir: Path, step: int) -> dict[str, str]:
    directory = run_dir / "eval" / f"step_{step:08d}"
    lines = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    assert len({line["item_id"] for line in lines}) == len(lines)
    return {line["item_id"]: line["answer"]["text"] for line in lines}


def train_all(context, *, configs: list[Config]) -> list[int]:
    return [train(config) for config in configs]


@pytest.fixture(scope="module")
def tuned(ranks, inputs, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    ranks(train_all, world_size=1, configs=[settings(inputs, run_dir, eval_at_start=True)])
    return run_dir


def test_fine_tuning_is_evaluated_by_an_engine_of_its_own(tuned) -> None:
    figures = evaluated(tuned)
    assert list(figures) == [0, 20, 40]
    assert figures[0][ACCURACY] == 0 < figures[40][ACCURACY] < 1, "an untrained model says nothing"
    assert all(values["eval/held_out/unusable"] == 1 / NUM_QUESTIONS for values in figures.values())
    assert {name.split("/")[2] for name in figures[40]} == {
        *("accuracy", "strict", "lenient", "format", "truncated", "unusable", "response_length"),
        *("problem_type", "task"),
    }
    seconds = {line["step"]: line.get("seconds/evaluate") for line in metrics(tuned)}
    assert {step for step, value in seconds.items() if value} == {0, 20, 40}
    evaluation = read_evaluation(tuned / "eval" / "step_00000040")
    (broken,) = [outcome for outcome in evaluation.outcomes if outcome.problem]
    assert broken.item.item_id == BROKEN and broken.verdicts["official"].score == 0
    right = [outcome.verdicts["official"].score for outcome in evaluation.outcomes]
    assert len(right) == NUM_QUESTIONS and figures[40][ACCURACY] == pytest.approx(sum(right) / NUM_QUESTIONS)


def held_out_of(config: Config) -> HeldOut:
    options = EvaluationOptions.of(config, data_parallel_size=1)
    assert options is not None
    tokenizer = load_tokenizer(options.model, chat_template=options.data.chat_template)
    return read_held_out(options, tokenizer=tokenizer, is_spokesman=True)


def evaluate_export(context, *, argv: list[str]) -> int:
    from tools.evaluate import main

    return main(argv)


def test_figures_are_those_of_the_tool_on_the_exported_model(ranks, inputs, tuned, tmp_path) -> None:
    argv = ["--model", str(tuned / "export"), "--engine", "hf", "--dtype", "fp32", "--out", str(tmp_path / "tool")]
    argv += ["--benchmark", str(inputs / "data" / "held_out.json"), "--max-tokens", "24", "--data-workers", "0"]
    argv += ["--prompt-template", str(inputs / "model" / "prompt_template.txt")]
    argv += ["--frames", "8", "--frame-sampling", "fixed", "--max-pixels", "3136"]
    assert ranks(evaluate_export, world_size=1, argv=argv) == [0]
    ours, theirs = (read_evaluation(folder) for folder in (tuned / "eval" / "step_00000040", tmp_path / "tool"))
    verdicts = [
        {outcome.item.item_id: (outcome.text, outcome.verdicts) for outcome in evaluation.outcomes}
        for evaluation in (ours, theirs)
    ]
    assert verdicts[0] == verdicts[1]
    found = json.loads((tmp_path / "tool" / "results.json").read_text())["benchmarks"]["held_out"]["conditions"][0]
    for protocol, figures in found["protocols"].items():
        metric = f"eval/held_out/{'accuracy' if protocol == 'official' else protocol}"
        assert evaluated(tuned)[40][metric] == figures["accuracy"]


def _reproducible(run_dir: Path) -> list[dict[str, float]]:
    """Metrics of training that do not measure time."""
    left_out = ("second", "ranks/", "tflops", "sampler_check", "data_wait_fraction", "eval/")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in left_out)}
        for line in metrics(run_dir)
        if line["step"] > 0
    ]


@pytest.mark.parametrize("lag", [0, 1])
def test_training_is_the_same_to_the_last_bit_with_and_without_evaluation(ranks, inputs, tuned, tmp_path, lag) -> None:
    """Sampled responses among them: with a lag, those of a step that had begun when the evaluation came."""
    common = {"lag": lag, "rollout_log_interval": 1, "top_p": 1.0}
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    configs = [
        rl_settings(inputs, tuned, plain, **common, **OFF),
        rl_settings(inputs, tuned, asked, **common, eval_at_start=True, eval_interval=1),
    ]
    ranks(train_all, world_size=1, configs=configs)
    assert list(evaluated(asked)) == [0, 1, 2, 3, 4] and not evaluated(plain)
    assert _reproducible(asked) == _reproducible(plain)
    for path in sorted((plain / "rollouts").iterdir()):
        assert path.read_text() == (asked / "rollouts" / path.name).read_text()
    expected, found = (load_file(run / "export" / "model.safetensors") for run in (plain, asked))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = load_file(tuned / "export" / "model.safetensors")
    assert any(not torch.equal(start[name], found[name]) for name in found), "a run that learns"
    assert answers(asked, 0) == answers(tuned, 40), "the same model"
    assert answers(asked, 4) != answers(asked, 0), "each evaluation has the weights of its step"


def test_replicas_share_the_questions_and_tensor_ranks_the_answers(ranks, inputs, tuned, tmp_path) -> None:
    layouts = {"dp2": {}, "tp2": {"tensor_model_parallel_size": 2}}
    configs = [
        rl_settings(inputs, tuned, tmp_path / name, eval_at_start=True, eval_interval=0, train_steps=1, **layout)
        for name, layout in layouts.items()
    ]
    ranks(train_all, world_size=2, configs=configs)
    for name in layouts:
        assert answers(tmp_path / name, 0) == answers(tuned, 40)
        found = evaluated(tmp_path / name)[0]
        assert found == evaluated(tuned)[40]


class _Leaves(LeaveRequest):
    """Receives a signal at the n-th time that it is looked for."""

    at = 0

    def agreed(self, group) -> str | None:
        type(self).at -= 1
        return "SIGTERM" if type(self).at <= 0 else None


def train_and_leave(context, *, config: Config, at: int) -> int:
    from megatron_ktr import train as module

    _Leaves.at, original = at, module.LeaveRequest
    module.LeaveRequest = _Leaves
    try:
        return train(config)
    finally:
        module.LeaveRequest = original  # the process serves other tests


def test_an_evaluation_that_was_abandoned_is_done_when_the_run_resumes(ranks, inputs, tuned, tmp_path) -> None:
    """Steps 2 and 4 are evaluated, in 3 rounds each (25 questions, 12 at a time)."""
    saving = {"save_interval": 1, "keep_checkpoints": 1, "keep_best": "eval/held_out/format"}
    whole, left = tmp_path / "whole", tmp_path / "left"
    ranks(train_all, world_size=1, configs=[rl_settings(inputs, tuned, whole, **saving)])
    config = rl_settings(inputs, tuned, left, **saving)
    # Looked for before steps 1 and 2, and before each round: the fourth time is in the evaluation after step 2.
    assert ranks(train_and_leave, world_size=1, config=config, at=4) == [EXIT_SAVED]
    assert [line["step"] for line in metrics(left)] == [1, 2] and not evaluated(left)
    assert not list((left / "eval").glob("step_*")) and not (left / "best.json").exists()
    again = rl_settings(inputs, tuned, left, **saving, resume=True)
    # And once more at the end of the last evaluation, when no step is left.
    assert ranks(train_and_leave, world_size=1, config=again, at=7) == [EXIT_SAVED]
    assert [line["step"] for line in metrics(left)] == [1, 2, 3, 4] and list(evaluated(left)) == [2]
    ranks(train_all, world_size=1, configs=[again])
    assert evaluated(left) == evaluated(whole) and list(evaluated(left)) == [2, 4]
    assert [line["step"] for line in metrics(left)] == [1, 2, 3, 4]
    best = json.loads((left / "best.json").read_text())
    assert best == json.loads((whole / "best.json").read_text())
    kept = {path.name for path in (left / "checkpoints").glob("step_*")}
    # One more may be there: a checkpoint goes when newer ones have been read again.
    assert kept >= {"step_00000004", Path(best["checkpoint"]).name}
    a_further_set_is_asked_of_a_finished_run(ranks, inputs, again, other=tmp_path / "other.json")


def a_further_set_is_asked_of_a_finished_run(ranks, inputs, config: Config, *, other: Path) -> None:
    """Of its last step, beside the set that it was evaluated on; and once."""
    run_dir = Path(config.trainer.run_dir)
    before = {
        "metrics": metrics(run_dir)[-1],
        "answers": answers(run_dir, 4),
        "best": (run_dir / "best.json").read_text(),
    }
    other.write_text(json.dumps(json.loads((inputs / "data" / "held_out.json").read_text())[5:7]))
    files = (*config.evaluation.eval_data, str(other))
    section = replace(config.evaluation, eval_data=files, eval_media_root=str(inputs / "data"))
    both = replace(config, evaluation=section)
    ranks(train_all, world_size=1, configs=[both])
    now = metrics(run_dir)[-1]
    added = {name for name in now if name not in before["metrics"]}
    assert "eval/other/accuracy" in added and all(name.startswith("eval/other/") for name in added)
    assert all(now[name] == value for name, value in before["metrics"].items() if not name.startswith("seconds/"))
    assert list(evaluated(run_dir)) == [2, 4] and "eval/other/accuracy" not in evaluated(run_dir)[2]
    assert answers(run_dir, 4) == before["answers"] and (run_dir / "best.json").read_text() == before["best"]
    further = [json.loads(line)["item_id"] for line in (run_dir / "eval/step_00000004_2/answers.jsonl").open()]
    assert sorted(further) == ["eval-5", "eval-6"]
    inode = (run_dir / "finished.json").stat().st_ino
    ranks(train_all, world_size=1, configs=[both])
    assert (run_dir / "finished.json").stat().st_ino == inode, "it is finished, and not exported again"


class _Sleeper:
    """A source whose engine drops the weights after each call, or keeps them."""

    def __init__(self, *, keeps_weights: bool) -> None:
        self.keeps_weights = keeps_weights
        self.calls: list[str] = []

    def from_local(self, value: Any) -> Any:
        return value

    def sample(self, prompts: Sequence[Prompt], *, sampling: SamplingSettings) -> list[RolloutGroup]:
        self.calls.append("ask")
        rollout = Rollout((1,), text="<answer>A</answer>", is_finished=True)
        return [RolloutGroup(prompt, (rollout,)) for prompt in prompts]


@pytest.mark.parametrize("keeps_weights", [True, False])
def test_an_engine_that_drops_its_weights_gets_them_before_each_round(
    one_rank, inputs, tmp_path, keeps_weights
) -> None:
    config = settings(inputs, tmp_path / "run", eval_frames=2)
    options = EvaluationOptions.of(config, data_parallel_size=1)
    assert options is not None
    source = _Sleeper(keeps_weights=keeps_weights)
    tokenizer = load_tokenizer(options.model)
    builder = PromptBuilder(tokenizer, visual_tokens=VisualTokens.from_model(options.model, tokenizer))
    evaluation = TrainingEvaluation(
        held_out_of(config),
        options=options,
        ranks=one_rank,
        source=source,
        prompts=PromptMaker(builder, max_model_len=1000),
        send_weights=lambda: source.calls.append("weights"),
    )
    figures = evaluation(20, is_leaving=lambda: False)
    assert figures is not None and 0 < figures[ACCURACY] < 1 and figures["eval/held_out/response_length"] == 1
    # 25 questions, 12 at a time.
    assert source.calls == (["weights", "ask", "ask", "ask"] if keeps_weights else ["weights", "ask"] * 3)


# What is refused before the model is built


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as refused:
        held_out = held_out_of(config)
        require_known_metric(config.evaluation.keep_best, held_out)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"eval_data": ("nowhere.json",)}, ["--eval-data nowhere.json: no such file"]),
        ({"eval_benchmark": ("mvbench=nowhere",)}, ["--eval-benchmark mvbench=nowhere", "does not exist"]),
        ({"eval_benchmark": ("mvbench",)}, ["--eval-benchmark mvbench: say where", "--eval-benchmark-root DIR"]),
        ({"eval_benchmark": ("mmvo",)}, ["--eval-benchmark 'mmvo'", "did you mean mmvu"]),
        ({"eval_media_root": "nowhere"}, ["--eval-media-root nowhere"]),
        ({"keep_best": "eval/held_out/acuracy"}, ["expected one of eval/held_out/accuracy", "did you mean"]),
        ({"keep_best": "eval/held_out/truncated"}, ["--keep-best eval/held_out/truncated: expected one of"]),
        ({"keep_best": "reward_mean"}, ["eval/held_out/format, "]),
        ({"ignore_fields": ("task",)}, ["has the field task", "--ignore-fields"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(inputs, tmp_path, changes: Mapping[str, Any], parts) -> None:
    message = refusal(settings(inputs, tmp_path / "run", **changes))
    for part in parts:
        assert part in message


def test_a_file_of_ones_own_is_not_taken_for_a_benchmark(inputs, tmp_path) -> None:
    shutil.copy(inputs / "data" / "held_out.json", tmp_path / "mmvu.json")
    message = refusal(settings(inputs, tmp_path / "run", eval_data=(str(tmp_path / "mmvu.json"),)))
    assert "would look like those of the benchmark mmvu" in message and "--eval-benchmark mmvu=" in message


def test_media_that_are_not_there_are_refused_if_many_and_named_if_few(inputs, tmp_path, caplog) -> None:
    shutil.copytree(inputs / "data", tmp_path / "data")
    path = tmp_path / "data" / "held_out.json"
    config = settings(inputs, tmp_path / "run", eval_data=(str(path),))
    record = json.loads(path.read_text())[0]
    (tmp_path / "data" / record["path"]).unlink()
    held_out = held_out_of(config)
    assert held_out.missing["held_out"] == (record["problem_id"],)
    assert "the media of 1 of 25 questions" in caplog.text and "count as wrong" in caplog.text
    (tmp_path / "run").mkdir()
    write_settings(tmp_path / "run", held_out)
    require_unchanged(tmp_path / "run", held_out)
    assert "could not be used before" not in caplog.text
    require_unchanged(tmp_path / "run", held_out_of(settings(inputs, tmp_path / "run")))
    assert "evaluation on held_out: 1 records could not be used before, and 0 cannot now" in caplog.text
    shutil.rmtree(tmp_path / "data" / "videos")
    assert "--max-skip-share" in refusal(config) and "--eval-media-root" in refusal(config)


def test_a_fixed_choice_of_questions_is_said_in_words(inputs, tmp_path) -> None:
    held_out = held_out_of(settings(inputs, tmp_path / "run", eval_max_items=7, seed=0))
    other = held_out_of(settings(inputs, tmp_path / "run", eval_max_items=9, seed=1))
    ids = {item.item_id for item in held_out.items}
    assert len(ids) == 7 and ids < {item.item_id for item in other.items}, "runs with other seeds compare"
    assert "7 of 25 questions, the same in every evaluation" in held_out.lines[0]


def test_a_set_stays_what_it_is_as_long_as_a_run_is_evaluated_on_it(inputs, tmp_path, caplog) -> None:
    run_dir, template = tmp_path / "run", tmp_path / "template.jinja"
    own = str(load_tokenizer(inputs / "model").chat_template)
    template.write_text(own + "{# another #}")
    copy_of_model(inputs / "model", tmp_path / "other_model", chat_template=template.read_text())
    run_dir.mkdir()
    write_settings(run_dir, held_out_of(settings(inputs, run_dir)))
    require_unchanged(run_dir, held_out_of(settings(inputs, run_dir)))
    shutil.copy(inputs / "data" / "held_out.json", tmp_path / "other.json")
    moved = {"eval_media_root": str(inputs / "data")}
    renamed = held_out_of(settings(inputs, run_dir, eval_data=(str(tmp_path / "other.json"),), eval_frames=4, **moved))
    require_unchanged(run_dir, renamed)
    write_settings(run_dir, renamed)
    for changes, what in (
        ({"eval_frames": 4}, "other frames before (8, now 4)"),
        ({"eval_max_items": 5}, "other questions before"),
        ({"eval_temperature": 0.7}, "temperature 0.1, now 0.7"),
        ({"eval_max_tokens": 7}, "max_tokens 24, now 7"),
        ({"prompt_template": "video_r1"}, "other wording before"),
        ({"video_max_pixels": 6272}, "max_pixels 3136, now 6272"),
        ({"chat_template": str(template)}, "other chat template before ("),
        ({"model": str(tmp_path / "other_model")}, "other chat template before ("),
    ):
        with pytest.raises(UserError, match="--resume: evaluation on held_out") as refused:
            require_unchanged(run_dir, held_out_of(settings(inputs, run_dir, **changes)))
        assert what in str(refused.value)
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "eval/held_out/accuracy": 0.5}\n')
    require_unchanged(run_dir, held_out_of(settings(inputs, run_dir)))
    assert "does not say of which questions" not in caplog.text
    (run_dir / "eval" / "settings.json").rename(tmp_path / "settings.json")
    require_unchanged(run_dir, held_out_of(settings(inputs, run_dir)))
    assert "metrics.jsonl has figures of held_out, and" in caplog.text
    (tmp_path / "settings.json").rename(run_dir / "eval" / "settings.json")
    # Given as a file, it is the same one; and a run of an earlier version knew the files alone.
    (tmp_path / "own.jinja").write_text(own)
    require_unchanged(run_dir, held_out_of(settings(inputs, run_dir, chat_template=str(tmp_path / "own.jinja"))))
    before = json.loads((run_dir / "eval" / "settings.json").read_text())
    before["held_out"]["chat template"] = None
    (run_dir / "eval" / "settings.json").write_text(json.dumps(before))
    require_unchanged(run_dir, held_out_of(settings(inputs, run_dir)))
    with pytest.raises(UserError, match="other chat template before .None, now "):
        require_unchanged(run_dir, held_out_of(settings(inputs, run_dir, chat_template=str(template))))
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="other frames before"):  # a dry run says so, too
        find_held_out(settings(inputs, run_dir, eval_frames=4), find_model(str(inputs / "model")))


def copy_of_model(model: Path, other: Path, *, chat_template: str) -> None:
    shutil.copytree(model, other)
    set_chat_template(other, chat_template)


def read_on_ranks(context, *, configs: list[Config]) -> str:
    options = EvaluationOptions.of(configs[context.rank], data_parallel_size=context.world_size)
    try:
        held_out_of_run(options, ranks=context.init(), tokenizer=load_tokenizer(configs[0].model.model))
    except UserError as error:
        return f"{error.is_on_every_rank} {error}"
    return "no error"


def test_replicas_that_read_other_questions_are_refused_on_every_rank(ranks, inputs, tmp_path) -> None:
    here = settings(inputs, tmp_path / "run")
    records = json.loads((inputs / "data" / "held_out.json").read_text())
    (tmp_path / "held_out.json").write_text(json.dumps(records[::-1]))
    moved = {"eval_data": (str(tmp_path / "held_out.json"),), "eval_media_root": str(inputs / "data")}
    said = ranks(read_on_ranks, world_size=2, configs=[here, settings(inputs, tmp_path / "run", **moved)])
    assert len(set(said)) == 1 and said[0].startswith(
        "True evaluation on held_out: the reading rank of replica 1 found"
    )
