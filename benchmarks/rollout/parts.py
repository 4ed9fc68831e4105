"""What ``run.py`` measures: a tiny model, prompts with videos, two engines, and the trainer that feeds them.

Lengths of responses are natural ones (``response_length``), not the model's own: an untrained model ends at random. End
tokens end nothing here. vLLM stops each response at its length. transformers' ``generate`` decodes one batch until the
longest response ends, whoever ends before; so it decodes that far, and what lies beyond a row's length is cut off and
counts for nothing.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
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
from megatron_ktr.data.records import read_records
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.colocated.engine import ColocatedEngine, EngineSettings
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.questions import prompt_loader
from megatron_ktr.rollout.sampling import SamplingSettings, sample_seed
from megatron_ktr.types import Prompt, RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec

FRAMES, SIDE = 16, 168
"""8 temporal patches of 6 x 6 merged patches: 288 visual tokens."""
SPREAD = 0.7
"""Standard deviation of the logarithm of lengths."""
MAX_PROMPT = 448


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution, cut to ``least`` .. ``most``."""

    least: int = 16
    most: int = 256
    mean: int = 64

    def draw(self, seed: int) -> int:
        """The length of the response with this seed."""
        length = random.Random(seed).lognormvariate(math.log(self.mean) - SPREAD**2 / 2, SPREAD)
        return min(self.most, max(self.least, round(length)))


@dataclass(frozen=True)
class Turn:
    """One engine's measured turn."""

    update_seconds: float
    update_bytes: int
    seconds: float
    cpu_seconds: float
    """Of all threads: on a busy machine steadier than the time that passes."""
    num_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class _VllmEngine(ColocatedEngine):
    """vLLM inside the ranks; each response ends at its own length."""

    lengths: Lengths

    def _params(self, sampling: SamplingSettings, *, seed: int) -> Any:
        own = dataclasses.replace(sampling, max_response_length=self.lengths.draw(seed))
        return super()._params(own, seed=seed)


class Workload:
    """Model, prompts, trainer and engines below ``folder``, in this process alone."""

    def __init__(
        self,
        folder: Path,
        *,
        num_prompts: int,
        num_samples: int,
        lengths: Lengths,
        ranks: ParallelGroups,
        platform: Platform,
    ) -> None:
        _write_inputs(folder, num_prompts=num_prompts)
        self.config = _config(folder, num_samples=num_samples, lengths=lengths)
        self.lengths = lengths
        self.sampling = SamplingSettings(num_generations=num_samples, max_response_length=lengths.most)
        self.tokenizer = load_tokenizer(folder / "model")
        self.media: MediaSpec
        loader = prompt_loader(self.config, tokenizer=self.tokenizer)
        self.media = media_spec(Qwen2_5_VLConfig.from_hf(folder / "model"), patchify=loader.settings.patchify)
        self.prompts = [loader.load(record) for record in read_records(folder / "data" / "train.json")]
        self.policy = Policy(
            folder / "model", options=PolicyOptions.of(self.config), ranks=ranks, platform=platform, num_steps=1
        )

    @property
    def num_visual_tokens(self) -> int:
        """Of the prompt with the fewest."""
        return min(sum(map(self.media.is_visual, prompt.token_ids)) for prompt in self.prompts)

    def engines(self) -> dict[str, RolloutEngine]:
        """Both engines, by name."""
        directory = self.config.model.model
        own = dict(tokenizer=self.tokenizer, media=self.media, sampling=self.sampling)
        hf = HFEngine(directory, **own)
        hf.end_token_ids = ()
        hf.model.generation_config.eos_token_id = None
        settings = EngineSettings(
            max_prompt_length=MAX_PROMPT,
            max_response_length=self.lengths.most,
            max_medium_tokens=self.num_visual_tokens,
        )
        vllm = _VllmEngine(directory, ranks=self.policy.ranks, settings=settings, **own)
        vllm.end_token_ids = ()
        vllm.lengths = self.lengths
        return {"hf": hf, "vllm": vllm}

    def take_turn(self, engine: RolloutEngine, *, step: int) -> tuple[Turn, list[RolloutGroup]]:
        """New weights, which also make vLLM forget the prompts it has seen, then one response per prompt and sample."""
        num_bytes = [0]
        begin = time.perf_counter()
        engine.load_weights(_counted(self.policy.export(), num_bytes))
        update_seconds = time.perf_counter() - begin
        lengths = [[self.lengths.draw(seed) for seed in self._seeds(prompt, step)] for prompt in self.prompts]
        sampling = self.sampling
        if not engine.is_collective:
            sampling = dataclasses.replace(sampling, max_response_length=max(map(max, lengths)))
        begin, cpu_begin = time.perf_counter(), time.process_time()
        groups = engine.generate(self.prompts, step=step, sampling=sampling)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        groups = [_cut(group, own) for group, own in zip(groups, lengths, strict=True)]
        return Turn(update_seconds, num_bytes[0], seconds, cpu_seconds, num_tokens=sum(map(sum, lengths))), groups

    def gaps(self, groups: Sequence[RolloutGroup]) -> Tensor:
        """|sampler - trainer| log-prob of every response token, in nats."""
        found = []
        for group in groups:
            (statistics,) = self.policy.score([pack_groups([group], view="intact", media=self.media)])
            sampled = [value for rollout in group.rollouts for value in rollout.sampler_logprobs]
            found.append((statistics.logprob_R - torch.tensor(sampled)).abs())
        return torch.cat(found)

    def _seeds(self, prompt: Prompt, step: int) -> list[int]:
        numbers = range(self.sampling.num_generations)
        return [sample_seed(seed=0, step=step, identity=prompt.identity, sample=number) for number in numbers]


def _write_inputs(folder: Path, *, num_prompts: int) -> None:
    """The model, moved away from its beginning: norms and biases that are not ones and zeros, a sharper head."""
    save_tiny_model(folder / "model", corpus=corpus(), frame_size=SIDE)
    path = folder / "model" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in load_file(path).items()
    }
    tensors["lm_head.weight"] *= 3
    save_file(tensors, path, metadata={"format": "pt"})
    make_dataset(folder / "data", num_train=num_prompts, num_eval=1, num_frames=FRAMES, size=SIDE)


def _config(folder: Path, *, num_samples: int, lengths: Lengths) -> Config:
    return config_from_values(
        {
            "model": str(folder / "model"),
            "data_path": str(folder / "data" / "train.json"),
            "prompt_template": str(folder / "model" / "prompt_template.txt"),
            "video_num_frames": FRAMES,
            "video_max_frames": FRAMES,
            "video_min_pixels": SIDE**2,
            "video_max_pixels": SIDE**2,
            "max_prompt_length": MAX_PROMPT,
            "engine": "vllm_colocated",
            "num_generations": num_samples,
            "max_response_length": lengths.most,
            "top_p": 1.0,
            "platform": "cpu",
            "run_dir": str(folder / "run"),
        }
    )


def _cut(group: RolloutGroup, lengths: Sequence[int]) -> RolloutGroup:
    """``group`` with responses of exactly these lengths."""
    rollouts = []
    for rollout, length in zip(group.rollouts, lengths, strict=True):
        assert len(rollout.token_ids) >= length and rollout.sampler_logprobs is not None
        cut = {"token_ids": rollout.token_ids[:length], "sampler_logprobs": rollout.sampler_logprobs[:length]}
        rollouts.append(dataclasses.replace(rollout, **cut))
    return dataclasses.replace(group, rollouts=tuple(rollouts))


def _counted(tensors: Iterator[tuple[str, Tensor]], num_bytes: list[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        num_bytes[0] += tensor.nbytes
        yield name, tensor
