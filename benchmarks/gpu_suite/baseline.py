"""The weak baseline of ``benchmarks/step/baseline.py`` on the platform's device, in bf16, with random weights.

The pinned file is written for the host: its tensors are made without a device. Here they are made on the device by
torch's default device, and weights in place on it; the step itself is the pinned one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from benchmarks.step.baseline import PAPER, WeakBaseline
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.types import RolloutGroup


class DeviceBaseline(WeakBaseline):
    """``step_on_device`` is one update on one prompt group with one video."""

    def __init__(self, config_dir: Path, *, platform: Platform) -> None:
        """``config_dir`` holds a ``config.json``; weights are random."""
        self.settings = PAPER
        self.device = platform.device
        config = AutoConfig.from_pretrained(config_dir)
        self.policy, self.reference = (self._random_model(config) for _ in range(2))
        self.policy.train().gradient_checkpointing_enable({"use_reentrant": False})
        self.reference.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=PAPER.learning_rate, weight_decay=PAPER.weight_decay
        )

    def _random_model(self, config: AutoConfig) -> HFModel:
        with torch.device(self.device):
            return HFModel._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")

    def step_on_device(self, group: RolloutGroup) -> float:
        """The loss. Frames are moved inside, as ours are."""
        (video,) = group.prompt.media
        video = dataclasses.replace(video, frames_FCHW=video.frames_FCHW.to(self.device))
        group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, media=(video,)))
        with torch.device(self.device):
            return self.step(group, torch.arange(len(video.frames_FCHW)).flip(0)).loss

    def _logprobs(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        # Quantiles are not defined for bf16.
        logprob_GR, entropy_GR = super()._logprobs(*arguments, **options)
        return logprob_GR.float(), entropy_GR.float()
