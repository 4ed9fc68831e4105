"""Supervised runs: order by length, schedule by samples, loss of held-out responses; resumed, and on two ranks."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from megatron_ktr.config import Config, config_from_values, load_config
from megatron_ktr.config.checks import check
from megatron_ktr.config.run_length import with_steps
from megatron_ktr.config.schedule import schedule_length
from megatron_ktr.data.records import record_digest
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.evaluation.training.held_out_loss import HeldOutResponses
from megatron_ktr.evaluation.training.same_sets import require_unchanged, write_settings
from megatron_ktr.rollout.questions import read_held_out_responses
from megatron_ktr.run.dry_run.model import find_model
from megatron_ktr.train import train

STEPS = 4


def talk(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": word} for place, word in enumerate(words)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """``model``, ``data/records.json`` and ``data/held_out.json``: videos, text and talks; one held-out video is
    damaged."""
    folder = tmp_path_factory.mktemp("supervised")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    files = make_dataset(folder / "data", num_train=6, num_eval=3)
    talks = [
        {
            "data_type": "text",
            "messages": talk("which letter is red", "i see red", *["which letter is blue", "blue"] * n),
        }
        for n in range(4)
    ]
    (folder / "data" / "broken.mp4").write_bytes(b"no video")
    held_out = [*files["eval"], {**files["eval"][0], "path": "broken.mp4"}, talks[2]]
    (folder / "data" / "records.json").write_text(json.dumps([*files["sft"], *files["sft_lookup"], *talks]))
    (folder / "data" / "held_out.json").write_text(json.dumps(held_out))
    return folder


def settings(inputs: Path, run_dir: Path, **changes: Any) -> Config:
    values = {
        "model": str(inputs / "model"),
        "prompt_template": str(inputs / "model" / "prompt_template.txt"),
        "data_path": str(inputs / "data" / "records.json"),
        "video_num_frames": 8,
        "video_max_pixels": 3136,
        "objective": "sft",
        "loss_aggregation": "token",
        "kl_beta": 0.0,
        "lr": 1e-2,
        "lr_decay_style": "linear",
        "lr_warmup_samples": 8,
        "lr_decay_samples": 24,
        "train_steps": STEPS,
        "prompts_per_step": 4,
        "max_tokens_per_microbatch": 200,
        "length_buckets": 2,
        "log_interval": 100,
        "rollout_log_interval": 1,
        "eval_loss_data": (str(inputs / "data" / "held_out.json"),),
        "eval_interval": 2,
        "eval_at_start": True,
        "run_dir": str(run_dir),
        **changes,
    }
    config = config_from_values(values)
    check(config)
    return config


NO_EVALUATION = {"eval_loss_data": (), "eval_interval": 0, "eval_at_start": False}


def train_all(context, *, configs: list[Config]) -> None:
    for config in configs:
        train(config)


def train_or_say(context, *, config: Config) -> str:
    """What the run is refused for; empty if it is not."""
    try:
        train(config)
    except UserError as error:
        return str(error)
    return ""


def replace_best(config: Config, metric: str | None) -> Config:
    return replace(config, evaluation=replace(config.evaluation, keep_best=metric))


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By step, what two runs can have in common."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "ranks/", "tokens_per_second", "data_wait", "tflops", "step")
    return {line["step"]: {name: value for name, value in line.items() if not name.startswith(timed)} for line in lines}


def drawn(run_dir: Path) -> list[set[int]]:
    """The draw numbers of each step, over all replicas."""
    paths = [sorted((run_dir / "rollouts").glob(f"step_{step:08d}*.jsonl")) for step in range(1, STEPS + 1)]
    return [{json.loads(line)["draw_number"] for path in of for line in path.read_text().splitlines()} for of in paths]


@pytest.fixture(scope="module")
def whole(ranks, inputs, tmp_path_factory) -> Path:
    """The run without interruption; beside it the same without evaluation, and one that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("runs")
    stopped = {"run_dir": folder / "resumed", "save_interval": 2, "keep_best": "eval_loss"}
    configs = [
        settings(inputs, folder / "whole"),
        settings(inputs, folder / "plain", **NO_EVALUATION),
        settings(inputs, **stopped, train_steps=2),
        settings(inputs, **stopped, resume=True),
    ]
    ranks(train_all, world_size=1, configs=configs)
    return folder / "whole"


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = (load_file(run / "export" / "model.safetensors") for run in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_schedule_counts_samples(whole) -> None:
    """8 samples of warm-up, then down to 0 at 24; 4 a step. A step's metric is the rate of the next one."""
    rates = [metrics(whole)[step]["learning_rate"] for step in range(1, STEPS + 1)]
    assert rates == pytest.approx([0.5e-2, 1e-2, 0.75e-2, 0.5e-2])


def test_held_out_loss_falls_and_changes_nothing(whole) -> None:
    found, plain = metrics(whole), metrics(whole.with_name("plain"))
    losses = {step: values["eval_loss"] for step, values in found.items() if "eval_loss" in values}
    assert list(losses) == [0, 2, 4] and losses[4] < losses[0]
    assert all(found[step]["eval/held_out/loss"] == loss for step, loss in losses.items())
    assert found[0]["eval/held_out/loss_skipped"] == pytest.approx(0.2), "the damaged video, of 5 records"
    assert all(
        {name: value for name, value in found[step].items() if not name.startswith("eval")} == plain[step]
        for step in plain
    )
    assert_same_weights(whole, whole.with_name("plain"))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole) -> None:
    resumed = whole.with_name("resumed")
    assert metrics(resumed) == metrics(whole) and drawn(resumed) == drawn(whole)
    assert_same_weights(whole, resumed)
    best = json.loads((resumed / "best.json").read_text())
    losses = {step: values["eval_loss"] for step, values in metrics(whole).items() if step and "eval_loss" in values}
    assert best["step"] == min(losses, key=lambda step: losses[step]), "of losses the lowest is the best"


def test_a_finished_run_is_measured_on_further_records_and_joins_no_curves(ranks, inputs, whole, tmp_path) -> None:
    """The run was evaluated on one file alone; ``eval_loss`` was the loss over it. It goes on with two replicas."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.with_name("resumed"), run_dir)
    more = tmp_path / "more.json"
    more.write_text(json.dumps(json.loads((inputs / "data" / "held_out.json").read_text())[:2]))
    files = (str(inputs / "data" / "held_out.json"), str(more))
    base = {"run_dir": run_dir, "save_interval": 2, "resume": True, "eval_media_root": str(inputs / "data")}
    both = settings(inputs, **base, eval_loss_data=files)
    before = metrics(run_dir)
    for best, told in (("eval_loss", "was taken over held_out before and would be over held_out, more"), (None, "")):
        said = ranks(train_or_say, world_size=2, config=replace_best(both, best))
        assert all(told in one and bool(one) == bool(told) for one in said)
    after = metrics(run_dir)
    (added,) = [step for step in after if after[step] != before[step]]
    assert added == STEPS and {name for name in after[added] if name not in before[added]} == {
        "eval/more/loss",
        "eval/more/loss_skipped",
    }
    assert before[added].items() <= after[added].items(), "what was measured before stays, eval_loss among it"
    finished = (run_dir / "finished.json").stat().st_ino
    assert ranks(train_or_say, world_size=2, config=both) == ["", ""]
    assert (run_dir / "finished.json").stat().st_ino == finished, "it is finished"
    changed = settings(inputs, **base, eval_loss_data=files, eval_max_items=1)
    said = ranks(train_or_say, world_size=2, config=changed)
    assert all("evaluation on held_out (loss) had other number of records" in one for one in said)


def test_replicas_and_stages_give_the_same_run(ranks, inputs, whole, tmp_path) -> None:
    layouts = {
        "dp2": {},
        "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp2": {"pipeline_model_parallel_size": 2},
        "cp2": {"context_parallel_size": 2},
        "unpacked": {"max_tokens_per_microbatch": None, "micro_batch_groups": 1},
    }
    ranks(train_all, world_size=2, configs=[settings(inputs, tmp_path / n, **layouts[n]) for n in layouts])
    expected = metrics(whole)
    for name in layouts:
        found = metrics(tmp_path / name)
        assert drawn(tmp_path / name) == drawn(whole), name
        for step, values in expected.items():
            for figure in {"loss", "grad_norm", "learning_rate", "eval_loss"} & values.keys():
                # 1e-4 relative as in all parity of layouts; the rate is exact.
                tolerance = 0 if figure == "learning_rate" else 1e-4
                assert found[step][figure] == pytest.approx(values[figure], rel=tolerance), (name, step, figure)
    assert any("num_micro_batches" in values for values in expected.values())


def read_sources(inputs: Path, **changes: Any) -> Any:
    config = settings(inputs, inputs / "nowhere", **changes)
    return read_held_out_responses(config, tokenizer=load_tokenizer(inputs / "model"), is_spokesman=True)


def test_held_out_records_stay_what_they_are(inputs, tmp_path) -> None:
    sources = read_sources(inputs)
    three, four = (HeldOutResponses.of(sources, limit=limit).sets[0].places for limit in (3, 4))
    assert len(three) == 3 and set(three) < set(four) and three == tuple(sorted(three))
    (tmp_path / "eval").mkdir()
    write_settings(tmp_path, HeldOutResponses.of(sources, limit=3))
    require_unchanged(tmp_path, HeldOutResponses.of(sources, limit=3))
    with pytest.raises(
        UserError, match=r"evaluation on held_out \(loss\) had other number of records before \(3, now 4"
    ):
        require_unchanged(tmp_path, HeldOutResponses.of(sources, limit=4))
    with pytest.raises(UserError, match="pixels before"):
        other = read_sources(inputs, video_max_pixels=6272)
        require_unchanged(tmp_path, HeldOutResponses.of(other, limit=3))
    with pytest.raises(UserError, match="eval_loss_data: .*no response to imitate"):
        (tmp_path / "bare.json").write_text(json.dumps([{"problem": "Q", "solution": "A", "data_type": "text"}]))
        read_sources(inputs, eval_loss_data=(str(tmp_path / "bare.json"),))


def test_a_clip_of_held_out_responses_that_comes_back_is_told_and_other_records_are_refused(
    inputs, tmp_path, caplog
) -> None:
    shutil.copytree(inputs / "data", tmp_path / "data")
    path = tmp_path / "data" / "held_out.json"
    records = json.loads(path.read_text())
    read = partial(read_sources, inputs, eval_loss_data=(str(path),), max_skip_share=0.5)
    clip = tmp_path / "data" / "broken.mp4"
    clip.rename(tmp_path / "away.mp4")
    lacking = HeldOutResponses.of(read(), limit=None)
    assert len(lacking.sets[0].places) == len(records) - 1
    (tmp_path / "eval").mkdir()
    write_settings(tmp_path, lacking)
    # As an earlier version wrote it: of what was measured alone.
    file = tmp_path / "eval" / "settings.json"
    older = json.loads(file.read_text())
    digests = [record_digest(record) for record in records if record.get("path") != clip.name]
    older["held_out (loss)"] |= {
        "records": xxhash.xxh3_128("".join(digests).encode()).hexdigest(),
        "number of records": len(records) - 1,
    }
    del older["held_out (loss)"]["chat template"]
    assert older != json.loads(file.read_text())
    today = file.read_text()
    file.write_text(json.dumps(older))
    require_unchanged(tmp_path, lacking)
    file.write_text(today)
    assert "could not be used before" not in caplog.text
    (tmp_path / "away.mp4").rename(clip)
    whole = HeldOutResponses.of(read(), limit=None)
    assert len(whole.sets[0].places) == len(records)
    require_unchanged(tmp_path, whole)
    assert "evaluation on held_out (loss): 1 records could not be used before, and 0 cannot now" in caplog.text
    path.write_text(json.dumps([*records[1:], records[0]]))
    with pytest.raises(UserError, match="had other records before"):
        require_unchanged(tmp_path, HeldOutResponses.of(read(), limit=None))
    a_dry_run_of_the_resumed_run_refuses_the_same(inputs, tmp_path, records=records)


def a_dry_run_of_the_resumed_run_refuses_the_same(inputs: Path, run_dir: Path, *, records: list[Any]) -> None:
    path, other = run_dir / "data" / "held_out.json", run_dir / "data" / "other.json"
    given = {"eval_loss_data": (str(path),), "keep_best": "eval_loss", "save_interval": 2, "max_skip_share": 0.5}
    model = find_model(str(inputs / "model"))

    def look(**changes: Any) -> str:
        found = find_held_out(settings(inputs, run_dir, **given | changes), model)
        return " ".join([*found.lines, *found.not_checked])

    look()  # a new run is refused elsewhere, for its directory
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="had other records before"):
        look()
    path.write_text(json.dumps(records))
    assert look() == f"loss on held_out: {len(records)} records, 0 left out"
    both = {"eval_loss_data": (str(path), str(other))}
    assert "other.json, which is not there whether --keep-best eval_loss is taken over" in look(**both)
    other.write_text(path.read_text())
    with pytest.raises(UserError, match="taken over held_out before and would be over held_out, other now"):
        look(**both)


COMMON = ["--model", "m", "--data-path", "d.json", "--objective", "sft", "--kl-beta", "0", "--train-steps", "10"]
LOSS = ["--eval-loss-data", "h.json", "--eval-interval", "5"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr-warmup-samples", "8", "--lr-warmup-steps", "1"], "--lr-warmup-steps 1 is not read"),
        (["--lr-warmup-samples", "321"], "--lr-warmup-samples 321 exceeds the 320 samples of the run"),
        (["--lr-decay-samples", "8", "--lr-decay-style", "constant"], "which does not decay"),
        (["--lr-warmup-samples", "8", "--lr-decay-samples", "8"], "must exceed --lr-warmup-samples 8"),
        (["--lr-warmup-steps", "11"], "exceeds the 10 optimizer steps"),
        (["--eval-interval", "5"], "or --eval-loss-data: what is to be asked"),
        (["--eval-loss-data", "h.json"], "--eval-loss-data is not read without --eval-interval"),
        ([*LOSS, "--objective", "grpo", "--engine", "hf"], "does not learn given responses"),
        ([*LOSS, "--keep-best", "eval/x/loss"], "expected one of eval_loss, eval/h/loss"),
        ([*LOSS, "--eval-loss-data", "a/h.json"], "two files are called h"),
        ([*LOSS, "--eval-frames", "8"], "--eval-frames needs --eval-data"),
        ([*LOSS, "--fp8-format", "hybrid", "--fp8-recipe", "delayed", "--bf16"], "--fp8-recipe delayed"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*COMMON, *flags])
    assert told in str(caught.value)


def test_a_run_in_epochs_has_its_samples_checked_when_they_are_known() -> None:
    epochs = ["--train-steps", "none", "--train-epochs", "2", "--lr-warmup-samples", "40"]
    config = load_config([*COMMON, *epochs, "--updates-per-rollout", "2"])
    assert schedule_length(config) == math.inf
    assert schedule_length(with_steps(config, num_records=32)) == 2 * 2 * 32, "each update counts its samples"
    with pytest.raises(UserError, match="exceeds the 32 samples"):
        with_steps(load_config([*COMMON, *epochs]), num_records=16)
