"""Megatron-KTR: token-level selective reinforcement learning for video-reasoning models on Megatron-core."""

__version__ = "0.1.0"
