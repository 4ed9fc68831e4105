"""The model of a dry run: its sizes, from its directory or from its published name, and its shapes on every stage."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.pipeline_split import split_layers
from megatron_ktr.config.sections import ModelSection
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.distributed.pretended import pretended_ranks
from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import require_intact
from megatron_ktr.files.listing import paths_in
from megatron_ktr.policy.policy import DTYPES
from megatron_ktr.run.preflight import check_patches
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.hf_weights import open_hf_weights
from models.qwen2_5_vl.model import build_model
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

_PUBLISHED_NAME = re.compile(r"qwen[-_.]?2[-_.]?5[-_.]?vl[-_.]?(\d+b)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class KnownModel:
    """What is known of the model that the run is to train."""

    config: Qwen2_5_VLConfig
    is_here: bool
    """Whether its directory is there, with config, tokenizer and preprocessor; its weights may be missing."""
    origin: str
    """Where the sizes are from, for the console."""
    not_checked: tuple[str, ...] = ()


def find_model(name: str) -> KnownModel:
    """The model of ``--model``. A directory that is not there is known by its name, if that contains the name of a
    published model, such as ``Qwen2.5-VL-7B-COT-SFT``.

    Raises:
        UserError: the directory is not there and its name is no published one, or training would refuse its files.
    """
    path = Path(name)
    if not path.exists():
        return _published(name)
    require_intact(path, option="--model", names=("config.json",))
    config = Qwen2_5_VLConfig.from_hf(path)
    check_patches(PreprocessSettings.from_model(path), config.vision)
    if paths_in(path, "*.safetensors"):
        open_hf_weights(path, config=config)
        return KnownModel(config, is_here=True, origin=str(path))
    missing = f"the weights of {path}, which are not there"
    return KnownModel(config, is_here=True, origin=f"{path}, without weights", not_checked=(missing,))


def _published(name: str) -> KnownModel:
    found = _PUBLISHED_NAME.search(Path(name).name)
    size = found[1].upper() if found else ""
    if size not in PUBLISHED_CONFIGS:
        raise UserError(
            f"--model {name} is not there, and a dry run knows the sizes of a missing model by its name alone, which "
            f"must be like Qwen2.5-VL-7B-Instruct with one of {', '.join(PUBLISHED_CONFIGS)}"
        )
    return KnownModel(
        PUBLISHED_CONFIGS[size],
        is_here=False,
        origin=f"published for Qwen2.5-VL-{size}, because {name} is not there",
        not_checked=(f"weights, tokenizer and preprocessor of {name}, which is not there",),
    )


def plain_layers(section: ModelSection) -> ModelSection:
    """The same model with layers that every machine can build: plain torch's, without FP8."""
    return dataclasses.replace(
        section,
        transformer_impl="local",
        attention_impl="auto",
        token_statistics_impl="auto",
        gradient_accumulation_fusion=None,
        fp8_format=None,
        fp8_param_gather=False,
        fp8_vision=False,
        first_last_layers_bf16=False,
    )


def parameters_by_stage(
    config: Qwen2_5_VLConfig, *, sizes: ParallelSizes, options: ModelOptions, platform: Platform
) -> list[int]:
    """The number of parameters that one rank of each pipeline stage holds, padding and tied copies included.

    The model is built as training builds it, but without values, on one rank of each stage (all tensor and context
    ranks of a stage have the same shapes). The layers are plain torch's: those of Transformer Engine have the same
    numbers under other names.
    """
    options = dataclasses.replace(options, model=plain_layers(options.model), uses_fp8=False)
    # Context ranks hold the same weights. So do stages in the middle with equally many layers: one of them is built.
    sizes = dataclasses.replace(sizes, context=1)
    split = split_layers(
        config.text.num_hidden_layers,
        pipeline=sizes.pipeline,
        virtual=sizes.virtual_pipeline or 1,
        options=options.parallel,
    )
    found: dict[tuple[bool, bool, tuple[int, ...]], int] = {}
    numbers = []
    for stage in range(sizes.pipeline):
        kind = (stage == 0, stage == sizes.pipeline - 1, split[stage])
        if kind not in found:
            with pretended_ranks(sizes, rank=stage * sizes.tensor, platform=platform) as ranks:
                chunks = build_model(
                    config, ranks=ranks, options=options, dtype=DTYPES[options.model.params_dtype], shapes_only=True
                )
                found[kind] = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
                del chunks
        numbers.append(found[kind])
    return numbers
