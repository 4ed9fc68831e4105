"""Chooses one of vLLM's two model runners: every engine and server that we start uses the first.

By default vLLM 0.32 uses its second runner on GPUs but the first on CPU, where the second lacks Triton. The tests on
CPU would then check another program than the one that runs on GPUs. The runners differ as follows (0.32.0,
``vllm/v1/worker``):

- After sleep at level 2 the M-RoPE positions of the second runner are arbitrary. They are allocated while the model is
  loaded (``gpu/mm/rope.py``, ``gpu/model_runner.py``), thus in the memory pool "weights", which this level drops
  without a copy. A step writes only the rows of its tokens, but a CUDA graph also reads those of its padding. The first
  runner allocates the positions earlier, outside the pool (``gpu_model_runner.py``). The colocated engine sleeps at
  level 2 between rollouts, so the second runner is refused there.
- They draw random numbers differently. The first keeps a generator for each request; the second hashes seed, place and
  token (``gpu/sample/gumbel.py``). Each runner repeats its own responses from a seed, but not those of the other.
- The first draws for one response after the other, the second for all responses in one kernel. This is the cost of our
  choice.

By reading the code, the following is equal in both: log-probs of the sampled token (fp32, before or after temperature,
by ``logprobs_mode``), the order of temperature, top-k and top-p, features in place of pixels, prompt positions, the
reloading of weights and what it resets, weight transfer, and stop tokens (which the scheduler handles).
"""

from __future__ import annotations

import os
from typing import Any

from megatron_ktr.errors import UserError

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
"""The environment variable that selects vLLM's runner. vLLM reads it when an engine is configured. A value that the
user has set is kept."""


def choose_runner() -> None:
    """Selects the first runner. Call it before an engine is made, in the process that makes it."""
    os.environ.setdefault(VARIABLE, "0")


def require_first_runner(llm: Any) -> None:
    """Refuses the second runner for an engine that is going to sleep at level 2.

    Raises:
        UserError: the engine uses the second runner.
    """
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        raise UserError(
            f"{VARIABLE}={os.environ.get(VARIABLE, '')}: vLLM's second model runner loses the positions of images and "
            "videos when a colocated engine sleeps; unset it, or use --engine vllm_server"
        )


def runner_named_by(environment: dict[str, Any]) -> str:
    """The runner in words, from a server's ``vllm_env`` (in ``/server_info``), which omits unset variables."""
    value = environment.get(VARIABLE)
    return "vLLM's default" if value is None else "the second" if value else "the first"
