"""The engine that a command's options ask for.

    --model DIR                      vllm where it is installed, else hf: on this machine
    --model DIR --server-url URL     server if the server takes token ids, else chat
    --model URL, or --server-url URL and no DIR     chat

``--engine`` names one of the four instead.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megatron_ktr.errors import MOST_NUMBER, UserError, number, whole
from megatron_ktr.evaluation.engines.base import AnswerEngine, AnswerSampling
from megatron_ktr.evaluation.engines.chat import SENT, ChatAnswers, ChatSettings, ServerKind
from megatron_ktr.evaluation.engines.chat_messages import FrameFormat, FramesAs
from megatron_ktr.evaluation.engines.identity import model_identity
from megatron_ktr.rollout.vllm.sampling import TEMPERATURES
from megatron_ktr.web.address import Address, ApiKey, check_variable_name, is_url
from megatron_ktr.web.client import Patience

EngineName = Literal["auto", "vllm", "hf", "server", "chat"]
DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
_VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CONCURRENCY = {"vllm": 32, "hf": 8, "server": 32, "chat": 32}
_LOCAL, _REMOTE = ("vllm", "hf"), ("server", "chat")


@dataclass(frozen=True)
class EngineOptions:
    """What is asked, and how. Each option is refused with an engine that it does not concern."""

    model: str | None = None
    """A directory, or the URL of a server."""
    engine: EngineName = "auto"
    server_url: str | None = None
    served_model: str | None = None
    api_key_env: str | None = None
    """The NAME of the environment variable with the key."""
    server_kind: ServerKind = "auto"
    server_default: tuple[str, ...] = ()
    frames_as: FramesAs = "images"
    frame_format: FrameFormat = "jpeg"
    max_retries: int = 8
    request_timeout: float = 600.0
    concurrency: int | None = None
    """Questions that are open at a time; with vllm, in each data-parallel group."""
    dtype: DtypeName = "auto"
    """auto: bf16 on GPUs, fp32 on CPU."""
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int = 32768
    kv_cache_gb: float = 1.0
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if self.api_key_env is not None:
            check_variable_name(self.api_key_env)
        if unknown := [name for name in self.server_default if name not in SENT]:
            raise UserError(f"--server-default takes {', '.join(SENT)}, got {unknown[0]!r}")
        if self.model is not None and is_url(self.model) and self.server_url is not None:
            raise UserError("--model is a URL already: give it or --server-url, and the name by --served-model")
        if self.url is None and not self.model:
            raise UserError("--model: give the directory of a model, or the URL of a server")
        if self.url is not None:  # before anything could write down a URL with a password
            self.read_address()

    @property
    def url(self) -> str | None:
        return self.model if self.model is not None and is_url(self.model) else self.server_url

    def read_address(self) -> Address:
        """That of the server; only with a URL."""
        assert self.url is not None
        return Address.read(self.url, option="--model" if self.server_url is None else "--server-url")

    @property
    def directory(self) -> str | None:
        return None if self.model is None or is_url(self.model) else self.model


_CONCERNS: dict[str, tuple[str, ...]] = {
    "served_model": ("chat",),
    "api_key_env": _REMOTE,
    "server_kind": ("chat",),
    "server_default": ("chat",),
    "frames_as": ("chat",),
    "frame_format": ("chat",),
    "max_retries": _REMOTE,
    "request_timeout": _REMOTE,
    "dtype": _LOCAL,
    "max_model_len": (*_LOCAL, "server"),
    "tensor_parallel_size": ("vllm",),
    "data_parallel_size": ("vllm",),
    "gpu_memory_utilization": ("vllm",),
    "max_num_batched_tokens": ("vllm",),
    "kv_cache_gb": ("vllm",),
    "enforce_eager": ("vllm",),
}
"""Option -> engines. All others concern every engine."""


def choose_engine(options: EngineOptions) -> str:
    """The engine's name: "vllm", "hf", "server" or "chat"; "server" may still become "chat" (``build_engine``).

    Raises:
        UserError: an option does not concern this engine, or the engine lacks what it needs.
    """
    has_url = options.url is not None
    name: str = options.engine
    if name == "auto":
        name = _chosen_by_options(options)
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm needs vLLM: pip install '.[vllm]', or make setup-vllm on CPU; --engine hf does not"
        )
    if name in _REMOTE and not has_url:
        raise UserError(f"--engine {name} needs --server-url URL")
    if name in _LOCAL and has_url:
        raise UserError(f"--engine {name} runs a model here: it takes no URL")
    if name in ("server", *_LOCAL) and options.directory is None:
        raise UserError(f"--engine {name} needs --model DIR")
    if name == "chat" and options.directory is not None and options.served_model is not None:
        raise UserError("--served-model is the name of the model; --model would be another: give one of the two")
    for option, concerned in _CONCERNS.items():
        if name not in concerned and _is_set(options, option):
            raise UserError(f"--{option.replace('_', '-')} does not concern --engine {name}")
    return name


def _chosen_by_options(options: EngineOptions) -> str:
    if options.url is None:
        return "vllm" if importlib.util.find_spec("vllm") is not None else "hf"
    is_for_chat = any(_is_set(options, option) for option, engines in _CONCERNS.items() if engines == ("chat",))
    has_directory = options.directory is not None and Path(options.directory).is_dir()
    return "server" if has_directory and not is_for_chat else "chat"


def _is_set(options: EngineOptions, name: str) -> bool:
    (default,) = (option.default for option in fields(options) if option.name == name)
    return getattr(options, name) != default


def require_sampling(options: EngineOptions, sampling: AnswerSampling) -> None:
    """Refuses sampling that the engine cannot do as asked, before anything expensive.

    Raises:
        UserError: a value is out of range, or the engine would silently change it.
    """
    if sampling.max_tokens < 1 or not 0 <= sampling.temperature < float("inf"):
        raise UserError("expected at least one token and a temperature of 0 or more")
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or "" in sampling.stop:
        raise UserError("expected top-p above 0 and at most 1, top-k of 0 (all) or more, and stop strings with text")
    low, high = TEMPERATURES
    if (
        choose_engine(options) in ("vllm", "server")
        and sampling.temperature
        and not low <= sampling.temperature <= high
    ):
        raise UserError(f"temperature {sampling.temperature:g}: vLLM samples at {low} to {high}, or 0")


def build_engine(options: EngineOptions) -> AnswerEngine:
    """Starts the engine, and says on the console which it is.

    Raises:
        UserError: it cannot be started with these options.
    """
    name = choose_engine(options)
    concurrency = options.concurrency or _CONCURRENCY[name]
    patience = Patience(max_retries=options.max_retries, request_timeout=options.request_timeout)
    if name in _REMOTE:
        key = None if options.api_key_env is None else ApiKey.from_environment(options.api_key_env)
        address = options.read_address()
        if name == "server":
            engine = _server_engine(options, address, key=key, concurrency=concurrency, patience=patience)
            if engine is not None:
                return engine
        chat = ChatSettings(
            model=options.served_model or (options.directory if name == "chat" else None),
            kind=options.server_kind,
            frames_as=options.frames_as,
            frame_format=options.frame_format,
            server_defaults=options.server_default,
            concurrency=concurrency,
            patience=patience,
        )
        answers = ChatAnswers(address, chat, key=key)
        _say(f"chat server {address.api}, model {answers.identity['model']}, frames as {answers.identity['frames']}")
        return answers
    return _local_engine(options, name, concurrency=concurrency)


def _server_engine(
    options: EngineOptions, address: Address, *, key: ApiKey | None, concurrency: int, patience: Patience
) -> AnswerEngine | None:
    """The engine for token ids; None if the server is not of our kind and the choice was left open."""
    from megatron_ktr.evaluation.engines.local import LocalModel
    from megatron_ktr.evaluation.engines.served import NotOfOurKind, ServedAnswers

    assert options.directory is not None
    model = LocalModel.read(options.directory, max_model_len=options.max_model_len)
    try:
        engine = ServedAnswers(address, model, key=key, concurrency=concurrency, patience=patience)
    except NotOfOurKind as error:
        if options.engine != "auto" or options.max_model_len is not None:
            raise
        _say(str(error))
        return None
    _say(f"server {address.root}, with token ids and exact pixels")
    return engine


def _local_engine(options: EngineOptions, name: str, *, concurrency: int) -> AnswerEngine:
    from megatron_ktr.evaluation.engines.local import LocalModel, hf_engine

    assert options.directory is not None
    model = LocalModel.read(options.directory, max_model_len=options.max_model_len)
    dtype = options.dtype if options.dtype != "auto" else "bf16" if torch.accelerator.is_available() else "fp32"
    identity = {"engine": name, **model_identity(options.directory), "dtype": dtype}
    if options.max_model_len is not None:
        identity["max_model_len"] = str(options.max_model_len)
    if name == "hf":
        _say(f"Hugging Face's generate, {dtype}, batches of {concurrency}")
        return hf_engine(model, dtype=dtype, batch_size=concurrency, identity=identity)
    from megatron_ktr.evaluation.engines.vllm import OfflineAnswers
    from megatron_ktr.rollout.vllm.offline import OfflineSettings

    settings = OfflineSettings(
        model_dir=str(Path(options.directory).resolve()),
        max_model_len=model.prompts.max_model_len,
        dtype=_VLLM_DTYPES[dtype],
        tensor_parallel_size=options.tensor_parallel_size,
        data_parallel_size=options.data_parallel_size,
        max_num_seqs=concurrency,
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_bytes=round(options.kv_cache_gb * 2**30),
        is_eager=options.enforce_eager,
    )
    engine = OfflineAnswers(model, settings, identity=identity)
    _say(f"vLLM, {dtype}, {engine.num_groups} data-parallel groups of {options.tensor_parallel_size}")
    return engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``EngineOptions``."""
    group = parser.add_argument_group("the model and the engine that runs it")
    default = {option.name: option.default for option in fields(EngineOptions)}

    def add(name: str, help: str, **options: Any) -> None:
        group.add_argument(f"--{name.replace('_', '-')}", default=default[name], help=help, **options)

    add("model", "a model's directory, or the URL of a running server", metavar="DIR|URL")
    add("engine", "auto: vllm where it is installed, else hf; with a URL server or chat", choices=get_args(EngineName))
    add("server_url", "a running server, such as http://host:8000 or https://host/v1", metavar="URL")
    add("served_model", "the name under which a chat server has the model (default: its only one)", metavar="NAME")
    add("api_key_env", "NAME of the environment variable with the server's key", metavar="NAME")
    add("server_kind", "what a chat server is (auto: by its list of models)", choices=get_args(ServerKind))
    add(
        "server_default",
        f"settings that a chat server does not take and that are left to it: {', '.join(SENT)}",
        nargs="+",
        metavar="SETTING",
    )
    add("frames_as", "how frames travel to a chat server; video: vLLM alone", choices=get_args(FramesAs))
    add("frame_format", "format of the frames that travel; png loses nothing", choices=get_args(FrameFormat))
    add("max_retries", "how often a failed request is repeated", type=whole(low=0, high=100))
    add("request_timeout", "seconds for one attempt of a request", type=number(above=0.0, high=86400.0))
    add(
        "concurrency",
        "questions open at a time (default 32; hf: 8; vllm: 32 in each group)",
        type=whole(high=4096),
    )
    add("dtype", "precision of weights (auto: bf16 on GPUs, fp32 on CPU)", choices=get_args(DtypeName))
    add("max_model_len", "context in tokens, if less than the model's", type=whole(high=1 << 24))
    add("tensor_parallel_size", "vllm: GPUs of one group", type=whole(high=1024))
    add("data_parallel_size", "vllm: number of groups (default: all GPUs)", type=whole(high=1024))
    add("gpu_memory_utilization", "vllm: share of a GPU's memory", type=number(above=0.0, high=1.0))
    add("max_num_batched_tokens", "vllm: tokens of one step, and of the largest medium", type=whole(high=MOST_NUMBER))
    add("kv_cache_gb", "vllm on CPU: memory of keys and values", type=number(above=0.0, high=4096.0))
    group.add_argument("--enforce-eager", action="store_true", help="vllm: no CUDA graphs")


def options_of(arguments: argparse.Namespace) -> EngineOptions:
    """The options that a parser with ``add_arguments`` read."""
    values: dict[str, Any] = {option.name: getattr(arguments, option.name) for option in fields(EngineOptions)}
    values["server_default"] = tuple(values["server_default"])
    return EngineOptions(**values)


def _say(line: str) -> None:
    print(f"engine: {line}", flush=True)
