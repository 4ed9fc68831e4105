"""``python -m megatron_ktr.rollout.server.serve MODEL --port N [...]``: ``vllm serve``, set up for training.

The options after the model are passed to vLLM, but for two of our own. Those set here are defaults, which the command
line overrides.

    --token-env NAME     the environment variable with the token without which nobody uses the server (``guard.py``)
    --token-file FILE    the file with the token

The server listens on 127.0.0.1. Another ``--host`` needs a token, because its routes change weights and run code. The
token is never a flag: everybody on the machine can read the flags of a process. For the same reason vLLM's --api-key is
refused; a key in VLLM_API_KEY is taken for the token.

The CPU build needs additional
preparation (``rollout/vllm/cpu.py`` says why), in the server and in its child processes. Each child process first
imports this module again, under the name ``__mp_main__``, and is prepared by that import.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_ktr.errors import UserError, run_cli
from megatron_ktr.files.checksums import require_intact
from megatron_ktr.files.hf_model import make_torchvision_importable
from megatron_ktr.rollout.server import guard
from megatron_ktr.rollout.vllm.cpu import set_environment
from megatron_ktr.rollout.vllm.runner import choose_runner
from megatron_ktr.web.address import is_loopback

TRAINING_FLAGS = {
    # vLLM itself listens on all addresses of the machine.
    "--host": "127.0.0.1",
    "--middleware": guard.PATH,
    # Opens the route that generates from token ids and the model's own inputs.
    "--enable-scale-out": None,
    # The pixels that arrive are normalised already.
    "--no-mm-device-do-normalize": None,
    # vLLM's own defaults: the generation config of published models sets a repetition penalty and more, which would
    # give another distribution than the trainer's.
    "--generation-config": "vllm",
    # Log-probs before top-p and top-k. Runs at a temperature other than 0 and 1 need processed_logprobs.
    "--logprobs-mode": "raw_logprobs",
}
GPU_FLAGS = {
    # Lets the server receive weights from GPU to GPU. An empty config selects NCCL, vLLM's default.
    "--weight-transfer-config": "{}",
}
CPU_FLAGS = {
    "--dtype": "float32",
    "--enforce-eager": None,
    "--kv-cache-memory-bytes": str(1 << 28),
    "--max-num-batched-tokens": "8192",
    # ``WHOLE_PROMPTS`` in rollout/vllm/cpu.py. vLLM asks for --max-model-len where the model's own exceeds the line
    # above.
    "--no-enable-chunked-prefill": None,
}


def split_token(argv: Sequence[str]) -> tuple[list[str], str]:
    """``argv`` without the options of the token, and the place of the token for ``guard.SOURCE``.

    Raises:
        UserError: an option has no value, or both are given.
    """
    rest, sources = [], []
    waiting = iter(argv)
    for argument in waiting:
        flag, sign, value = argument.partition("=")
        if flag not in (guard.ENV_OPTION, guard.FILE_OPTION):
            rest.append(argument)
            continue
        value = value if sign else next(waiting, "")
        if not value or value.startswith("--"):
            raise UserError(f"{flag} needs a value: the name of the place where the token is")
        sources.append(f"env {value}" if flag == guard.ENV_OPTION else f"file {os.path.abspath(value)}")
    if os.environ.get("VLLM_API_KEY") and "env VLLM_API_KEY" not in sources:
        sources.append("env VLLM_API_KEY")  # vLLM wants it, too, and a request carries one token
    if len(sources) > 1:
        raise UserError(
            f"the token is given twice: {guard.ENV_OPTION}, {guard.FILE_OPTION} or VLLM_API_KEY, one of them"
        )
    return rest, sources[0] if sources else ""


def early_options(argv: Sequence[str]) -> argparse.Namespace:
    """The options that ``check_reach`` looks at, as far as they are flags spelled out in ``argv``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--host", "--uds"):
        parser.add_argument(flag, nargs="?")
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--grpc-port", nargs="?")
    options, _ = parser.parse_known_args(
        [
            argument.replace("_", "-") if argument.startswith("--") and "=" not in argument else argument
            for argument in argv
        ]
    )
    options.middleware.append(guard.PATH)  # it is looked for among the parsed options
    return options


def check_reach(options: Any, *, has_token: bool) -> None:
    """Raises ``UserError`` if the parsed options of ``vllm serve`` would open the server to others without a token, or
    would show a secret.

    The parsed options are looked at, because a flag may be shortened and a file may hold options, too.
    """
    if options.api_key:
        raise UserError(
            "--api-key stands in the list of processes, and opens some routes only: give the token by "
            f"{guard.ENV_OPTION} NAME or {guard.FILE_OPTION} FILE"
        )
    if guard.PATH not in options.middleware:
        raise UserError(f"--middleware: add {guard.PATH}, which asks for the token")
    if options.grpc_port is not None or options.grpc:
        raise UserError("--grpc and --grpc-port open a port that no token protects")
    if options.uds is None and not has_token and not (options.host and is_loopback(options.host)):
        raise UserError(
            f"--host {options.host or 'of all addresses'} lets others change weights and run code here: add "
            f"{guard.ENV_OPTION} NAME or {guard.FILE_OPTION} FILE with a token, or leave out --host"
        )


def arguments(argv: Sequence[str], *, on_cpu: bool) -> list[str]:
    """The arguments of ``vllm serve``: ``argv``, followed by the defaults that it does not set."""
    if not argv or argv[0].startswith("-"):
        raise UserError("usage: python -m megatron_ktr.rollout.server.serve MODEL [--port N] [options of vllm serve]")
    given = {argument.split("=")[0].replace("_", "-") for argument in argv if argument.startswith("--")}
    found = list(argv)
    for flag, value in (TRAINING_FLAGS | (CPU_FLAGS if on_cpu else GPU_FLAGS)).items():
        opposite = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else flag.replace("--", "--no-", 1)
        if flag not in given and opposite not in given:
            found += [flag] if value is None else [flag, value]
    return found


def prepare(*, on_cpu: bool) -> None:
    """Sets up the process. Call it before vLLM is imported, in the server and in its child processes."""
    os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")
    choose_runner()
    if not on_cpu:
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    set_environment()
    # Otherwise the sampler's small functions are compiled to C++ on first use, which takes half a minute.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    make_torchvision_importable()
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    # Otherwise vLLM inspects the class in another child process, which does not import this module.
    ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)


def main() -> None:
    on_cpu = not torch.accelerator.is_available()
    given, source = split_token(sys.argv[1:])
    argv = ["serve", *arguments(given, on_cpu=on_cpu)]
    os.environ[guard.SOURCE] = source
    has_token = guard.read_token(source) is not None
    check_reach(early_options(argv), has_token=has_token)  # before vLLM is imported, as far as flags show it
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: make setup-vllm puts it in .venv-vllm")
    prepare(on_cpu=on_cpu)
    require_intact(argv[1], option="MODEL")
    # vLLM's own ``main`` cannot be used: it asks for the version of the package "vllm", and the CPU build has another
    # package name.
    from vllm.entrypoints.cli.serve import ServeSubcommand  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    options = parser.parse_args(argv)
    check_reach(options, has_token=has_token)
    command.validate(options)
    command.cmd(options)


if __name__ == "__mp_main__":
    prepare(on_cpu=not torch.accelerator.is_available())
if __name__ == "__main__":
    run_cli(main)
