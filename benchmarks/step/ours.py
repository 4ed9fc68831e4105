"""Our side of ``run.py``: the product's Trainer and Policy on given groups, and models to run them on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig as HFConfig
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from benchmarks.step.baseline import PAPER, StepNumbers, StepSettings
from megatron_ktr.attribution.counterfactuals import draw_permutations
from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.random_groups import FixedSource, TokenIds
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.trainer import Trainer
from megatron_ktr.types import RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec

SEED = 0
"""Of the random orders, which both sides show."""


class OurStep:
    """Policy, reference model and optimizer on one rank; ``step`` is one update on one prompt group."""

    def __init__(
        self,
        policy_dir: Path,
        reference_dir: Path,
        *,
        ranks: ParallelGroups,
        platform: Platform,
        options: Mapping[str, Any],
        settings: StepSettings = PAPER,
    ) -> None:
        """``options``: of the training configuration, over the paper's."""
        config = config_from_values(
            {
                "model": str(policy_dir),
                "platform": platform.name,
                "prompts_per_step": 1,
                "lr": settings.learning_rate,
                "lr_decay_style": "constant",
                "weight_decay": settings.weight_decay,
                "clip_grad": settings.clip_grad,
                "selection_ratio": (settings.selection_ratio,),
                "kl_beta": settings.kl_beta,
                "length_bonus": 0.0,
                "seed": SEED,
                **options,
            }
        )
        policy = Policy(policy_dir, options=PolicyOptions.of(config), ranks=ranks, platform=platform, num_steps=1000)
        policy.add_reference(reference_dir)
        model_config = Qwen2_5_VLConfig.from_hf(policy_dir)
        self.source = FixedSource([])
        self.trainer = Trainer(
            options=StepOptions.of(config),
            policy=policy,
            source=self.source,
            objective=build_objective(config.objective, reward=config.reward),
            media=media_spec(model_config, patchify=PreprocessSettings().patchify),
        )

    def step(self, group: RolloutGroup, index: int) -> StepReport:
        """``index`` counts steps: it decides the order of the shuffled view."""
        self.source.groups = [group]
        return self.trainer.train_step(index)


def numbers_of(report: StepReport) -> StepNumbers:
    """What a baseline is compared by."""
    (responses,) = report.selections
    signals = responses[0].is_selected
    return StepNumbers(
        report.values["loss"],
        report.values["grad_norm"],
        torch.tensor([response.policy_logprobs for response in responses]),
        {name: torch.tensor([response.is_selected[name] for response in responses]) for name in signals},
    )


def frame_order(group: RolloutGroup, index: int) -> torch.Tensor:
    """The order our step ``index`` shows the frames in, for the other side."""
    (order,) = draw_permutations(group.prompt, unit="frame", seed=SEED, step=index)
    return order


def save_random_model(
    directory: Path, *, vocab_size: int, num_layers: int, hidden_size: int = 256, vision_size: int = 160, seed: int
) -> None:
    """A random model in Hugging Face format with the published models' proportions: MLPs of 5.25 x the width (vision
    2.67), heads of 64, 2 query heads a key head, one vision layer of four over whole frames.

    Weights are scaled by their fan-in, so that logits have deviation 1: distributions differ between tokens and models.
    """
    ids = _special_ids(vocab_size)
    config = HFConfig(
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 21 // 4,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 128,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=None,
        ),
        vision_config=dict(
            depth=4,
            hidden_size=vision_size,
            intermediate_size=vision_size * 8 // 3,
            num_heads=vision_size // 40,
            out_hidden_size=hidden_size,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=[3],
            tokens_per_second=2,
        ),
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=False,
    )
    model = HFModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                parameter.normal_(generator=generator).mul_(fan_in**-0.5)
    model.save_pretrained(directory)


def token_ids_of(hf_dir: Path) -> TokenIds:
    config = Qwen2_5_VLConfig.from_hf(hf_dir)
    return TokenIds(
        vocab_size=config.text.vocab_size,
        vision_start=config.vision_start_token_id,
        vision_end=config.vision_end_token_id,
        image=config.image_token_id,
        video=config.video_token_id,
    )


def _special_ids(vocab_size: int) -> TokenIds:
    return TokenIds(vocab_size, vocab_size - 4, vocab_size - 3, vocab_size - 2, vocab_size - 1)
