"""From host memory to a device without waiting.

A copy from ordinary memory makes the host wait until it is done, and before that for the work the device has been
given. From pinned memory it takes its place behind that work, and the host goes on: hence whatever a pass needs is sent
by ``send``, never by ``.to``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; itself where it is there. torch keeps the pinned copy until the device has read it."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
