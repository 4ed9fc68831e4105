"""Megatron-KTR: token-level selective reinforcement learning for video-reasoning models on Megatron-core."""

import sys
import warnings
from types import TracebackType

from megatron_ktr.distributed.nvidia_apex import hide_unusable_apex
from megatron_ktr.distributed.platform_import import import_core_eagerly
from megatron_ktr.distributed.wheel_cudnn import use_wheels_cudnn
from megatron_ktr.stack import silence_advice

# Before anything below this package, or transformers, imports megatron-core.
hide_unusable_apex()
# Before megatron-core imports Transformer Engine.
use_wheels_cudnn()
import_core_eagerly()
# On import and on every rank megatron-core advises on optional packages and torch on renamed collectives it calls; a
# run's console is for the run.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
# megatron-core's pipeline looks at .grad of activations it kept alive itself.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
# It reads checkpoints through torch in an older order of arguments, each rank by itself, into sharded tensors: 0.19 at
# every --resume.
warnings.filterwarnings("ignore", message="The argument order of load has been changed")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized, assuming")
warnings.filterwarnings("ignore", message="Please use DTensor instead and we are deprecating ShardedTensor")
silence_advice()


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of ctrl-C one word, also while modules are imported, before ``errors.run_cli`` is there."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        _hook_before(kind, error, trace)


_hook_before = sys.excepthook
sys.excepthook = _say_interrupted

__version__ = "0.1.0"
