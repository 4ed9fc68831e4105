"""Copies tensors from host memory to a device without making the host wait.

When a tensor in ordinary memory is copied to a device, the host waits for all work queued on the device and then for
the copy. A copy from pinned memory is queued behind that work, and the host goes on at once. Hence everything that a
pass needs is sent by ``send``, never by ``.to``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the tensor itself if it is there already. torch keeps the pinned copy alive until the
    device has read it."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
