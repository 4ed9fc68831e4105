"""A model directory on this machine: what asking it needs on the host, and the engine that runs it with Hugging Face's
``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.template import PromptBuilder, VisualTokens, check_vocabulary, load_tokenizer
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError, is_out_of_memory
from megatron_ktr.evaluation.engines.base import EngineFailed
from megatron_ktr.evaluation.engines.prompts import PromptMaker
from megatron_ktr.evaluation.engines.rollout import RolloutAnswers
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.sampling import SamplingSettings, end_token_ids
from megatron_ktr.types import Prompt, RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LocalModel:
    """The parts of a Qwen2.5-VL directory that do not compute."""

    directory: Path
    media: MediaSpec
    prompts: PromptMaker
    end_token_ids: tuple[int, ...]
    vocab_size: int

    @classmethod
    def read(cls, directory: Path | str, *, max_model_len: int | None = None) -> LocalModel:
        """Reads config, tokenizer and chat template; ``max_model_len`` shortens the model's own context.

        Raises:
            UserError: this is no directory of a Qwen2.5-VL, or the context would be longer than the model's own.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"--model: {directory} is no directory (a running server has a URL)")
        config = Qwen2_5_VLConfig.from_hf(directory)
        own_len = config.text.max_position_embeddings
        if max_model_len is not None and max_model_len > own_len:
            raise UserError(f"--max-model-len {max_model_len}: the context of the model has {own_len} tokens")
        tokenizer = load_tokenizer(directory)
        check_vocabulary(tokenizer, vocab_size=config.text.vocab_size)
        media = media_spec(config, patchify=PreprocessSettings.from_model(directory).patchify)
        builder = PromptBuilder(
            tokenizer, visual_tokens=VisualTokens.from_model(directory, tokenizer), merge_size=media.merge_size
        )
        return cls(
            directory=directory,
            media=media,
            prompts=PromptMaker(builder, max_model_len=max_model_len or own_len),
            end_token_ids=end_token_ids(directory, tokenizer),
            vocab_size=config.text.vocab_size,
        )


def hf_engine(model: LocalModel, *, dtype: str, batch_size: int, identity: Mapping[str, str]) -> RolloutAnswers:
    """The engine that answers ``batch_size`` questions together with Hugging Face's ``generate``, on one device.

    A batch for which memory does not suffice is halved, down to single questions.
    """
    current()
    engine = HFEngine(
        model.directory,
        tokenizer=model.prompts.builder.tokenizer,
        media=model.media,
        sampling=SamplingSettings(num_generations=1, max_response_length=1),
        dtype=DTYPES[dtype],
    )

    def sample(prompts: Sequence[Prompt], sampling: SamplingSettings) -> list[RolloutGroup]:
        try:
            return engine.generate(prompts, sampling=sampling)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
        # Outside of the handler, because the exception's traceback keeps the tensors of the attempt alive.
        current().empty_cache()
        if len(prompts) == 1:
            raise EngineFailed(f"memory does not suffice for this question alone: {problem}")
        half = len(prompts) // 2
        return sample(prompts[:half], sampling) + sample(prompts[half:], sampling)

    return RolloutAnswers(sample, prompts=model.prompts, capacity=batch_size, identity=identity, close=engine.close)
