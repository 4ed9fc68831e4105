"""The options of a training run, section by section: names, types, defaults (the paper's algorithm) and meanings.

A field's name is its YAML key and, with dashes, its flag; Megatron's name wherever Megatron has the option. How values
are read is in ``load.py``, the rules between options in ``checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.data_section import DataSection as DataSection  # a section in a file of its own
from megatron_ktr.config.evaluation_section import EvaluationSection as EvaluationSection
from megatron_ktr.config.limits import MOST_LAYERS, MOST_SAMPLES, MOST_STEPS, MOST_THRESHOLD, MOST_WEIGHT
from megatron_ktr.config.objective_section import ObjectiveSection as ObjectiveSection
from megatron_ktr.config.parallel_section import ParallelSection as ParallelSection
from megatron_ktr.config.resilience_section import ResilienceSection as ResilienceSection
from megatron_ktr.config.reward_section import RewardSection as RewardSection
from megatron_ktr.config.rollout_section import HF_BATCH_RESPONSES as HF_BATCH_RESPONSES
from megatron_ktr.config.rollout_section import RolloutSection as RolloutSection
from megatron_ktr.config.trainer_section import TrainerSection as TrainerSection
from megatron_ktr.config.words import (
    LORA_TARGETS,
    AttentionImpl,
    DecayStyle,
    Fp8Format,
    Fp8Recipe,
    LoraExport,
    LoraTarget,
    ModelPart,
    OptimizerName,
    Precision,
    TokenStatisticsImpl,
    TransformerImpl,
)

MOST_LR = 1e6
"""No learning rate of any use; Adam divides it by 1 - beta, and cannot where that is no number of 32 bits."""


@dataclass(frozen=True)
class ModelSection:
    """Which model, in which precision, and which of its parts are trained."""

    model: str = _option("", "Hugging Face directory with config, weights, tokenizer and chat template; required")
    transformer_impl: TransformerImpl = _option(
        "auto", "Transformer layers: Transformer Engine, plain torch, or the first where it is installed on CUDA"
    )
    attention_impl: AttentionImpl = _option(
        "auto",
        "Shared-prefix attention: a loop in torch to compare with, prompt keys read once by all responses (merged), "
        "one variable-length flash call on CUDA, or Transformer Engine's; auto takes te where that has a fused kernel "
        "(docs/precision.md), else varlen on CUDA and merged on CPU",
    )
    token_statistics_impl: TokenStatisticsImpl = _option(
        "auto",
        "Vocabulary head: fused Triton kernels on CUDA, torch in tiles, or full logits to compare with; auto takes the "
        "first where it runs, else the second",
    )
    gradient_accumulation_fusion: bool | None = _option(
        None,
        "Add weight gradients straight to the fp32 gradient buffer. none: the vocabulary head's, and the language "
        "model's layers' where Transformer Engine or APEX's kernel is there; true: refuse where it is not; false: no",
    )
    params_dtype: Precision = _option("fp32", "Precision of weights and activations; --bf16 and --fp16 are short forms")
    fp8_format: Fp8Format | None = _option(
        None,
        "Linear layers of the language model in FP8 (Transformer Engine): hybrid has e5m2 gradients, which reach small "
        "advantages; e4m3 throughout suits block scales only; none = no FP8",
    )
    fp8_recipe: Fp8Recipe = _option(
        "tensorwise",
        "Scales of FP8: one per tensor, from its values or from earlier passes (delayed), or one per block: blockwise "
        "needs Hopper and CUDA 12.9, mxfp8 Blackwell",
    )
    fp8_param_gather: bool = _option(
        False, "Keep the weights of FP8 layers in FP8 and gather them so; the optimizer's fp32 copy stays exact"
    )
    first_last_layers_bf16: bool = _option(False, "Under FP8, keep the first and last language layers in BF16")
    num_layers_at_start_in_bf16: int = _option(1, "See first_last_layers_bf16", low=0, high=MOST_LAYERS)
    num_layers_at_end_in_bf16: int = _option(1, "See first_last_layers_bf16", low=0, high=MOST_LAYERS)
    fp8_vision: bool = _option(
        False, "The vision encoder's layers in FP8 too, its MLP (3420 in 3B and 7B) padded with zeros to what fits"
    )
    freeze: tuple[ModelPart, ...] = _option(
        (), "Parts that are not trained: the vision encoder without its merger, the merger, the language model"
    )
    offload_reference: bool = _option(
        False, "Keep the reference model in host memory, and on the device only for its pass"
    )
    lora_rank: int = _option(
        0,
        "Train adapters of this rank on the language model's layers, and nothing else; 0 = train the weights",
        low=0,
        high=100_000,
    )
    lora_alpha: float = _option(32.0, "Adapters are scaled by lora_alpha / lora_rank", above=0, high=MOST_WEIGHT)
    lora_targets: tuple[LoraTarget, ...] = _option(LORA_TARGETS, "Layers with adapters, by Megatron's names")
    lora_export: LoraExport = _option(
        "merged", "What a run ends with: the whole model with adapters merged into it, or adapters alone, as PEFT's"
    )


@dataclass(frozen=True)
class OptimizerSection:
    """Optimizer and learning-rate schedule."""

    optimizer: OptimizerName = _option("adam", "adam is AdamW; sgd has no momentum")
    lr: float = _option(2e-6, "Highest learning rate", above=0, high=MOST_LR)
    vision_lr: float | None = _option(
        None, "Highest learning rate of the vision encoder; none = lr", low=0, high=MOST_LR
    )
    min_lr: float = _option(0.0, "Learning rate at the end of the decay", low=0, high=MOST_LR)
    lr_decay_style: DecayStyle = _option("cosine", "Shape of the decay, which ends with the run")
    lr_warmup_steps: int = _option(0, "Steps of linear warm-up from 0", low=0, high=MOST_STEPS)
    lr_warmup_samples: int | None = _option(
        None,
        "In place of lr_warmup_steps: the schedule counts samples, the prompts or records of each optimizer step over "
        "all replicas, and warms up over so many of them",
        low=0,
        high=MOST_SAMPLES,
    )
    lr_decay_samples: int | None = _option(
        None,
        "Samples at which the decay ends and the learning rate is min_lr; the schedule counts samples then; none = "
        "those of the whole run",
        low=1,
        high=MOST_SAMPLES,
    )
    weight_decay: float = _option(
        0.01, "Decoupled weight decay; not on biases, on norms with weight_decay_norms", low=0, high=MOST_WEIGHT
    )
    weight_decay_norms: bool = _option(False, "Decay the weights of norms too, as the releases do")
    adam_beta1: float = _option(0.9, "Decay of the first moment", low=0, high=1)
    adam_beta2: float = _option(0.999, "Decay of the second moment", low=0, high=1)
    adam_eps: float = _option(1e-8, "Added to the denominator of Adam", above=0, high=MOST_WEIGHT)
    clip_grad: float = _option(5.0, "Gradient norm is clipped to this; 0 = never", low=0, high=MOST_THRESHOLD)
    grad_norm_skip_threshold: float | None = _option(
        None,
        "Take no optimizer step where the gradient norm, before clipping, is above this; the update is counted "
        "(skipped_updates) and its gradient dropped, the schedule stays where it is (megatron-core 0.19); none = never",
        above=0,
        high=MOST_THRESHOLD,
    )
    use_distributed_optimizer: bool = _option(True, "Split optimizer states over data-parallel ranks")
    offload_optimizer_states: bool = _option(
        False, "Keep Adam's moments in host memory, and on the device only for the optimizer's step"
    )
    offload_during_rollout: bool = _option(
        False,
        "While an engine on the training ranks' devices generates, free the gradient buffers and keep main weights and "
        "moments in host memory",
    )

    @property
    def counts_samples(self) -> bool:
        """Whether the learning-rate schedule counts samples, not optimizer steps."""
        return self.lr_warmup_samples is not None or self.lr_decay_samples is not None
