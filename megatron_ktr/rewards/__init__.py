"""Rewards: what a response is worth. A reward is a built-in name or the user's ``module:function``; the weighted sum of
the values of all parts is the reward of a response.

    registry.py   the built-in rewards (``parts/``, one file each), and how a name becomes a ``Reward``
    plug_in.py    the ways in which a user's function may be written; ``inputs.py``: what it sees
    rewarder.py   computes all parts of a group; ``pool.py`` runs users' functions in processes (``worker.py``)
    protocols.py  how an answer is found and judged (``accuracy.py``); evaluation judges with the same functions
"""

from __future__ import annotations

from megatron_ktr.rewards.inputs import RewardInput, RewardMedium
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.registry import DEFAULT_REWARDS, load_reward, load_rewards, reads_problem_type, reads_solution
from megatron_ktr.rewards.rewarder import Rewarder

__all__ = [
    "DEFAULT_REWARDS",
    "RewardInput",
    "RewardMedium",
    "RewardOptions",
    "Rewarder",
    "load_reward",
    "load_rewards",
    "reads_problem_type",
    "reads_solution",
]
