"""``rng.json``: the random states of every rank as plain data, so that reading them runs no code.

[{"python": [3, [624 numbers and the position], null], "numpy": ["MT19937", [624 numbers], 624, 0, 0.0],
  "torch": "<base64 of its bytes>", "device": "<…>", "tracker": {"model-parallel-rng": "<…>"}}, …]      by rank
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.files.safe_pickle import load_torch_object

RANDOM_STATES = "rng.json"
OLD_RANDOM_STATES = "rng.pt"
"""The file of older checkpoints, which have no checksums either: a ``torch.save`` of the list of states."""


def random_states_to_json(states: Sequence[dict[str, Any]]) -> str:
    """The text of ``rng.json``. ``states`` are the results of ``Platform.rng_state``, by rank."""
    return json.dumps([_plain(state) for state in states], separators=(",", ":")) + "\n"


def read_random_states(checkpoint: Path) -> list[dict[str, Any]]:
    """The states that ``Platform.set_rng_state`` takes, by rank.

    Raises:
        UserError: the file does not hold random states.
        OSError: the file cannot be read.
    """
    path = checkpoint / RANDOM_STATES
    try:
        if not path.exists() and (checkpoint / OLD_RANDOM_STATES).exists():
            path = checkpoint / OLD_RANDOM_STATES
            return _read_old(path)
        return [_state(plain) for plain in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not the random states of ranks: {type(error).__name__}") from None


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": _to_text(state["torch"]),
        "device": _to_text(state["device"]),
        "tracker": {name: _to_text(tensor) for name, tensor in state["tracker"].items()},
    }


def _state(plain: dict[str, Any]) -> dict[str, Any]:
    version, numbers, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    return {
        "python": (version, tuple(numbers), gauss),
        "numpy": (kind, numpy.array(keys, dtype=numpy.uint32), *rest),
        "torch": _from_text(plain["torch"]),
        "device": _from_text(plain["device"]),
        "tracker": {name: _from_text(text) for name, text in plain["tracker"].items()},
    }


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def _read_old(path: Path) -> list[dict[str, Any]]:
    # numpy's state is an array. Unpickling an array calls nothing but these functions of numpy.
    array_parts = [numpy.empty(0).__reduce__()[0], numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    with torch.serialization.safe_globals(array_parts):
        states = load_torch_object(path)
    if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
        raise TypeError
    return states
