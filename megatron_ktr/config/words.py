"""The values that options may have, each written down once. Importing this module imports neither torch nor a model.

A ``Literal`` is the type of an option; the tuple beside it, where one is needed, has the same words in the same order.
The names of objectives are not here: each objective registers its own (``objective_registry.py``).
"""

from __future__ import annotations

from typing import Literal, get_args

# Model
TransformerImpl = Literal["auto", "te", "local"]
TRANSFORMER_IMPLS: tuple[TransformerImpl, ...] = get_args(TransformerImpl)
PrefixImpl = Literal["auto", "torch", "merged", "varlen"]
"""Implementations of shared-prefix attention in ``ops/prefix_attention.py``."""
PREFIX_IMPLS: tuple[PrefixImpl, ...] = get_args(PrefixImpl)
AttentionImpl = Literal["auto", "torch", "merged", "varlen", "te"]
"""The implementations of ``PrefixImpl``, or Transformer Engine's attention."""
TokenStatisticsImpl = Literal["auto", "triton", "chunked", "naive"]
TOKEN_STATISTICS_IMPLS: tuple[TokenStatisticsImpl, ...] = get_args(TokenStatisticsImpl)
Precision = Literal["fp32", "bf16", "fp16"]
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
ModelPart = Literal["vision", "merger", "language"]
"""What ``--freeze`` can keep from being trained."""
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
LoraExport = Literal["merged", "adapter"]

# Data
FrameRule = Literal["fps", "fixed", "resampled"]
"""Rules by which frames of a video are chosen (``data/media/sampling.py``)."""

# Rollout and reward
Engine = Literal["replay", "hf", "vllm_colocated", "vllm_server"]
WeightTransfer = Literal["auto", "nccl", "directory"]
FilterGroups = Literal["off", "equal", "range"]
"""Which groups of a step are replaced by further ones (``rollout/filtering.py``)."""
AnswerProtocol = Literal["official", "strict", "standard", "lenient"]
RewardErrorPolicy = Literal["stop", "zero", "skip_group"]

# Objective
SIGNALS = ("entropy", "visual", "temporal")
"""The signals of Video-KTR. Each signal registers its own name (``signal_registry.py``)."""
Selection = Literal["signals", "random", "complement", "all"]
"""Which tokens carry the loss: those that the signals select, or a control."""
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
SelectionRule = Literal["quantile", "rank"]
Scope = Literal["response", "prompt", "batch"]
"""The sets of tokens whose scores are compared (``attribution/scopes.py``)."""
Combine = Literal["union", "intersection", "weighted"]
TokenWeights = Literal["hard", "rank", "sigmoid", "softmax", "soft_mask"]
TOKEN_WEIGHTS: tuple[TokenWeights, ...] = get_args(TokenWeights)
Dependence = Literal["kl", "k3"]
AdvantageShaping = Literal["none", "dependence"]
Shift = Literal["signed", "absolute", "kl"]
SHIFTS: tuple[Shift, ...] = get_args(Shift)
ShuffleUnit = Literal["frame", "temporal_patch"]
SHUFFLE_UNITS: tuple[ShuffleUnit, ...] = get_args(ShuffleUnit)
PatchUnit = Literal["merged", "vit"]
"""What the view ``patches`` blackens as a whole (``attribution/views/patches.py``)."""
ScoringPrecision = Literal["same", "bf16", "fp8"]
ScoresDtype = Literal["fp32", "bf16"]
ImportanceLevel = Literal["none", "token", "sequence"]
IMPORTANCE_LEVELS: tuple[ImportanceLevel, ...] = get_args(ImportanceLevel)
LossAggregation = Literal["sequence", "token", "constant"]
LOSS_AGGREGATIONS: tuple[LossAggregation, ...] = get_args(LossAggregation)
AdvantageOver = Literal["responses", "tokens"]
KlKind = Literal["k1", "k2", "k3", "k3_plus", "full"]
KL_KINDS: tuple[KlKind, ...] = get_args(KlKind)
TokenSet = Literal["key", "all"]
"""The tokens that carry the policy gradient, or all tokens of the responses."""

# Optimizer, layout and run
OptimizerName = Literal["adam", "sgd"]
DecayStyle = Literal["cosine", "linear", "constant"]
RecomputeGranularity = Literal["full", "selective"]
RecomputeModule = Literal["core_attn", "mlp", "layernorm"]
RecomputeMethod = Literal["uniform", "block"]
VisionParallel = Literal["tensor", "frame"]
VISION_PARALLELS: tuple[VisionParallel, ...] = get_args(VisionParallel)
PlatformName = Literal["auto", "cpu", "cuda"]
PLATFORM_NAMES: tuple[PlatformName, ...] = get_args(PlatformName)
# Resilience
SaveFailure = Literal["stop", "continue"]
AlarmAction = Literal["warn", "stop"]
