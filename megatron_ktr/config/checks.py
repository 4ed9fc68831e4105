"""Rules between options. A value that breaks a rule, or is not available yet, is refused with one sentence.

An option is accepted only once it works.

One kind of option is read by some objectives and passed over by the others: those of selection (``signals``, ``shift``
and so on), of clipping and of sampling. A comparison of algorithms changes one line of a run file, its objective, and
the other lines must stay valid. What is refused is an option that would change the meaning of another objective's run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config import (
    evaluation_rules,
    filter_rules,
    pipeline_split,
    policy_gradient_rules,
    reward_rules,
    schedule,
    second_prompt_rules,
    watch_rules,
)
from megatron_ktr.config.given import flag, given
from megatron_ktr.config.objective_registry import objective_entry, options_of_others
from megatron_ktr.config.sections import DataSection
from megatron_ktr.config.selection_rules import selection_problems
from megatron_ktr.errors import UserError
from megatron_ktr.stack import require_core_0_19
from megatron_ktr.web.address import Address, check_variable_name

if TYPE_CHECKING:
    from megatron_ktr.config import Config

ABSENT_OPTIONS = {
    "fp8": "use --fp8-format hybrid or e4m3, and --fp8-recipe",
    "fp8_param": "use --fp8-param-gather",
    "virtual_pipeline_model_parallel_size": "use --num-virtual-stages-per-pipeline-rank or "
    "--num-layers-per-virtual-pipeline-stage, as in Megatron",
    "micro_batch_size": "use --micro-batch-groups",
    "global_batch_size": "use --prompts-per-step",
    "train_iters": "use --train-steps",
    "max_steps": "use --train-steps",
    "num_train_epochs": "use --train-epochs",
    "group_size": "use --num-generations",
    "optimizer_cpu_offload": "use --offload-optimizer-states: moments wait on the host, the step is the device's",
    "optimizer_offload_fraction": "use --offload-optimizer-states, which moves all moments",
    "enable_cuda_graph": "a CUDA graph replays one shape, and packed sequences differ in theirs",
    "cuda_graph_impl": "a CUDA graph replays one shape, and packed sequences differ in theirs",
    "fine_grained_activation_offloading": "its host memory grows with every new number of packed rows (docs/log.md); "
    "use --recompute-granularity",
    "offload_modules": "its host memory grows with every new number of packed rows (docs/log.md); use "
    "--recompute-granularity",
    "cpu_offloading": "activations stay on the device (docs/log.md); use --recompute-granularity",
    "mlp_chunks_for_training": "use --mlp-chunks",
    "lora_dropout": "adapters have no dropout: scores and updates must see one and the same policy",
}
"""Options of related projects, and of later versions, that deserve a better answer than the nearest spelling."""


def check(config: Config) -> None:
    """Raises ``UserError`` with the first rule that ``config`` breaks."""
    training = (_objective, _optimizer, _parallel, _fp8, _frozen_models)
    sampling = (_rollout, second_prompt_rules.problems, reward_rules.problems, filter_rules.problems)
    for rules in (_required, _data, *sampling, evaluation_rules.problems, watch_rules.problems, *training):
        for problem in rules(config):
            raise UserError(problem)


def _required(config: Config) -> Iterator[str]:
    if not config.model.model:
        yield "--model is required: a Hugging Face directory with config, weights, tokenizer and chat template"
    if not config.trainer.run_dir:
        yield "--run-dir must not be empty"
    if config.trainer.train_steps is not None and config.trainer.train_epochs is not None:
        yield (
            "--train-steps and --train-epochs both say how long the run is: give one of them (none takes away what a "
            "file gives: --train-epochs none)"
        )
    objective_entry(config.objective.objective)  # raises if there is no such objective


def _data(config: Config) -> Iterator[str]:
    data, rollout = config.data, config.rollout
    objective = config.objective
    if objective.is_supervised:
        if not data.data_path:
            yield (
                f"--objective {objective.objective} needs --data-path, a JSON or JSONL file of questions with responses"
            )
    elif rollout.engine != "replay":
        if not data.data_path:
            yield f"--engine {rollout.engine} needs --data-path, a JSON or JSONL file of questions"
        if rollout.replay_path is not None:
            yield f"--replay-path is not read by --engine {rollout.engine}"
    else:
        if not rollout.replay_path:
            yield "--engine replay needs --replay-path, a JSONL of recorded rollouts"
        if data.data_path is not None:
            yield "--data-path is not read by --engine replay: the questions come with --replay-path"
        if data.record_store_dir is not None:
            yield "--record-store-dir is not read by --engine replay: recorded rollouts are kept in memory"
    if config.trainer.train_epochs is not None and any(source.weight is not None for source in data.sources):
        yield (
            "--train-epochs: files with weights have no common epoch: give --train-steps, or the files epochs in place "
            "of weights"
        )
    if data.chat_template is not None and config.model.lora_rank and config.model.lora_export == "adapter":
        yield (
            "--chat-template cannot be saved with --lora-export adapter, whose directory has no tokenizer: choose "
            "--lora-export merged"
        )
    yield from _length_buckets(config)
    yield from media_rules(data)


def _length_buckets(config: Config) -> Iterator[str]:
    data = config.data
    if not data.length_buckets:
        return
    if not config.objective.is_supervised:
        yield (
            f"--length-buckets: the lengths of the responses of --objective {config.objective.objective} are not known "
            "before they are sampled; it is for --objective sft"
        )
    if data.length_buckets == 1:
        yield "--length-buckets 1 sorts nothing: give at least 2, or 0"
    if not data.shuffle_data:
        yield "--length-buckets puts steps into a random order, which --no-shuffle-data forbids: leave out one of them"
    if len(data.sources) > 1:
        yield "--length-buckets sorts the records of one file, and --data-path mixes several: leave out one of them"


def media_rules(data: DataSection) -> Iterator[str]:
    """What is wrong with the options for frames and pixels."""
    for name in ("video_num_frames", "video_max_frames"):
        value = getattr(data, name)
        if value is not None and value % 2:
            yield f"{flag(name)} must be even (two frames make one temporal patch), got {value}"
    if data.video_num_frames is not None and data.video_num_frames > data.video_max_frames:
        yield f"--video-num-frames {data.video_num_frames} exceeds --video-max-frames {data.video_max_frames}"
    if data.frame_sampling == "fps" and data.video_num_frames is not None:
        yield "--video-num-frames is not read by --frame-sampling fps: leave out one of them"
    if data.frame_sampling in ("fixed", "resampled") and data.video_num_frames is None:
        yield f"--frame-sampling {data.frame_sampling} needs --video-num-frames"
    for kind, low, high in (
        ("video", data.video_min_pixels, data.video_max_pixels),
        ("image", data.image_min_pixels, data.image_max_pixels),
    ):
        if low > high:
            yield f"--{kind}-min-pixels {low} exceeds --{kind}-max-pixels {high}"


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    is_vllm = rollout.engine.startswith("vllm")
    if rollout.lag and rollout.engine not in ("hf", "vllm_server"):
        yield f"--lag 1 does not work with --engine {rollout.engine}: generation cannot run beside training there"
    if rollout.lag and config.objective.importance_sampling == "none":
        yield "--lag 1 samples from older weights: choose --importance-sampling token or sequence"
    yield from _offload_during_rollout(config)
    if rollout.engine == "vllm_server" and not rollout.server_urls:
        yield "--engine vllm_server needs --server-urls, the addresses of vllm serve processes"
    if rollout.server_token_env is not None:  # somebody may have given the token itself
        check_variable_name(rollout.server_token_env, option="--server-token-env")
    if rollout.server_token_env is not None and rollout.server_token_file is not None:
        yield "--server-token-env and --server-token-file both give the servers' token: leave out one of them"
    for url in rollout.server_urls:  # before anything could write down a password in one
        Address.read(url, option="--server-urls", key_option="--server-token-env")
    if rollout.server_urls and rollout.engine != "vllm_server":
        yield f"--server-urls is not read by --engine {rollout.engine}"
    if rollout.share_vision_features and not is_vllm:
        yield f"--share-vision-features is not read by --engine {rollout.engine}"
    if rollout.rollout_tensor_parallel_size > 1 and rollout.engine != "vllm_colocated":
        yield f"--rollout-tensor-parallel-size is not read by --engine {rollout.engine}"
    if is_vllm and rollout.temperature != 1 and (rollout.top_p < 1 or rollout.top_k):
        # vLLM's raw log-probs ignore the temperature, and its processed ones are renormalised over the nucleus.
        yield "vLLM's log-probs are exact with --temperature 1, or with --top-p 1 --top-k 0, not with both changed"


def _offload_during_rollout(config: Config) -> Iterator[str]:
    if not config.optimizer.offload_during_rollout:
        return
    engine = config.rollout.engine
    if config.objective.is_supervised:
        yield f"--offload-during-rollout: --objective {config.objective.objective} generates nothing"
    elif engine not in ("hf", "vllm_colocated"):
        yield f"--offload-during-rollout: --engine {engine} generates nothing on the training ranks' devices"
    if config.rollout.lag:
        yield (
            "--offload-during-rollout needs --lag 0: with --lag 1 responses are sampled while the ranks train, which "
            "needs gradients and optimizer state on the device"
        )


def _objective(config: Config) -> Iterator[str]:
    section = config.objective
    yield from selection_problems(section)
    for rule in objective_entry(section.objective).rules:
        yield from rule(section, config.rollout)
    for name in given(section, options_of_others(section.objective), objective=section.objective):
        yield f"{flag(name)} is not read by --objective {section.objective}"
    mask = section.importance_mask
    if mask and (len(mask) != 2 or not 0 <= mask[0] < 1 < mask[1]):
        yield f"--importance-mask needs two bounds below and above 1, got {','.join(f'{value:g}' for value in mask)}"
    for name in ("substitute_video", "substitute_image"):
        if getattr(config.data, name) is not None and not section.original_compat:
            yield (f"{flag(name)} needs --original-compat: it trains on questions beside media that are not theirs")
    if section.is_supervised and config.rollout.temperature != 1.0:
        yield f"--temperature must be 1 for --objective {section.objective}: the likelihood of given responses has none"
    if section.scoring_precision == "bf16" and config.model.params_dtype == "fp16":
        yield "--scoring-precision bf16 does not go with --fp16: its counterfactual passes are in FP16; leave it out"
    if {"vision", "merger", "language"} <= set(config.model.freeze):
        yield "--freeze vision,merger,language leaves nothing to train"
    yield from policy_gradient_rules.problems(config)


def _optimizer(config: Config) -> Iterator[str]:
    section = config.optimizer
    if section.min_lr > section.lr:
        yield f"--min-lr {section.min_lr:g} exceeds --lr {section.lr:g}"
    if section.optimizer == "sgd" and section.use_distributed_optimizer:
        yield "--optimizer sgd has no state to split over ranks: add --no-use-distributed-optimizer"
    saves = {"--save-interval": config.trainer.save_interval, "--keep-best": config.evaluation.keep_best}
    if section.optimizer == "sgd" and config.model.params_dtype != "fp32":
        for option in (option for option, value in saves.items() if value):
            yield f"{option} with --optimizer sgd needs --params-dtype fp32: its fp32 copies are not saved"
    if section.optimizer == "sgd" and section.offload_optimizer_states:
        yield "--offload-optimizer-states: --optimizer sgd has none"
    if section.grad_norm_skip_threshold is not None:
        require_core_0_19("--grad-norm-skip-threshold")
    if max(section.adam_beta1, section.adam_beta2) >= 1:
        yield "--adam-beta1 and --adam-beta2 must be below 1"
    yield from schedule.problems(config)


def _parallel(config: Config) -> Iterator[str]:
    section = config.parallel
    if config.trainer.max_tokens_per_microbatch is not None and config.trainer.micro_batch_groups > 1:
        yield "--max-tokens-per-microbatch takes the place of --micro-batch-groups: give one of them"
    if section.sequence_parallel and section.tensor_model_parallel_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1"
    if section.num_layers_per_virtual_pipeline_stage is not None and section.pipeline_model_parallel_size == 1:
        yield "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1"
    yield from pipeline_split.problems(section)
    if section.overlap_param_gather and not config.optimizer.use_distributed_optimizer:
        yield "--overlap-param-gather needs --use-distributed-optimizer"
    if section.overlap_param_gather and not section.overlap_grad_reduce:
        yield "--overlap-param-gather needs --overlap-grad-reduce"
    details = section.recompute_method is not None or section.recompute_num_layers is not None
    if section.recompute_granularity == "full":
        if section.recompute_method is None or section.recompute_num_layers is None:
            yield "--recompute-granularity full needs --recompute-method and --recompute-num-layers"
    elif details:
        yield "--recompute-method and --recompute-num-layers need --recompute-granularity full"
    if section.recompute_granularity == "selective" and not section.recompute_modules:
        yield "--recompute-granularity selective needs --recompute-modules: some of core_attn, mlp, layernorm"
    if section.recompute_granularity != "selective" and section.recompute_modules != ("core_attn",):
        yield "--recompute-modules needs --recompute-granularity selective"
    yield from _mlp_chunks(config)
    if config.trainer.platform == "cpu" and config.model.transformer_impl == "te":
        yield "--transformer-impl te needs CUDA; with --platform cpu use auto or local"


def _mlp_chunks(config: Config) -> Iterator[str]:
    section = config.parallel
    if section.mlp_chunks == 1:
        return
    require_core_0_19("--mlp-chunks")
    if section.recompute_granularity == "selective" and "mlp" in section.recompute_modules:
        yield "--mlp-chunks does not go with --recompute-modules mlp, which runs all rows at once: choose one of them"
    for option, is_on in (
        ("--fp8-format", config.model.fp8_format is not None),
        ("--scoring-precision fp8", config.objective.scoring_precision == "fp8"),
    ):
        if is_on:
            yield f"--mlp-chunks does not go with {option}: each part would have scales and a number of rows of its own"


def _fp8(config: Config) -> Iterator[str]:
    model = config.model
    trains, scores = model.fp8_format is not None, config.objective.scoring_precision == "fp8"
    option = "--fp8-format" if trains else "--scoring-precision fp8"
    if not trains:
        for name in ("fp8_param_gather", "first_last_layers_bf16", "fp8_vision"):
            if getattr(model, name) and not (scores and name == "first_last_layers_bf16"):
                yield f"{flag(name)} needs --fp8-format"
    if not (trains or scores):
        return
    if config.trainer.platform == "cpu":
        yield f"{option} runs on a GPU only: FP8 products are Transformer Engine's, and --platform is cpu"
    if model.transformer_impl == "local":
        yield f"{option} needs Transformer Engine: use --transformer-impl te or auto"
    if model.params_dtype != "bf16":
        yield f"{option} needs --bf16: what is not in FP8 runs in BF16"
    if model.fp8_recipe == "delayed" and model.first_last_layers_bf16:
        yield "--first-last-layers-bf16 does not go with --fp8-recipe delayed: its scales are kept over all layers"
    if model.fp8_recipe == "delayed" and scores and not trains:
        yield (
            "--scoring-precision fp8 with --fp8-recipe delayed needs --fp8-format: its scales come from training "
            "passes in FP8"
        )
    if model.fp8_param_gather and not config.optimizer.use_distributed_optimizer:
        yield "--fp8-param-gather needs --use-distributed-optimizer, which keeps the exact weights"
    if model.fp8_param_gather and model.fp8_recipe == "mxfp8":
        yield "--fp8-param-gather is not available with --fp8-recipe mxfp8"
    if model.fp8_param_gather and config.objective.scoring_precision == "bf16":
        yield "--scoring-precision bf16 does not go with --fp8-param-gather, which leaves no weights in BF16"
    if model.fp8_vision and config.parallel.vision_parallel != "tensor":
        yield "--fp8-vision needs --vision-parallel tensor"


def _frozen_models(config: Config) -> Iterator[str]:
    model = config.model
    if model.offload_reference and model.lora_rank:
        yield "--offload-reference: with --lora-rank the reference model is the policy itself, there is nothing to move"
    if model.offload_reference and model.fp8_param_gather:
        yield "--offload-reference does not go with --fp8-param-gather: weights kept in FP8 do not move"
    if not model.lora_rank:
        if model.lora_export == "adapter":
            yield "--lora-export adapter needs --lora-rank"
        return
    if not model.lora_targets:
        yield "--lora-targets must name at least one of linear_qkv, linear_proj, linear_fc1, linear_fc2"
    if model.freeze:
        yield "--freeze is not read with --lora-rank: everything but the adapters is frozen"
    if config.optimizer.vision_lr is not None:
        yield "--vision-lr is not read with --lora-rank: the vision encoder is frozen"
    if model.fp8_param_gather:
        yield "--fp8-param-gather does not go with --lora-rank: frozen weights would have no exact copy to merge into"
