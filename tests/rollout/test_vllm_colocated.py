"""The colocated vLLM engine: in one process and in four gloo ranks, against the trainer and the Hugging Face engine.

The trainer's log-probs of the sampled responses are the measure throughout: stale, misplaced or mixed-up weights,
another video or another position move them by far more than the tolerance (asserted below).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec, pack_groups
from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.records import read_records
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, RolloutGroup

pytestmark = pytest.mark.vllm

MEAN_TOLERANCE, MAX_TOLERANCE = 1e-4, 5e-4
"""Nats per token: both sides compute in fp32 in different orders; 1e-5 is seen. Old weights move 0.05 and more."""
LENGTH = 12
STEPS = 3


def uneven_reward(response: str, record: dict) -> float:
    """An untrained model earns nothing; this gives its responses something to differ by."""
    return len(response) % 5 / 5


def half_of_the_records(response: str, record: dict) -> float:
    """The responses of every second record are worth the same."""
    return int(record["problem_id"].rpartition("-")[2]) % 2 * uneven_reward(response, record)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    folder = tmp_path_factory.mktemp("colocated")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2)
    # Norms and biases are ones and zeros in a new model, which would hide a mix-up.
    weights = folder / "model" / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    # As published: sampling defaults that would change the distribution if anything read them.
    generation = json.loads((folder / "model" / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 1.5, "temperature": 0.1, "top_k": 1, "top_p": 0.1}
    (folder / "model" / "generation_config.json").write_text(json.dumps(generation))
    # Not as published: mean and deviation of pixels are left to transformers' defaults.
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        processor = json.loads((folder / "model" / name).read_text())
        del processor["image_mean"], processor["image_std"]
        (folder / "model" / name).write_text(json.dumps(processor))
    make_dataset(folder / "data", num_train=8, num_eval=1)
    return folder


def settings(inputs: Path, run_dir: Path, **changes: Any) -> Config:
    return config_from_values(
        {
            "model": str(inputs / "model"),
            "data_path": str(inputs / "data" / "train.json"),
            "prompt_template": str(inputs / "model" / "prompt_template.txt"),
            "video_num_frames": 8,
            "video_max_pixels": 3136,
            "image_max_pixels": 3136,
            "max_prompt_length": 256,
            "engine": "vllm_colocated",
            "num_generations": 3,
            "max_response_length": LENGTH,
            "rollout_kv_cache_gb": 0.03,
            "reward_functions": ("accuracy", "format", f"{__name__}:uneven_reward"),
            "reward_workers": 0,
            "length_bonus": 0.0,
            "kl_beta": 0.04,
            "optimizer": "sgd",
            "use_distributed_optimizer": False,
            "lr": 0.1,
            "lr_decay_style": "constant",
            "train_steps": STEPS,
            "prompts_per_step": 2,
            "save_interval": 1,
            "keep_checkpoints": 0,
            "rollout_log_interval": 1,
            "platform": "cpu",
            "run_dir": str(run_dir),
            **changes,
        }
    )


@dataclass
class Side:
    """What the trainer's side of a comparison needs."""

    config: Config
    policy: Any
    tokenizer: Any
    media: MediaSpec
    prompts: list[Prompt]

    def engine(self, **changes: Any) -> Any:
        """A new colocated engine, as a run with these options would build it."""
        from megatron_ktr.rollout.build import build_sampler

        config = config_from_values({**flat(self.config), **changes})
        sampler = build_sampler(config, ranks=self.policy.ranks, tokenizer=self.tokenizer, media=self.media)
        return sampler.engine

    def difference(self, groups: Sequence[RolloutGroup] | None) -> Tensor | None:
        """|sampler - trainer| log-prob of every response token, on the last stage; collective over the replica, whose
        reading rank has the groups."""
        from megatron_ktr.distributed.collectives import broadcast_object

        model = self.policy.ranks.model
        groups = broadcast_object(groups, group=model, source=torch.distributed.get_global_rank(model, 0))
        vision = "media" if self.policy.ranks.is_first_stage else "none"
        batch = pack_groups(groups, view="intact", media=self.media, vision=vision)
        (statistics,) = self.policy.score([batch])
        if statistics is None:
            return None
        sampled = [rollout.sampler_logprobs for group in groups for rollout in group.rollouts]
        return (statistics.logprob_R - torch.tensor([value for values in sampled for value in values])).abs()

    def change_weights(self, factor: float) -> None:
        """Other weights in any layout, as each element changes by itself."""
        with torch.no_grad():
            for chunk in self.policy.bare_chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(factor)
        self.policy.vision.forget()


def flat(config: Config) -> dict[str, Any]:
    return {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}


def make_side(config: Config, groups: Any) -> Side:
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.rollout.questions import prompt_loader
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    directory = config.model.model
    tokenizer = load_tokenizer(directory)
    dataset = PromptDataset(
        read_records(config.data.data_path),
        loader=prompt_loader(config, tokenizer=tokenizer),
        seed=0,
        shuffle=True,
        rank=groups.data_rank,
        size=groups.data_size,
        skips=SkipCounter(max_skip_share=0.0),
    )
    video, second = dataset.next(2)
    text = dataclasses.replace(
        second, problem_id="text", media=(), token_ids=tuple(tokenizer("which colour")["input_ids"])
    )
    return Side(
        config=config,
        policy=Policy(directory, options=PolicyOptions.of(config), ranks=groups, platform=current(), num_steps=1),
        tokenizer=tokenizer,
        media=media_spec(
            Qwen2_5_VLConfig.from_hf(directory), patchify=PreprocessSettings.from_model(directory).patchify
        ),
        prompts=[video, second, text],
    )


def check(difference_R: Tensor) -> None:
    print(f"{len(difference_R)} log-probs: mean {difference_R.mean():.1e}, max {difference_R.max():.1e}")
    assert difference_R.mean() < MEAN_TOLERANCE and difference_R.max() < MAX_TOLERANCE


# One process


@pytest.fixture(scope="module")
def lone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Any]]:
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start

    groups = init_parallel(ParallelSizes(), platform=start("cpu"))
    side = make_side(settings(inputs, tmp_path_factory.mktemp("unused")), groups)
    # One group at a time: the others wait.
    engine = side.engine(rollout_max_num_seqs=3)
    engine.load_weights(side.policy.export())
    yield side, engine
    engine.close()
    destroy_parallel()


def test_logprobs_of_video_responses_are_the_trainers_before_and_after_new_weights(lone) -> None:
    side, engine = lone
    before = engine.generate(side.prompts)
    assert [group.prompt.problem_id for group in before] == [prompt.problem_id for prompt in side.prompts]
    assert all(len(medium.frames_FCHW) == 8 for prompt in side.prompts[:2] for medium in prompt.media)
    check(side.difference(before))
    side.change_weights(1.1)
    # Without the update it would be seen, also where the prompts' keys and values are already in the cache.
    assert side.difference(engine.generate(side.prompts)).mean() > 100 * MEAN_TOLERANCE
    engine.load_weights(side.policy.export())
    after = engine.generate(side.prompts)
    check(side.difference(after))
    assert [group.rollouts for group in after] != [group.rollouts for group in before]


def test_seeds_make_the_responses(lone) -> None:
    side, engine = lone
    first = engine.generate(side.prompts, step=4)
    engine.load_weights(side.policy.export())
    # The same step later, from empty caches as in a resumed run; and beside other prompts, in another order.
    assert engine.generate(side.prompts, step=4) == first
    assert len({rollout.token_ids for rollout in first[0].rollouts}) == 3
    assert engine.generate(side.prompts, step=5) != first
    draws = [dataclasses.replace(side.prompts[0], draw_number=number) for number in range(3)]
    texts = {rollout.token_ids for group in engine.generate(draws, step=4) for rollout in group.rollouts}
    assert len(texts) == 9, "the same record, drawn three times in a step"


def test_a_second_prompt_has_its_own_count_and_frames_and_changes_no_other_response(lone) -> None:
    from megatron_ktr.rollout.second_prompt import SecondPrompt

    side, engine = lone
    second = SecondPrompt(3, 2, seed=0).of(side.prompts[0], step=4)
    assert second is not None
    alone = engine.generate(side.prompts, step=4)
    found = dict(engine.stream([*side.prompts, second], step=4, counts=[3, 3, 3, 2]))
    assert [found[place].rollouts for place in range(3)] == [group.rollouts for group in alone]
    assert len(found[3].rollouts) == 2
    check(side.difference([found[3]]))  # of the shuffled frames, which the trainer sees in the same order
    plain = dataclasses.replace(found[3], prompt=side.prompts[0])
    assert side.difference([plain]).mean() > 10 * MEAN_TOLERANCE, "the intact frames give other log-probs"
    ((_, again),) = engine.stream([second], step=4, counts=[2])
    assert again.rollouts == found[3].rollouts, "whatever else is asked"


def test_greedy_tokens_and_logprobs_are_the_hf_engines(lone) -> None:
    from megatron_ktr.rollout.hf import HFEngine

    side, engine = lone
    greedy = SamplingSettings(num_generations=2, max_response_length=LENGTH, temperature=0.0)
    hf = HFEngine(side.config.model.model, tokenizer=side.tokenizer, media=side.media, sampling=greedy)
    hf.load_weights(side.policy.export())
    engine.load_weights(side.policy.export())
    ours, theirs = engine.generate(side.prompts, sampling=greedy), hf.generate(side.prompts)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.rollouts, other.rollouts, strict=True):
            assert (a.token_ids, a.text, a.is_finished) == (b.token_ids, b.text, b.is_finished)
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=MAX_TOLERANCE)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(lone) -> None:
    side, engine = lone
    plain = engine.generate(side.prompts)
    text = next(rollout.text for group in plain for rollout in group.rollouts if len(rollout.text.split()) > 3)
    stop = " ".join(text.split()[1:3])[:-1]  # ends within a word
    stopped = engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, stop=(stop,)))
    found = 0
    for before, after in zip(plain, stopped, strict=True):
        for old, new in zip(before.rollouts, after.rollouts, strict=True):
            length = len(new.token_ids)
            assert new.token_ids == old.token_ids[:length] and len(new.sampler_logprobs) == length
            if stop not in old.text:
                assert length == len(old.token_ids)
                continue
            found += 1
            assert stop in new.text and new.is_finished
            assert stop not in side.tokenizer.decode(new.token_ids[:-1], skip_special_tokens=True)
    assert found
    check(side.difference(stopped))


def test_top_k_cuts_the_sampling_and_not_the_logprobs(lone) -> None:
    """One token left to sample from: that of greedy decoding; log-probs after the cut would all be 0."""
    side, engine = lone
    one, greedy = (
        engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, **changes))
        for changes in ({"top_k": 1}, {"temperature": 0.0})
    )
    for cut, wanted in zip(one, greedy, strict=True):
        assert {rollout.token_ids for rollout in cut.rollouts} == {wanted.rollouts[0].token_ids}
    check(side.difference(one))
    assert max(max(rollout.sampler_logprobs) for group in one for rollout in group.rollouts) < -0.01
    assert engine.generate(side.prompts, sampling=dataclasses.replace(engine.sampling, top_k=10**6, top_p=0.95))


def test_logprobs_are_left_out_where_the_engine_has_none_that_are_exact(lone) -> None:
    side, engine = lone
    warm = dataclasses.replace(engine.sampling, temperature=0.7, num_generations=1)
    (group,) = engine.generate(side.prompts[:1], sampling=warm)
    assert group.rollouts[0].sampler_logprobs is None and len(group.rollouts) == 1


def test_groups_are_yielded_while_others_are_still_generated(lone) -> None:
    side, engine = lone
    vllm_engine = engine._llm.llm_engine
    seen = [(index, vllm_engine.get_num_unfinished_requests()) for index, _ in engine.stream(side.prompts)]
    assert sorted(index for index, _ in seen) == [0, 1, 2]
    assert [waiting >= 3 for _, waiting in seen] == [True, True, False], "each the requests of another group"


def test_a_stream_that_nobody_exhausts_leaves_no_requests_behind(lone) -> None:
    side, engine = lone
    stream = engine.stream(side.prompts)
    next(stream)
    stream.close()
    assert engine._llm.llm_engine.get_num_unfinished_requests() == 0


def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(lone) -> None:
    side, engine = lone
    long = dataclasses.replace(side.prompts[2], problem_id="long", token_ids=side.prompts[2].token_ids * 100)
    with pytest.raises(UserError, match="prompt long has 200 tokens"):
        engine.generate([side.prompts[0], long], sampling=dataclasses.replace(engine.sampling, max_response_length=100))
    # The request before it is not left behind.
    assert [group.prompt.problem_id for group in engine.generate(side.prompts[2:])] == ["text"]


def test_weights_that_are_missing_are_an_error(lone) -> None:
    side, engine = lone
    left_out = [(name, tensor) for name, tensor in side.policy.export() if name != "model.norm.weight"]
    with pytest.raises(UserError, match="1 weights were not sent, among them model.norm.weight"):
        engine.load_weights(iter(left_out))
    with pytest.raises(UserError, match="vLLM does not take these weights"):
        engine.load_weights(iter([("model.layers.0.nonsense", torch.zeros(1))]))
    engine.load_weights(side.policy.export())
    check(side.difference(engine.generate(side.prompts)))


def test_more_positions_than_the_model_has_are_refused(lone) -> None:
    side, _ = lone
    with pytest.raises(UserError, match="--max-prompt-length"):
        side.engine(max_prompt_length=5000)


# Sleep and wake: there is no GPU here, so a stand-in records the calls


class RecordingLLM:
    """Notes the calls that move memory, and answers one request with one token."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.llm_engine = self.renderer = self
        self._ids: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {','.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method}: {len(list(kwargs['weights_iterator']))} tensors")

    def reset_mm_cache(self) -> None:
        self.calls.append("reset media")

    def reset_encoder_cache(self) -> None:
        self.calls.append("reset encoder")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset prefix")
        return True

    def render_cmpl(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompts

    def add_request(self, request_id: str, request: dict[str, Any], params: Any) -> None:
        self._ids.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._ids)

    def step(self) -> list[Any]:
        self.calls.append("step")
        done, self._ids = self._ids, []
        return [_Output(request_id=request_id) for request_id in done]


@dataclass
class _Completion:
    token_ids: tuple[int, ...] = (5,)
    logprobs: Any = None
    finish_reason: str = "length"


@dataclass
class _Output:
    request_id: str
    finished: bool = True

    @property
    def outputs(self) -> list[_Completion]:
        return [_Completion()]


def test_what_a_sleeping_engine_drops_comes_back(lone) -> None:
    """vLLM's level 2 drops all that was made while the model was loaded. Parameters come new and buffers are saved: the
    model must have no other tensor on the device, but the key-value cache."""
    _, engine = lone
    runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    known = {id(tensor) for tensors in (runner.model.parameters(), runner.model.buffers()) for tensor in tensors}
    lost = []
    for path, module in runner.model.named_modules():
        # Its own attributes, and those of the plain objects it holds.
        held = [v for v in vars(module).values() if hasattr(v, "__dict__") and not isinstance(v, torch.nn.Module)]
        for values in (vars(module), *map(vars, held)):
            tensors = ((name, value) for name, value in values.items() if isinstance(value, torch.Tensor))
            lost += [f"{path}.{name}" for name, value in tensors if id(value) not in known]
    assert {name.rpartition(".")[2] for name in lost} == {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}, lost


def test_on_a_gpu_the_engine_sleeps_except_while_it_loads_and_generates(lone, monkeypatch) -> None:
    from megatron_ktr.rollout.colocated import engine as vllm_colocated

    side, engine = lone
    calls: list[str] = []

    class Gpu:
        name = "another"

        def empty_cache(self) -> None:
            calls.append("trainer's cache emptied")

    options: dict[str, Any] = {}

    def start(model_dir: Path, **given: Any) -> RecordingLLM:
        options.update(given)
        return RecordingLLM(calls)

    monkeypatch.setattr(vllm_colocated, "current", Gpu)
    sleeper = vllm_colocated.ColocatedEngine(
        side.config.model.model,
        ranks=side.policy.ranks,
        tokenizer=side.tokenizer,
        media=side.media,
        sampling=engine.sampling,
        settings=dataclasses.replace(engine.settings, memory_share=0.4),
        start=start,
    )
    assert calls == ["sleep 2"] and options["gpu_memory_utilization"] == 0.4
    with pytest.raises(RuntimeError, match="load_weights first"):
        sleeper.generate(side.prompts)
    tensors = list(side.policy.export())
    for _ in range(2):
        calls.clear()
        sleeper.load_weights(iter(tensors))
        assert len(sleeper.generate(side.prompts)) == 3
        assert calls == [
            "trainer's cache emptied",
            "wake weights",
            f"reload_weights: {len(tensors)} tensors",
            "reset media",
            "reset encoder",
            "reset prefix",
            "trainer's cache emptied",
            "wake kv_cache",
            "step",
            "sleep 2",
        ]


# Training, in one rank and in four


def train_alone(context: Any, *, inputs: Path, out: Path) -> None:
    from megatron_ktr.train import train

    train(settings(inputs, out / "whole"))
    train(settings(inputs, out / "resumed", train_steps=2))
    train(settings(inputs, out / "resumed", resume=True))
    train(settings(inputs, out / "features", share_vision_features=True, save_interval=0))


def train_by_objective(context: Any, *, inputs: Path, out: Path, rewards: dict[str, str]) -> None:
    """With every objective, and the reward that it is given."""
    from megatron_ktr.train import train

    for objective, reward in rewards.items():
        options = dict(objective=objective, reward_functions=("accuracy", f"{__name__}:{reward}"))
        train(settings(inputs, out / objective, train_steps=1, save_interval=0, **options))


def in_four_ranks(context: Any, *, inputs: Path, out: Path) -> dict[str, Any]:
    """Training from TP2 x PP2 shards, and engines of one and of four ranks; what the last stages found."""
    from megatron_ktr.distributed.groups import ParallelSizes
    from megatron_ktr.train import train

    shards = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    train(settings(inputs, out / "run", rollout_tensor_parallel_size=2, save_interval=0, **shards))
    train(settings(inputs, out / "features", share_vision_features=True, train_steps=1, save_interval=0, **shards))
    found: dict[str, Any] = {}
    layouts = {
        "4 engines, 1 replica": (shards, ParallelSizes(tensor=2, pipeline=2), 1),
        "1 engine, 2 replicas": ({"tensor_model_parallel_size": 2}, ParallelSizes(tensor=2), 4),
    }
    for name, (options, sizes, engine_size) in layouts.items():
        side = make_side(settings(inputs, out / "unused", **options), context.init(sizes))
        side.change_weights(1.1)
        if engine_size == 1:
            with pytest.raises(UserError, match="--rollout-tensor-parallel-size 3 must divide"):
                side.engine(rollout_tensor_parallel_size=3)
        engine = side.engine(rollout_tensor_parallel_size=engine_size)
        engine.load_weights(side.policy.export(gather_to=engine.gather_weights_to))
        groups = engine.generate(side.prompts)
        assert bool(groups) == side.policy.ranks.is_source
        found[name] = {
            "problems": [group.prompt.problem_id for group in groups],
            "responses": sum(len(group.rollouts) for group in groups),
            "difference": side.difference(groups),
        }
        # Only the first replica has a second prompt; engines that several replicas share answer it all the same.
        more = [dataclasses.replace(side.prompts[2], variant="shuffled")] if side.policy.ranks.data_rank == 0 else []
        twice = dict(engine.stream([*side.prompts, *more], counts=[3, 3, 3, *[2 for _ in more]]))
        tokens = [[rollout.token_ids for rollout in twice[place].rollouts] for place in sorted(twice)]
        assert tokens[: len(groups)] == [[rollout.token_ids for rollout in group.rollouts] for group in groups]
        assert [len(responses) for responses in tokens[3:]] == [2 for _ in more if groups]
        if engine_size == 1:
            # One engine refuses its part; the others learn it instead of waiting for answers.
            long = dataclasses.replace(side.prompts[2], problem_id="long", token_ids=side.prompts[2].token_ids * 200)
            with pytest.raises(UserError, match="prompt long has 400 tokens"):
                engine.generate([*side.prompts, long])
            assert [group.rollouts for group in engine.generate(side.prompts)] == [group.rollouts for group in groups]
        engine.close()
    return found


@pytest.fixture(scope="module")
def four_ranks(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("four")
    return out, ranks(in_four_ranks, world_size=4, inputs=inputs, out=out)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_run(run_dir: Path, *, num_steps: int = STEPS) -> None:
    steps = metrics(run_dir)
    assert [step["has_stepped"] for step in steps] == [1.0] * num_steps
    assert [step["num_prompts"] for step in steps] == [2.0] * num_steps
    for step in steps:
        print(f"step {step['step']}: gap {step['sampler_trainer_logprob_gap']:.1e}, grad norm {step['grad_norm']:.2f}")
        assert step["sampler_trainer_logprob_gap"] < MEAN_TOLERANCE
        assert 0 < step["key_token_ratio"] <= 1


def test_video_ktr_trains_from_two_by_two_shards_with_engines_of_two_ranks(four_ranks) -> None:
    out, _ = four_ranks
    check_run(out / "run")
    assert (out / "run" / "export" / "model.safetensors").exists()


def test_engines_on_every_stage_answer_with_the_trainers_vision_features(four_ranks) -> None:
    out, _ = four_ranks
    check_run(out / "features", num_steps=1)


@pytest.mark.parametrize("layout", ["4 engines, 1 replica", "1 engine, 2 replicas"])
def test_shares_of_the_work_come_back_to_the_ranks_that_read_the_prompts(four_ranks, layout) -> None:
    _, results = four_ranks
    found = [result[layout] for result in results]
    readers = [0] if layout == "4 engines, 1 replica" else [0, 2]
    for rank, result in enumerate(found):
        assert result["responses"] == (9 if rank in readers else 0)
    differences = [result["difference"] for result in found if result["difference"] is not None]
    assert differences
    for difference_R in differences:
        check(difference_R)
    problems = [tuple(found[rank]["problems"][:2]) for rank in readers]
    assert len(set(problems)) == len(readers), "each replica has prompts of its own"


@pytest.fixture(scope="module")
def one_rank_runs(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    ranks(train_alone, world_size=1, inputs=inputs, out=out)
    return out


@pytest.mark.parametrize("run", ["whole", "features"])
def test_video_ktr_trains_in_one_process_on_pixels_and_on_features(one_rank_runs, run) -> None:
    check_run(one_rank_runs / run)


def test_objectives_that_ask_engines_for_more_get_it(ranks: Any, inputs: Path, tmp_path: Path) -> None:
    """T-GRPO asks a second time with shuffled frames, DAPO once more for each group of equal rewards."""
    rewards = {"t_grpo": "uneven_reward", "dapo": "half_of_the_records"}
    ranks(train_by_objective, world_size=1, inputs=inputs, out=tmp_path, rewards=rewards)
    for objective, count in {"t_grpo": "shuffled/prompts", "dapo": "filter/rejected"}.items():
        check_run(tmp_path / objective, num_steps=1)
        assert metrics(tmp_path / objective)[0][count] >= 1


def test_a_resumed_run_repeats_the_rollouts(one_rank_runs) -> None:
    name = f"rollouts/step_{STEPS:08d}.jsonl"
    whole, resumed = ((one_rank_runs / run / name).read_text() for run in ("whole", "resumed"))
    assert whole == resumed and len(whole.splitlines()) == 2
    assert metrics(one_rank_runs / "whole")[-1]["loss"] == metrics(one_rank_runs / "resumed")[-1]["loss"]


def test_the_export_of_a_run_is_a_model_vllm_starts_from(four_ranks, lone, monkeypatch) -> None:
    """As ``vllm serve`` would by default: pixels are normalised in the model, by what the export's files say."""
    from megatron_ktr.rollout.colocated import engine as vllm_colocated
    from models.qwen2_5_vl.conversion import load_hf_weights

    start = partial(vllm_colocated.start_vllm_on_cpu, mm_device_do_normalize=True)
    monkeypatch.setattr(vllm_colocated, "start_vllm_on_cpu", start)

    out, _ = four_ranks
    side, _ = lone
    export = out / "run" / "export"
    load_hf_weights(side.policy.bare_chunks, export, ranks=side.policy.ranks)
    side.policy.vision.forget()
    engine = side.engine(model=str(export))  # no weights are sent: it has them from the directory
    check(side.difference(engine.generate(side.prompts)))
    engine.close()
