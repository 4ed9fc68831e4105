"""Runs and comparisons with the colocated vLLM engine, for the tests of the lone engine and of engines in ranks.

The trainer's log-probs of the sampled responses are the measure throughout: stale, misplaced or mixed-up weights,
another video or another position move them by far more than the tolerance, which ``test_vllm_colocated.py`` asserts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from megatron_ktr.types import Prompt, RolloutGroup

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


def write_inputs(folder: Path) -> Path:
    """A model and data in ``folder``, which is returned."""
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


@contextlib.contextmanager
def lone_engine(inputs: Path, run_dir: Path) -> Iterator[tuple[Side, Any]]:
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start

    groups = init_parallel(ParallelSizes(), platform=start("cpu"))
    side = make_side(settings(inputs, run_dir), groups)
    # One group at a time: the others wait.
    engine = side.engine(rollout_max_num_seqs=3)
    engine.load_weights(side.policy.export())
    yield side, engine
    engine.close()
    destroy_parallel()
