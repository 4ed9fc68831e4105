"""The options of a training run, section by section: names, types, defaults (the paper's algorithm) and meanings.

A field's name is its YAML key and, with dashes, its flag; Megatron's name wherever Megatron has the option. How values
are read is in ``load.py``, the rules between options in ``checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.data_section import DataSection as DataSection  # a section in a file of its own
from megatron_ktr.config.evaluation_section import EvaluationSection as EvaluationSection
from megatron_ktr.config.objective_registry import objective_choices, objective_entry
from megatron_ktr.config.parallel_section import ParallelSection as ParallelSection
from megatron_ktr.config.trainer_section import TrainerSection as TrainerSection
from megatron_ktr.config.words import (
    LORA_TARGETS,
    SIGNALS,
    AnswerProtocol,
    AttentionImpl,
    DecayStyle,
    Engine,
    Fp8Format,
    Fp8Recipe,
    ImportanceLevel,
    LoraExport,
    LoraTarget,
    LossAggregation,
    ModelPart,
    OptimizerName,
    Precision,
    ScoresDtype,
    ScoringPrecision,
    Shift,
    ShuffleUnit,
    Signal,
    TokenStatisticsImpl,
    TransformerImpl,
    WeightTransfer,
)


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
    num_layers_at_start_in_bf16: int = _option(1, "See first_last_layers_bf16", low=0)
    num_layers_at_end_in_bf16: int = _option(1, "See first_last_layers_bf16", low=0)
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
        0, "Train adapters of this rank on the language model's layers, and nothing else; 0 = train the weights", low=0
    )
    lora_alpha: float = _option(32.0, "Adapters are scaled by lora_alpha / lora_rank", above=0)
    lora_targets: tuple[LoraTarget, ...] = _option(LORA_TARGETS, "Layers with adapters, by Megatron's names")
    lora_export: LoraExport = _option(
        "merged", "What a run ends with: the whole model with adapters merged into it, or adapters alone, as PEFT's"
    )


HF_BATCH_RESPONSES = 256
"""Responses that ``--engine hf`` decodes together."""


@dataclass(frozen=True)
class RolloutSection:
    """Where responses come from and how they are sampled."""

    engine: Engine = _option(
        "replay",
        "Source of responses: recorded ones from replay_path, or sampled for the questions of data_path by "
        "transformers' generate (hf), by vLLM inside the training ranks, or by vLLM servers",
    )
    replay_path: str | None = _option(None, "JSONL of recorded rollouts: media, question, responses with rewards")
    num_generations: int = _option(8, "Responses per prompt (G)", low=1)
    max_response_length: int = _option(768, "Longest response in tokens, end token included", low=1)
    temperature: float = _option(1.0, "Sampling temperature; log-probs everywhere are of logits / temperature", above=0)
    top_p: float = _option(0.95, "Nucleus sampling: smallest set of tokens with this probability", above=0, high=1)
    top_k: int = _option(0, "Sample from the k most probable tokens; 0 = no limit", low=0)
    stop: tuple[str, ...] = _option((), "Strings that end a response; they stay in its text and its tokens")
    lag: int = _option(
        0,
        "1 = the next step's responses are sampled while this step trains, from weights one step older; needs "
        "importance_sampling, and an engine that does not share the ranks' devices (hf, vllm_server)",
        low=0,
        high=1,
    )
    share_vision_features: bool = _option(
        False, "vLLM receives the trainer's own vision features and runs no vision encoder"
    )
    check_sampler: bool = _option(
        True, "Before the first step, compare sampler and trainer log-probs on fixed prompts; stop if they differ"
    )
    sampler_gap_limit: float | None = _option(
        None,
        "Largest mean difference of sampler and trainer log-probs that check_sampler accepts, in nats; none = 1e-3 in "
        "fp32, 0.05 in 16 bits",
        above=0,
    )
    rollout_tensor_parallel_size: int = _option(
        1, "Ranks that share one colocated vLLM engine; may differ from tensor_model_parallel_size", low=1
    )
    rollout_memory_share: float = _option(
        0.5, "Share of a GPU's memory for a colocated vLLM engine while it is awake", above=0, high=1
    )
    rollout_kv_cache_gb: float = _option(
        0.25, "Key-value cache of a colocated vLLM engine on CPU, in 2^30 bytes", above=0
    )
    rollout_max_num_seqs: int = _option(256, "Most responses a colocated vLLM engine decodes together", low=1)
    rollout_eager: bool = _option(False, "Colocated vLLM without compilation and CUDA graphs; always so on CPU")
    server_urls: tuple[str, ...] = _option((), "Addresses of vllm serve processes, e.g. http://node7:8000")
    server_max_requests: int = _option(
        64, "Requests in flight per server and replica; one request is a prompt with all its responses", low=1
    )
    server_timeout_seconds: float = _option(
        600.0, "How long one request may take before its server is taken out and it is sent to another", above=0
    )
    server_max_retries: int = _option(
        4, "Failures in a row that a server may have; one more and it is taken out", low=0
    )
    weight_transfer: WeightTransfer = _option(
        "auto", "How servers receive weights: NCCL, or safetensors in weight_directory; auto = NCCL on GPUs"
    )
    weight_directory: str | None = _option(
        None, "Directory that trainer and servers both see, for weight_transfer directory; none = inside run_dir"
    )
    in_flight_updates: bool = _option(
        False, "Servers take new weights without finishing running responses; mixed responses are counted"
    )


@dataclass(frozen=True)
class RewardSection:
    """Reward of a response = sum of its named parts + length bonus."""

    reward_functions: tuple[str, ...] = _option(
        (),
        "Reward parts by name (accuracy, format; soft_choice: accuracy that pays in part for some of several right "
        "letters), or own ones as module:function; empty = accuracy and format; recorded rollouts keep theirs",
    )
    answer_protocol: AnswerProtocol = _option(
        "standard",
        "How the built-in rewards read and judge an answer: official = the verdicts of the Video-KTR release, slips "
        "included; strict = one answer block only; standard = the first block; lenient = the right answer however it "
        "is worded (docs/rewards.md)",
    )
    length_bonus: float = _option(
        0.2,
        "Added to a correct response of length_bonus_min..length_bonus_max tokens where more than one response of "
        "the group is correct; 0 = off",
        low=0,
    )
    length_bonus_min: int = _option(320, "Shortest response that gets the length bonus, in tokens", low=0)
    length_bonus_max: int = _option(512, "Longest response that gets the length bonus, in tokens", low=0)


@dataclass(frozen=True)
class ObjectiveSection:
    """What is optimised, and which tokens carry it."""

    objective: str = _option(
        "video_ktr",
        "Training objective (see the table below); t_grpo is not available yet",
        choices=objective_choices,
    )
    signals: tuple[Signal, ...] = _option(SIGNALS, "Signals whose selected tokens, together, are the key tokens")
    selection_ratio: tuple[float, ...] = _option(
        (0.2,), "Share of response tokens each signal selects: one for all, or one per signal", above=0, high=1
    )
    shift: Shift = _option(
        "signed",
        "Visual and temporal score: log-prob difference, its magnitude, or KL over the whole vocabulary",
    )
    shuffle_unit: ShuffleUnit = _option(
        "frame", "What the temporal counterfactual permutes: decoded frames, or pairs of frames already encoded"
    )
    num_shuffles: int = _option(1, "Random orders whose scores are averaged", low=1)
    scoring_precision: ScoringPrecision = _option(
        "same",
        "Products of the counterfactual passes: as in training, in bf16 (under an fp32 model, or one that trains in "
        "FP8), or in FP8 by fp8_recipe",
    )
    kl_beta: float = _option(0.04, "Weight of the KL term to the reference model; 0 = no reference model", low=0)
    clip_low: float = _option(0.2, "Probability ratio is clipped below at 1 - clip_low", low=0, high=1)
    clip_high: float = _option(0.2, "Probability ratio is clipped above at 1 + clip_high", low=0)
    updates_per_rollout: int = _option(1, "Optimizer steps on the same responses; clipping acts from 2 on", low=1)
    importance_sampling: ImportanceLevel = _option(
        "none",
        "Weigh each token's policy gradient by trainer / sampler probability, of the token or of its whole response, "
        "truncated at importance_cap",
    )
    importance_cap: float = _option(2.0, "Largest importance weight", above=0)
    importance_mask: tuple[float, ...] = _option(
        (), "Two bounds, e.g. 0.5,5: tokens whose trainer / sampler probability lies outside carry no loss; empty = off"
    )
    loss_aggregation: LossAggregation = _option(
        "sequence", "Mean over tokens then responses, or mean over all tokens of the global batch"
    )
    tw_alpha: float = _option(
        1.7, "tw_grpo: weight of the position where a group's responses differ most; where least, it is 1", low=1
    )
    tw_weight_gradient: bool = _option(
        False,
        "tw_grpo: let the gradient flow through the weights of positions too, as its release does; they are constants "
        "otherwise",
    )
    original_compat: bool = _option(
        False,
        "Do as the release of Video-KTR where we deviate: 1.0 s per temporal patch of every video in every pass, a "
        "signal whose scores are all equal selects all tokens, +inf is selected, length and length bonus count key "
        "tokens, a response without any makes the loss NaN (the step is skipped); see deviations.md",
    )
    scores_dtype: ScoresDtype = _option(
        "fp32",
        "With original_compat: bf16 rounds log-probs, entropies, scores and thresholds as the release's precision "
        "does, so that scores tie and more tokens are selected",
    )

    @property
    def is_supervised(self) -> bool:
        """Whether the responses are given in ``data_path``, so that nothing is sampled and nothing is rewarded."""
        return objective_entry(self.objective).is_supervised

    @property
    def fixed_seconds_per_grid(self) -> float | None:
        """The ``seconds_per_grid`` of every video in every pass, sampling included; None = each video's own value."""
        return 1.0 if self.original_compat else None

    @property
    def importance_bounds(self) -> tuple[float, float] | None:
        """``importance_mask`` as its two bounds; None = off."""
        if not self.importance_mask:
            return None
        low, high = self.importance_mask
        return low, high

    @property
    def ratio_of_signal(self) -> dict[str, float]:
        """The share of tokens that each signal selects. A single ``selection_ratio`` applies to every signal."""
        ratios = self.selection_ratio * (len(self.signals) if len(self.selection_ratio) == 1 else 1)
        return dict(zip(self.signals, ratios, strict=True))


@dataclass(frozen=True)
class OptimizerSection:
    """Optimizer and learning-rate schedule."""

    optimizer: OptimizerName = _option("adam", "adam is AdamW; sgd has no momentum")
    lr: float = _option(2e-6, "Highest learning rate", above=0)
    vision_lr: float | None = _option(None, "Highest learning rate of the vision encoder; none = lr", low=0)
    min_lr: float = _option(0.0, "Learning rate at the end of the decay", low=0)
    lr_decay_style: DecayStyle = _option("cosine", "Shape of the decay, which ends with the run")
    lr_warmup_steps: int = _option(0, "Steps of linear warm-up from 0", low=0)
    weight_decay: float = _option(
        0.01, "Decoupled weight decay; not on biases, on norms with weight_decay_norms", low=0
    )
    weight_decay_norms: bool = _option(False, "Decay the weights of norms too, as the releases do")
    adam_beta1: float = _option(0.9, "Decay of the first moment", low=0, high=1)
    adam_beta2: float = _option(0.999, "Decay of the second moment", low=0, high=1)
    adam_eps: float = _option(1e-8, "Added to the denominator of Adam", above=0)
    clip_grad: float = _option(5.0, "Gradient norm is clipped to this; 0 = never", low=0)
    grad_norm_skip_threshold: float | None = _option(
        None,
        "Take no optimizer step where the gradient norm, before clipping, is above this; the update is counted "
        "(skipped_updates) and its gradient dropped, the schedule stays where it is (megatron-core 0.19); none = never",
        above=0,
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
