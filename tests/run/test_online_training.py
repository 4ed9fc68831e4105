"""The whole loop, generation included, in several layouts; supervised fine-tuning against Hugging Face."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.data_sources import DataSource
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.mixture import MixtureOrder
from megatron_ktr.data.records import check_record, read_records
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.data.wording import DEFAULT as DEFAULT_WORDING
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import EXIT_ALARM, UserError
from megatron_ktr.objectives.sft import SupervisedFineTuning
from megatron_ktr.report.run_data import read_run
from megatron_ktr.run import preflight
from megatron_ktr.train import train
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec
from tests.support.parity import Group, Medium, hf_logprobs

STEPS = 2


def uneven_reward(response: str, record: dict) -> float:
    """An untrained model earns nothing; this gives its responses something to differ by."""
    return len(response) % 5 / 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=8, num_eval=1)
    # Published files repeat problem ids: here every id stands on two records.
    path = folder / "data" / "train.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**record, "problem_id": number // 2} for number, record in enumerate(records)]))
    return folder


def settings(inputs: Path, run_dir: Path, **changes) -> Config:
    return config_from_values(
        {
            "model": str(inputs / "model"),
            "data_path": str(inputs / "data" / "train.json"),
            "prompt_template": str(inputs / "model" / "prompt_template.txt"),
            "video_num_frames": 8,
            "video_max_pixels": 3136,
            "engine": "hf",
            "num_generations": 3,
            "max_response_length": 8,
            "reward_functions": ("accuracy", "format", f"{__name__}:uneven_reward"),
            "reward_workers": 0,
            "length_bonus": 0.0,
            "kl_beta": 0.04,
            "optimizer": "sgd",
            "use_distributed_optimizer": False,
            "lr": 0.05,
            "lr_decay_style": "constant",
            "train_steps": STEPS,
            "prompts_per_step": 4,
            "run_dir": str(run_dir),
            **changes,
        }
    )


def train_layouts(context, *, inputs: Path, out: Path, layouts: dict[str, dict]) -> None:
    """Runs the training command's function once per layout in the ranks of this world."""
    for name, changes in layouts.items():
        train(settings(inputs, out / name, **changes))


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_whole_loop_gives_the_same_steps_in_every_layout(ranks, inputs, tmp_path) -> None:
    two = dict(tensor_model_parallel_size=2)
    worlds = {
        1: {"one": {}},
        2: {"tp2 sp": {**two, "sequence_parallel": True}, "dp2": {}, "cp2": {"context_parallel_size": 2}},
        4: {
            "tp2 pp2": {**two, "pipeline_model_parallel_size": 2},
            "tp2 dp2": two,
            "cp2 pp2": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        },
    }
    for world_size, layouts in worlds.items():
        ranks(train_layouts, world_size=world_size, inputs=inputs, out=tmp_path, layouts=layouts)
    expected = metrics(tmp_path / "one")
    assert [step["has_stepped"] for step in expected] == [1.0] * STEPS
    for name in (name for layouts in worlds.values() for name in layouts):
        for got, wanted in zip(metrics(tmp_path / name), expected, strict=True):
            # The engine got this step's weights from shards of any layout: stale or misplaced ones would differ by
            # whole nats. 1e-5: fp32, cached generation against one packed pass.
            assert got["sampler_trainer_logprob_gap"] < 1e-5
            # The same prompts with the same seeds: the same responses, rewards and (but for rounding) numbers.
            assert got["num_skipped"] == 0 and got["decoder/decord"] + got.get("decoder/pyav", 0) >= 4
            assert got["reward_mean"] == pytest.approx(wanted["reward_mean"], abs=1e-6)
            assert got["response_length"] == wanted["response_length"]
            assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
            # A score within rounding of its threshold may fall on either side: one token of about a hundred.
            assert got["key_token_ratio"] == pytest.approx(wanted["key_token_ratio"], abs=0.02)
            assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)


# Lag, rollout files, replay and resume


RUN_STEPS = 4


def accuracy(response: str, record: dict) -> float:
    """An untrained model answers nothing right; this calls some of its responses right, and those of some records
    more often than others."""
    return float(len(response) % 2 or len(record["path"]) % 3 == 0)


def run_and_resume(context, *, inputs: Path, out: Path, lags: Sequence[int], **more) -> None:
    """Per lag the whole run; then, in a copy cut back to its middle checkpoint, the resumed one."""
    for lag in lags:
        whole, resumed = out / f"lag{lag}", out / f"lag{lag} resumed"
        # 8 records, 4 a step: with a lag, which draws the prompts of a step ahead, the length is given in epochs.
        length = {"train_steps": None, "train_epochs": RUN_STEPS / 2} if lag else {}
        changes = {**LOGGED, "lag": lag, **length, **(ASKED_TWICE if lag else {}), **more}
        train(settings(inputs, whole, **changes))
        if context.rank == 0:
            _copy_until_middle(whole, resumed)
        torch.distributed.barrier()
        # The second half has a worker, or a cache shared by its ranks, of which the first half knew nothing.
        workers = {"data_workers": 1 if context.world_size == 1 else 0, "frame_cache_dir": str(out / "frames")}
        train(settings(inputs, resumed, resume=True, **changes, **workers))


def _copy_until_middle(run_dir: Path, target: Path) -> None:
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "checkpoints" / f"step_{RUN_STEPS:08d}")


LOGGED = dict(
    train_steps=RUN_STEPS,
    save_interval=2,
    rollout_log_interval=1,
    importance_sampling="token",
    lr=0.5,
)


ASKED_TWICE = dict(temporal_bonus=0.3, temporal_responses=2)
"""In the runs with a lag every video is asked a second time, with its frames in random order."""


@pytest.fixture(scope="module")
def lagged(ranks, inputs, tmp_path_factory) -> dict[int, Path]:
    """By world size: folders ``lag0``, ``lag1`` and ``... resumed``."""
    folders = {}
    for world_size in (1, 2):
        folders[world_size] = tmp_path_factory.mktemp("lag")
        ranks(run_and_resume, world_size=world_size, inputs=inputs, out=folders[world_size], lags=(0, 1))
    return folders


def rollout_lines(run_dir: Path, *, steps: Iterable[int], world_size: int) -> list[dict]:
    """Every line of the steps' files, which must be one file for each replica."""
    lines = []
    for step in steps:
        name = f"step_{step:08d}"
        names = [f"{name}.jsonl", *(f"{name}_replica_{replica:04d}.jsonl" for replica in range(1, world_size))]
        assert sorted(path.name for path in (run_dir / "rollouts").glob(f"{name}*")) == sorted(names)
        for file in names:
            lines += [json.loads(line) for line in (run_dir / "rollouts" / file).read_text().splitlines()]
    return lines


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_only_a_lag_leaves_the_sampler_behind_the_trainer(lagged, lag: int, world_size: int) -> None:
    steps = metrics(lagged[world_size] / f"lag{lag}")
    assert [step["has_stepped"] for step in steps] == [1.0] * RUN_STEPS
    for number, step in enumerate(steps, start=1):
        if lag == 0 or number == 1:
            # fp32, cached generation against one packed pass.
            assert step["sampler_trainer_logprob_gap"] < 1e-5
            assert step["importance_ratio_mean"] == pytest.approx(1, abs=1e-4)
            assert step["clipped_fraction"] == 0.0
        else:
            assert step["sampler_trainer_logprob_gap"] > 1e-3
            assert 0 < step["importance_ratio_mean"] < step["importance_ratio_max"] < math.inf


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_resumed_run_repeats_the_rollouts_of_the_uninterrupted_one(lagged, lag: int, world_size: int) -> None:
    """Token by token, log-prob by log-prob; with a lag, the first ones were sampled from weights that are gone."""
    whole, resumed = lagged[world_size] / f"lag{lag}", lagged[world_size] / f"lag{lag} resumed"
    expected = rollout_lines(whole, steps=(3, 4), world_size=world_size)
    assert rollout_lines(resumed, steps=(3, 4), world_size=world_size) == expected
    aside = resumed / "rollouts" / "abandoned_after_step_00000002"
    assert len(list(aside.iterdir())) == 2 * world_size, "files of every replica"
    assert _reproducible(resumed) == _reproducible(whole)
    for run_dir in (whole, resumed):
        assert all(0 < step["data_wait_fraction"] for step in metrics(run_dir)[2:])
    last = metrics(resumed)[-1]
    assert ("data_workers/replaced" in last) == (world_size == 1) and not last.get("data_workers/replaced")
    assert last["frame_cache/hits"] + last["frame_cache/misses"] > 0 and last["frame_cache/off"] == 0


def _reproducible(run_dir: Path) -> list[dict]:
    """Metrics without what measures time or depends on workers and caches, without the check of the sampler that each
    start makes, and without what features of the frozen reference model, kept since the last epoch, save a run that was
    not interrupted."""
    left_out = ("second", "ranks/", "tflops", "sampler_check", "vision_runs_per_prompt")
    left_out += ("data_wait_fraction", "data_workers/", "frame_cache/")
    return [
        {name: value for name, value in step.items() if not any(part in name for part in left_out)}
        for step in metrics(run_dir)
    ]


def test_responses_begun_before_a_checkpoint_are_found_again_in_another_layout(ranks, lagged, inputs, tmp_path) -> None:
    """Two replicas had drawn two questions each; the one replica of two tensor-parallel ranks draws all four."""
    whole = lagged[2] / "lag1"
    _copy_until_middle(whole, tmp_path / "run")
    changes = dict(LOGGED, lag=1, resume=True, tensor_model_parallel_size=2, train_steps=3, **ASKED_TWICE)
    ranks(train_layouts, world_size=2, inputs=inputs, out=tmp_path, layouts={"run": changes})
    expected, found = (
        {
            line["path"]: [
                (response["token_ids"], response["logprobs"])
                for response in (*line["responses"], *line["shuffled_responses"])
            ]
            for line in rollout_lines(run_dir, steps=[3], world_size=world_size)
        }
        for run_dir, world_size in ((whole, 2), (tmp_path / "run", 1))
    )
    assert len(expected) == 4 and found == expected
    assert metrics(tmp_path / "run")[-1]["sampler_trainer_logprob_gap"] > 1e-3, "they are from older weights"


@pytest.mark.parametrize("lag", [0, 1])
def test_every_rollout_of_two_replicas_is_written_and_reported(lagged, lag: int) -> None:
    run_dir = lagged[2] / f"lag{lag}"
    run = read_run(run_dir)
    assert any(values["groups_moved"] for values in metrics(run_dir)), "some are not where they were drawn"
    for step, values in enumerate(metrics(run_dir), start=1):
        lines = rollout_lines(run_dir, steps=[step], world_size=2)
        assert len({line["path"] for line in lines}) == 4, "different questions on the two replicas"
        rewards = [sum(response["rewards"].values()) for line in lines for response in line["responses"]]
        assert len(rewards) == 4 * 3
        assert values["reward_mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert [group.record["problem_id"] for group in run.groups_of(step)] == [line["problem_id"] for line in lines]
        assert all(("shuffled_responses" in line) == bool(lag) for line in lines)
        if lag:
            shuffled = [line["shuffled_responses"] for line in lines]
            moving = [responses for responses in shuffled if responses]  # some synthetic videos stand still
            assert 0 < len(moving) < 4 and {len(responses) for responses in moving} == {2}
            tokens = sum(len(response["token_ids"]) for responses in shuffled for response in responses)
            assert (values["shuffled/prompts"], values["shuffled/tokens"]) == (len(moving), tokens)
            assert all("accuracy" in response["rewards"] for responses in shuffled for response in responses)
            assert "temporal_rule" in values and values["shuffled/seconds_alone"] >= 0


def key_tokens(run_dir: Path, step: int, *, world_size: int) -> list[list[list[bool]]]:
    """Which tokens of the step carried the loss, group by group in the order drawn."""
    lines = sorted(rollout_lines(run_dir, steps=[step], world_size=world_size), key=lambda line: line["draw_number"])
    return [[response["is_key_token"] for response in line["responses"]] for line in lines]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_replaying_the_rollouts_of_a_run_repeats_its_numbers(
    ranks, lagged, inputs, tmp_path, lag: int, world_size: int
) -> None:
    """Recorded groups take a path of their own, without engines, threads and lag: the machinery around generation
    changes nothing in what is learnt from it. A replay of two replicas' groups has one."""
    online = lagged[world_size] / f"lag{lag}"
    recorded = tmp_path / "rollouts.jsonl"
    lines = rollout_lines(online, steps=range(1, RUN_STEPS + 1), world_size=world_size)
    lines.sort(key=lambda line: line["draw_number"])  # frame orders go by the draw
    recorded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay = {
        **LOGGED,
        "save_interval": 0,
        "engine": "replay",
        "data_path": None,
        "replay_path": str(recorded),
        "media_root": str(inputs / "data"),
        "reward_functions": (),
        "shuffle_data": False,
        **(ASKED_TWICE if lag else {}),
    }
    ranks(train_layouts, world_size=1, inputs=inputs, out=tmp_path, layouts={"replay": replay})
    names = ("reward_mean", "loss", "grad_norm", "kl", "importance_ratio_mean", "sampler_trainer_logprob_gap")
    names += ("shuffled/tokens", "shuffled/accuracy", "temporal_rule", "reward/temporal_bonus") if lag else ()
    steps = list(zip(metrics(online), metrics(tmp_path / "replay"), strict=True))
    if world_size > 1:
        # Two replicas add in another order: in the end a score may fall on the other side of its threshold, which
        # puts one token in another's place.
        def is_same(step: int) -> bool:
            return key_tokens(online, step, world_size=2) == key_tokens(tmp_path / "replay", step, world_size=1)

        steps = steps[: len(list(itertools.takewhile(is_same, range(1, RUN_STEPS + 1))))]
        assert len(steps) >= RUN_STEPS - 1
    for wanted, got in steps:
        for name in names:
            # One replica: the same sums, 1e-6 is their fp32 rounding; two: see above, several steps long.
            assert got[name] == pytest.approx(wanted[name], abs=1e-6 if world_size == 1 else 1e-4), name


def test_a_filtering_and_retiring_run_is_resumed_in_the_middle_to_the_last_bit(ranks, inputs, tmp_path) -> None:
    """Two replicas, one step ahead: at the save the next step has begun, and some of its groups are rejected."""
    more = {
        "filter_groups": "equal",
        "min_reward_spread": 1.1,
        "filter_max_rounds": 2,
        "retire_above": 0.7,
        "reward_functions": (f"{__name__}:accuracy", f"{__name__}:uneven_reward"),
    }
    ranks(run_and_resume, world_size=2, inputs=inputs, out=tmp_path, lags=(1,), **more)
    whole, resumed = tmp_path / "lag1", tmp_path / "lag1 resumed"
    steps = _reproducible(whole)
    assert _reproducible(resumed) == steps
    lines = rollout_lines(whole, steps=(3, 4), world_size=2)
    assert rollout_lines(resumed, steps=(3, 4), world_size=2) == lines
    assert steps[2]["filter/rejected"] > 0, "in the step that had begun at the save"
    assert steps[-1]["retirement/passed_over"] > 0 and all(step["has_stepped"] for step in steps)
    assert [step["num_prompts"] for step in steps] == [step["filter/kept"] for step in steps]
    num_equal = 0
    for line in lines:
        rewards = [sum(response["rewards"].values()) for response in line["responses"]]
        num_equal += max(rewards) - min(rewards) < 1.1
    assert num_equal == steps[2]["filter/filled_up"] + steps[3]["filter/filled_up"]
    draws = [line["draw_number"] for line in lines]
    assert len(set(draws)) == len(draws)


def test_a_mixture_goes_on_in_another_number_of_replicas(ranks, inputs, tmp_path) -> None:
    """Two files with media, wording and rewards of their own: two replicas for two steps, then one."""
    records = read_records(inputs / "data" / "train.json")
    (tmp_path / "few.json").write_text((inputs / "data" / "train.json").read_text())
    few = DataSource(
        str(tmp_path / "few.json"),
        weight=1.0,
        media_root=str(inputs / "data"),
        prompt_template=DEFAULT_WORDING,
        reward_functions=("format", f"{__name__}:uneven_reward"),
    )
    many = DataSource(str(inputs / "data" / "train.json"), weight=3.0, name="many")
    changes = {**LOGGED, "data_path": (many, few), "train_steps": 2, "record_store_dir": str(tmp_path / "store")}
    ranks(train_layouts, world_size=2, inputs=inputs, out=tmp_path, layouts={"run": changes})
    changes |= {"train_steps": 3, "resume": True}
    ranks(train_layouts, world_size=1, inputs=inputs, out=tmp_path, layouts={"run": changes})
    order = MixtureOrder((3, 1), (len(records), len(records)), seed=0, shuffle=True)
    of_steps = [[order.draw_of(element)[0] for element in range(4 * step, 4 * step + 4)] for step in range(3)]
    for step, sources in enumerate(of_steps):
        values = metrics(tmp_path / "run")[step]
        drawn = list(itertools.chain(*of_steps[: step + 1]))
        assert (values["source/many"], values["source/few"]) == (drawn.count(0), drawn.count(1)), "period 4: 3 and 1"
        lines = rollout_lines(tmp_path / "run", steps=[step + 1], world_size=1 if step == 2 else 2)
        assert {line["draw_number"] for line in lines} == set(range(4 * step, 4 * step + 4))
        for name, index, parts in (("many", 0, 3), ("few", 1, 2)):
            of_source = [line for line in lines if sources[line["draw_number"] - 4 * step] == index]
            rewards = [response["rewards"] for line in of_source for response in line["responses"]]
            assert {len(reward) for reward in rewards} == {parts}
            mean = sum(sum(reward.values()) for reward in rewards) / len(rewards)
            assert values[f"reward_mean/{name}"] == pytest.approx(mean, abs=1e-6)  # sums in fp32
    assert len(list((tmp_path / "store").glob("*-v1.arrow"))) == 1, "both files have the same content"


def test_supervised_fine_tuning_has_the_loss_and_gradient_of_hugging_face(ranks, inputs, tmp_path) -> None:
    """SGD without momentum at lr 1: the weights' change is the gradient. One record a micro-batch, two, and all four as
    their tokens fit; then the loss of the same records, held out."""
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(json.loads((inputs / "data" / "sft_guess.json").read_text())[:4]))
    packings = {
        "token": {"micro_batch_groups": 1},
        "sequence": {"micro_batch_groups": 2},
        "packed": {
            "max_tokens_per_microbatch": 4096,
            "eval_loss_data": (str(held_out),),
            "eval_media_root": str(inputs / "data"),
            "eval_at_start": True,
        },
    }
    layouts = {
        name: {
            "objective": "sft",
            "loss_aggregation": "sequence" if name == "sequence" else "token",
            "kl_beta": 0.0,
            "lr": 1.0,
            "weight_decay": 0.0,
            "clip_grad": 0.0,
            "train_steps": 1,
            "shuffle_data": False,
            "data_path": str(inputs / "data" / "sft_guess.json"),
            **packing,
        }
        for name, packing in packings.items()
    }
    ranks(train_layouts, world_size=1, inputs=inputs, out=tmp_path, layouts=layouts)
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(inputs / "model")
    logprobs = _hf_response_logprobs(before, inputs)
    losses = {
        "token": -torch.cat(logprobs).mean(),
        "sequence": -torch.stack([values.mean() for values in logprobs]).mean(),
    }
    losses["packed"] = losses["token"]
    at_start, first = metrics(tmp_path / "packed")
    assert at_start["eval_loss"] == at_start["eval/held_out/loss"] == pytest.approx(losses["token"].item(), abs=1e-5)
    assert first["num_micro_batches"] == 1
    for name, loss in losses.items():
        before.zero_grad()
        loss.backward(retain_graph=True)
        assert metrics(tmp_path / name)[-1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        after = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / name / "export")
        for (parameter_name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            # 1e-6: weights of size 0.1 hold the change to fp32 rounding; 1e-4 relative as in all gradient parity.
            torch.testing.assert_close(old.data - new, old.grad, atol=1e-6, rtol=1e-4, msg=parameter_name)


def _hf_response_logprobs(model, inputs: Path) -> list[torch.Tensor]:
    """Log-probs of the first four records' responses, by full forwards with explicit positions."""
    tokenizer = load_tokenizer(inputs / "model")
    loader = PromptLoader.from_model(
        inputs / "model",
        media_root=inputs / "data",
        sampling=FrameSampling(num_frames=8, max_frames=16),
        prompt_template=inputs / "model" / "prompt_template.txt",
        video_max_pixels=3136,
    )
    media = media_spec(Qwen2_5_VLConfig.from_hf(inputs / "model"), patchify=loader.settings.patchify)
    logprobs = []
    for record in read_records(inputs / "data" / "sft_guess.json")[:4]:
        prompt = loader.load(record)
        shown = prompt.media[0]
        positions, next_position = media.positions(
            prompt.token_ids,
            grid_thw=[shown.grid_thw],
            kinds=[shown.kind],
            seconds_per_grid=[shown.seconds_per_grid],
        )
        response = [*tokenizer(record["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        group = Group(
            prompt=torch.tensor(prompt.token_ids),
            prompt_positions=positions,
            next_position=next_position,
            media=(Medium(shown.kind, shown.grid_thw, shown.seconds_per_grid),),
            patches=(media.patchify(shown.frames_FCHW, shown),),
            responses=(torch.tensor(response),),
            weights=(),
        )
        logprobs += hf_logprobs(model, group)
    return logprobs


class _NotFinite(SupervisedFineTuning):
    """Imitation whose loss is infinite."""

    def loss(self, statistics, streams, scores):
        loss, metrics = super().loss(statistics, streams, scores)
        return loss + math.inf, metrics


def train_to_infinity(context, *, inputs: Path, run_dir: Path) -> tuple[int, str]:
    """The exit code, and what is said on the error stream."""
    original = preflight.build_objective
    preflight.build_objective = lambda section, **_: _NotFinite("sequence")
    data = str(inputs / "data" / "sft.json")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changes = dict(objective="sft", data_path=data, kl_beta=0.0, save_interval=1, max_skipped_in_a_row=0)
            return train(settings(inputs, run_dir, **changes)), said.getvalue()
    finally:
        preflight.build_objective = original  # the process serves other tests


def test_a_loss_that_is_no_number_stops_every_rank_before_anything_is_saved(ranks, inputs, tmp_path) -> None:
    found = ranks(train_to_infinity, world_size=2, inputs=inputs, run_dir=tmp_path / "run")
    assert [code for code, _ in found] == [EXIT_ALARM] * 2
    said = [line for line in found[0][1].splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step 1: an update was skipped, because the loss is not finite" in said[0]
    assert not (tmp_path / "run" / "export").exists() and not list((tmp_path / "run").glob("checkpoints/step_*"))


def fail_on_last_rank(context) -> str:
    groups = context.init(ParallelSizes())

    def action() -> None:
        if context.rank == context.world_size - 1:
            raise UserError("this rank's disk is full")

    try:
        on_every_rank(action, ranks=groups)
    except UserError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_is_the_same_error_on_all(ranks) -> None:
    assert ranks(fail_on_last_rank, world_size=2) == ["this rank's disk is full"] * 2


def test_a_response_to_imitate_is_response_or_process_and_solution() -> None:
    def reply(**fields: str) -> str:
        record = check_record({"problem": "Q", **fields}, number=7, needs_solution=False, needs_reply=True)
        (turn,) = record["reply_turns"]
        return turn["content"]

    assert reply(response="x", process="p") == "x"
    assert reply(process="<think>p</think>", solution="<answer>A</answer>") == "<think>p</think><answer>A</answer>"
    with pytest.raises(ValueError, match="no response to imitate"):
        reply(solution="<answer>A</answer>")
