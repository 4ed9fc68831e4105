"""The options of where responses come from and how they are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import (
    MOST_GB,
    MOST_GPUS,
    MOST_MINUTES,
    MOST_RESPONSES,
    MOST_SECONDS,
    MOST_TOKENS,
    MOST_TRIES,
    MOST_WEIGHT,
)
from megatron_ktr.config.words import Engine, FilterGroups, WeightTransfer

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
    num_generations: int = _option(8, "Responses per prompt (G)", low=1, high=MOST_RESPONSES)
    max_response_length: int = _option(768, "Longest response in tokens, end token included", low=1, high=MOST_TOKENS)
    temperature: float = _option(
        1.0, "Sampling temperature; log-probs everywhere are of logits / temperature", above=0, high=MOST_WEIGHT
    )
    top_p: float = _option(0.95, "Nucleus sampling: smallest set of tokens with this probability", above=0, high=1)
    top_k: int = _option(0, "Sample from the k most probable tokens; 0 = no limit", low=0, high=MOST_TOKENS)
    stop: tuple[str, ...] = _option((), "Strings that end a response; they stay in its text and its tokens")
    temporal_bonus: float = _option(
        0.0,
        "Extra reward of a correct response to a video whose group satisfies temporal_margin; 0 = none. Above 0, every "
        "prompt with a video is asked a second time, with its frames in random order; t_grpo has 0.3",
        low=0,
        high=MOST_WEIGHT,
    )
    temporal_margin: float = _option(
        0.8,
        "temporal_bonus is paid if the mean accuracy of a group is at least this factor of that on shuffled frames",
        low=0,
        high=MOST_WEIGHT,
    )
    temporal_responses: int | None = _option(
        None,
        "Responses to shuffled frames for temporal_bonus; none = half of num_generations",
        low=1,
        high=MOST_RESPONSES,
    )
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
        high=MOST_WEIGHT,
    )
    rollout_tensor_parallel_size: int = _option(
        1,
        "Ranks that share one colocated vLLM engine; may differ from tensor_model_parallel_size",
        low=1,
        high=MOST_GPUS,
    )
    rollout_memory_share: float = _option(
        0.5, "Share of a GPU's memory for a colocated vLLM engine while it is awake", above=0, high=1
    )
    rollout_kv_cache_gb: float = _option(
        0.25, "Key-value cache of a colocated vLLM engine on CPU, in 2^30 bytes", above=0, high=MOST_GB
    )
    rollout_max_num_seqs: int = _option(
        256, "Most responses a colocated vLLM engine decodes together", low=1, high=1_000_000
    )
    rollout_eager: bool = _option(False, "Colocated vLLM without compilation and CUDA graphs; always so on CPU")
    server_urls: tuple[str, ...] = _option((), "Addresses of vllm serve processes, e.g. http://node7:8000")
    server_max_requests: int = _option(
        64,
        "Requests in flight per server and replica; one request is a prompt with all its responses",
        low=1,
        high=100_000,
    )
    server_timeout_seconds: float = _option(
        600.0,
        "How long one request may take before its server is taken out and it is sent to another",
        above=0,
        high=MOST_SECONDS,
    )
    server_max_retries: int = _option(
        4, "Failures in a row that a server may have; one more and it is taken out", low=0, high=MOST_TRIES
    )
    server_wait_minutes: float = _option(
        10.0,
        "How long a run waits when no server is left, or none answers a request; then it saves the state before the "
        "step and ends",
        low=0,
        high=MOST_MINUTES,
    )
    server_token_env: str | None = _option(
        None, "Name of the environment variable that holds the servers' token (not the token itself)"
    )
    server_token_file: str | None = _option(None, "File that holds the servers' token, in one line")
    weight_transfer: WeightTransfer = _option(
        "auto", "How servers receive weights: NCCL, or safetensors in weight_directory; auto = NCCL on GPUs"
    )
    weight_directory: str | None = _option(
        None, "Directory that trainer and servers both see, for weight_transfer directory; none = inside run_dir"
    )
    in_flight_updates: bool = _option(
        False, "Servers take new weights without finishing running responses; mixed responses are counted"
    )
    filter_groups: FilterGroups = _option(
        "off",
        "Dynamic sampling: groups that teach nothing are replaced by those of further prompts. equal = reject a group "
        "whose values of filter_metric are all the same; range = also one whose mean is not between filter_low and "
        "filter_high",
    )
    filter_metric: str | None = _option(
        None,
        "The value of a response that filter_groups compares: reward (the sum of all parts), or the name of a part, "
        "e.g. accuracy; none = reward for equal, accuracy for range",
    )
    filter_low: float = _option(
        0.0, "The mean of a group must be above it (filter_groups range)", low=-MOST_WEIGHT, high=MOST_WEIGHT
    )
    filter_high: float = _option(
        1.0, "The mean of a group must be below it (filter_groups range)", low=-MOST_WEIGHT, high=MOST_WEIGHT
    )
    min_reward_spread: float = _option(
        0.0,
        "filter_groups also rejects a group whose largest and smallest value differ by less than this",
        low=0,
        high=MOST_WEIGHT,
    )
    filter_max_rounds: int = _option(
        3,
        "How often a step draws further prompts for rejected groups, each time at most prompts_per_step; then it goes "
        "on with the good groups there are",
        low=0,
        high=MOST_TRIES,
    )
    retire_above: float | None = _option(
        None,
        "Retire a record whose running accuracy is above this: it is passed over for retire_for epochs; none = never",
        low=0,
        high=MOST_WEIGHT,
    )
    retire_for: int = _option(1, "Epochs for which a retired record is passed over", low=1, high=1_000_000)
    retire_decay: float = _option(
        0.5,
        "Weight of earlier accuracies in the running accuracy of a record; 0 = only the last group counts",
        low=0,
        high=MOST_WEIGHT,
    )

    @property
    def num_shuffled(self) -> int:
        """Responses to shuffled frames for every prompt with a video; 0 where nothing is asked twice."""
        if not self.temporal_bonus:
            return 0
        return self.temporal_responses or max(1, self.num_generations // 2)
