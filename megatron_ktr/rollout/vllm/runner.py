"""Which of vLLM's two model runners an engine uses: the first, in every engine and server that we start.

vLLM 0.32 takes its second one on GPUs unless it is told otherwise, and never on CPU, where it lacks Triton. So what our
tests prove would be proven of another program than the one that runs. What they differ in (0.32.0, ``vllm/v1/worker``):

- After sleep at level 2 the second runner's M-RoPE positions hold whatever was in memory. They are made while the model
  is loaded (``gpu/mm/rope.py``, ``gpu/model_runner.py``), thus in the pool "weights", which that level drops without a
  copy; a step writes the rows of its tokens, and a CUDA graph reads those of its padding, too. The first runner makes
  them before (``gpu_model_runner.py``). The colocated engine sleeps at level 2 between rollouts: refused there.
- They draw random numbers differently: the first keeps a generator for each request, the second hashes seed, place and
  token (``gpu/sample/gumbel.py``). Each repeats its own responses from a seed, and gives others than the other one.
- The first draws for one response after the other, the second for all in one kernel. That is what the choice costs.

Equal in both, by reading: log-probs of the sampled token (fp32, before temperature or after, by ``logprobs_mode``), the
order of temperature, top-k and top-p, features in place of pixels, prompt positions, reloading of weights and what it
resets, weight transfer, stop tokens (the scheduler's).
"""

from __future__ import annotations

import os
from typing import Any

from megatron_ktr.errors import UserError

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's own switch, read when an engine is configured. A value the user has set stays."""


def choose_runner() -> None:
    """Call before an engine is made, in the process that makes it."""
    os.environ.setdefault(VARIABLE, "0")


def require_first_runner(llm: Any) -> None:
    """
    Raises:
        UserError: the engine, which is to sleep at level 2, runs the second.
    """
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        raise UserError(
            f"{VARIABLE}={os.environ.get(VARIABLE, '')}: vLLM's second model runner loses the positions of images and "
            "videos when a colocated engine sleeps; unset it, or use --engine vllm_server"
        )


def runner_named_by(environment: dict[str, Any]) -> str:
    """What a server's ``vllm_env`` (of ``/server_info``) says; it leaves out what is not set."""
    value = environment.get(VARIABLE)
    return "vLLM's default" if value is None else "the second" if value else "the first"
