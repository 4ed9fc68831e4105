"""Questions for the engines of evaluation, with random frames."""

from __future__ import annotations

import torch

from megatron_ktr.evaluation.engines.base import AnswerSampling, Question
from megatron_ktr.types import VisualInput

GREEDY = AnswerSampling(max_tokens=12, temperature=0.0, top_p=1.0)
DRAWN = AnswerSampling(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50)


def video(num_frames: int, *, height: int = 56, width: int = 56, seed: int = 0) -> VisualInput:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)
    return VisualInput("video", frames, (-(-num_frames // 2), height // 14, width // 14), seconds_per_grid=1.5)


def question(
    key: str,
    text: str = "which colour came first",
    *,
    media: tuple[VisualInput, ...] = (),
    sampling: AnswerSampling = GREEDY,
    system: str | None = None,
) -> Question:
    content = [*({"type": medium.kind} for medium in media), {"type": "text", "text": text}]
    record = {"messages": [{"role": "user", "content": content}], "system_text": system}
    return Question(key, record, media, sampling)
