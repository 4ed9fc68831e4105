"""RMSNorm with the signature megatron-core's layer specs build norms with."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.distributed.nvidia_apex import fused_rms_norm
from megatron_ktr.distributed.platform import current


class RMSNorm(torch.nn.Module):
    """``y = weight * x / sqrt(mean(x**2, -1) + eps)``, statistics in fp32 (fp64 for fp64 inputs).

    As in Hugging Face's code, the normalised value is rounded to the input's dtype before the weight multiplies it.

    This class exists because megatron-core's wrapper around ``torch.nn.RMSNorm`` refuses sequence parallelism. Under
    sequence parallelism every tensor rank normalises its own tokens, so the weight carries the mark that makes
    ``finalize_model_grads`` sum its gradient over the tensor group.

    On a GPU with NVIDIA's apex and without Transformer Engine, one fused kernel computes the norm. It multiplies by
    the weight before it rounds, so that 16-bit results differ by one rounding.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused) -> None:
        """``_unused`` swallows megatron-core's options of other norms (``persist_layer_norm`` and the like)."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  # a mark that core reads
        self.fused = None if current().name == "cpu" else fused_rms_norm()

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None and x.dtype != torch.float64:
            return self.fused(x, self.weight, self.weight.shape, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def parameter_device(config: TransformerConfig) -> torch.device | None:
    """The device on which megatron-core's own layers create parameters.

    It is the platform's device; if ``use_cpu_initialization`` is set, it is None, which is the host or torch's default
    device.
    """
    return None if config.use_cpu_initialization else current().device
