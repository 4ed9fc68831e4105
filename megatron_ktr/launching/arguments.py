"""Checks torchrun's arguments, and prepares a run that may be restarted.

Such a run is one with ``--max-restarts`` above 0, or ``--nnodes MIN:MAX``. Its nodes meet by torch's c10d rendezvous
in place of the static one, because only that notices nodes that come and go.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import dataclass

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megatron_ktr.distributed.rendezvous import RENDEZVOUS_MINUTES
from megatron_ktr.errors import UserError

DEFAULT_PORT = 29500
READ_SECONDS = 20
"""How long a node waits for an answer of node 0 before it knows that it is cut off. It then ends its ranks, before the
other nodes, which notice after 15 seconds and wait for others for 30, have started theirs again."""
_TRAINING = ("megatron_ktr.train",)
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of all nodes meet, and how long they wait for each other there."""

    address: str
    port: int
    seconds: int
    is_host: bool
    """Whether this is node 0, which opens the port."""


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what torchrun would answer with a traceback, and sets how long nodes wait for each other."""
    try:
        config, _, _ = torchrun.config_from_args(arguments)
    except (ValueError, IndexError, AssertionError) as error:
        raise UserError(f"arguments of the launcher: {error} (see --help)") from error
    if config.min_nodes < 1 or config.nproc_per_node < 1:
        raise UserError(
            f"--nnodes and --nproc-per-node must be at least 1, got {arguments.nnodes} and {arguments.nproc_per_node}"
        )
    last = config.max_nodes - 1
    if arguments.rdzv_backend == "static" and (
        arguments.node_rank < 0 or (arguments.node_rank > last and not may_restart(arguments))
    ):
        raise UserError(f"--node-rank must be 0 .. {last} (--nnodes {arguments.nnodes}), got {arguments.node_rank}")
    port = arguments.master_port
    if port is not None and not 0 < port < 2**16:
        raise UserError(f"--master-port must be 1 .. 65535, got {port}")
    given = _rendezvous_settings(arguments)
    timeout = given.get("timeout", str(round(RENDEZVOUS_MINUTES * 60)))
    if not timeout.isdecimal() or int(timeout) < 1:
        raise UserError(f"--rdzv-conf timeout={timeout}: expected whole seconds of at least 1")
    if "timeout" not in given and arguments.rdzv_backend == "static":
        # torchrun's own default is 15 minutes.
        _add_setting(arguments, "timeout", timeout)


def may_restart(arguments: argparse.Namespace) -> bool:
    low, _, high = arguments.nnodes.partition(":")
    return arguments.max_restarts > 0 or bool(high and low != high)


def find_meeting(arguments: argparse.Namespace) -> Meeting | None:
    """None if torchrun takes a free port of this machine, or if the nodes meet elsewhere than at a port of node 0."""
    if arguments.standalone or arguments.rdzv_backend != "static":
        return None
    is_alone = arguments.nnodes in ("1", "1:1")
    if not arguments.rdzv_endpoint and arguments.master_port is None and is_alone:
        return None
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or DEFAULT_PORT}"
    address, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_PORT)
    seconds = int(_rendezvous_settings(arguments)["timeout"])
    return Meeting(address=address, port=port, seconds=seconds, is_host=arguments.node_rank == 0)


def prepare_restarts(arguments: argparse.Namespace, meeting: Meeting | None) -> None:
    """Changes ``arguments`` to those of a run that may be restarted, and says what was added to those of training."""
    if meeting is not None:
        arguments.rdzv_backend = "c10d"
        arguments.rdzv_endpoint = f"{meeting.address}:{meeting.port}"
        given = _rendezvous_settings(arguments)
        for name, value in (
            ("is_host", str(meeting.is_host).lower()),
            ("join_timeout", str(meeting.seconds)),
            ("read_timeout", str(READ_SECONDS)),
        ):
            if name not in given:
                _add_setting(arguments, name, value)
        if arguments.local_addr is None:
            # Ranks of other nodes find this node by its address; its name may mean something else to them.
            arguments.local_addr = _own_address(meeting)
        # torch's c10d rendezvous would warn of it.
        arguments.node_rank = 0
    flags = arguments.training_script_args
    if arguments.training_script in _TRAINING and not {"--resume", "--auto-resume"} & set(flags):
        flags.append("--auto-resume")
        if meeting is None or meeting.is_host:
            print("ranks may be restarted: training gets --auto-resume", file=sys.stderr, flush=True)


def set_flight_recorder() -> None:
    """Lets NCCL remember its last collectives, and write them when one takes too long, unless the user decides."""
    for name, value in _FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)


def _rendezvous_settings(arguments: argparse.Namespace) -> dict[str, str]:
    return dict(part.strip().partition("=")[::2] for part in arguments.rdzv_conf.split(",") if part.strip())


def _add_setting(arguments: argparse.Namespace, name: str, value: str) -> None:
    arguments.rdzv_conf = f"{arguments.rdzv_conf},{name}={value}".lstrip(",")


def _own_address(meeting: Meeting) -> str:
    """The address of this machine from which it reaches node 0. Nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(meeting.address, meeting.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]
