"""Lets torchvision be imported beside a CPU build of torch, in the vllm environment only."""

from __future__ import annotations

from megatron_ktr.files.hf_model import make_torchvision_importable as declare_torchvision_operators

__all__ = ["declare_torchvision_operators"]
