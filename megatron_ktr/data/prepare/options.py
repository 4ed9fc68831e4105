"""The options of ``validate``, ``preview`` and ``stats`` that say how training will read the file.

They have the names, defaults and limits of training's (``config/data_section.py``), and make the same loader.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_ktr.config import OPTIONS
from megatron_ktr.config.checks import media_rules
from megatron_ktr.config.cli import convert, show_value
from megatron_ktr.config.sections import DataSection
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import PreprocessSettings, pixel_limits
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError

OF_PROMPTS = (
    "problem_types",
    "ignore_fields",
    "prompt_template",
    "chat_template",
    "max_prompt_length",
    "frame_sampling",
    "video_fps",
    "video_num_frames",
    "video_max_frames",
    "video_min_pixels",
    "video_max_pixels",
    "video_total_pixels",
    "image_min_pixels",
    "image_max_pixels",
)
"""The options of ``DataSection`` that shape a prompt, or choose the records."""
OF_RUNS = (
    "data_path",
    "media_root",
    "shuffle_data",
    "length_buckets",
    "record_store_dir",
    "max_skip_share",
    "media_cache_gb",
    "frame_cache_dir",
    "frame_cache_gb",
    "data_workers",
    "prefetch_steps",
    "data_timeout_seconds",
    "data_worker_memory_gb",
    "substitute_video",
    "substitute_image",
)
"""The others. The file and its media root are given in other words here; media are never substituted, because this is
to find the ones that would have to be."""

Purpose = Literal["rl", "sft", "replay"]


@dataclass(frozen=True)
class ReadingOptions:
    """How training will read a file."""

    file: Path
    media_root: Path
    data: DataSection
    model: Path | None
    purpose: Purpose
    reward_functions: tuple[str, ...]


def add_reading_options(parser: argparse.ArgumentParser, *, model_is_required: bool = False) -> None:
    """Adds the question file and the options of ``ReadingOptions``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="question file: a JSON array, or JSONL")
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="directory of the media (default: the directory of FILE)"
    )
    what = "whose tokenizer and sizes make the prompts"
    parser.add_argument(
        "--model", type=Path, metavar="DIR", required=model_is_required, help=f"Hugging Face directory {what}"
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=get_args(Purpose),
        default="rl",
        help="what the file is for: questions to answer (rl, the default), responses to imitate (sft), or recorded "
        "rollouts (replay)",
    )
    reward = OPTIONS["reward_functions"]
    parser.add_argument(
        "--reward-functions", metavar="TEXT[,...]", help=f"of --for rl, as in training: {reward.doc}".replace("%", "%%")
    )
    group = parser.add_argument_group("how training will read it", "the options of training, with its defaults")
    for name in OF_PROMPTS:
        option = OPTIONS[name]
        metavar = {str: "TEXT", int: "N", float: "X"}[option.kind] + ("[,...]" if option.is_list else "")
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else metavar
        text = f"{option.doc} (default: {show_value(option.default)})".replace("%", "%%")
        group.add_argument(
            option.flag, dest=name, metavar=metavar, help=text, action="append" if option.is_list else "store"
        )


def read_reading_options(options: argparse.Namespace) -> ReadingOptions:
    """The options of a command line, checked.

    Raises:
        UserError: an option has a wrong value, or contradicts another; a directory is not there.
    """
    values: dict[str, Any] = {}
    for name in OF_PROMPTS:
        given = getattr(options, name)
        if given is not None:
            values[name] = convert(OPTIONS[name], ",".join(given) if isinstance(given, list) else given, source="flags")
    data = DataSection(**values)
    for problem in media_rules(data):
        raise UserError(problem)
    if options.reward_functions is not None and options.purpose != "rl":
        raise UserError(f"--reward-functions is not read with --for {options.purpose}: nothing is rewarded there")
    rewards = convert(OPTIONS["reward_functions"], options.reward_functions or "", source="flags")
    media_root = options.media_root or options.file.parent
    if not media_root.is_dir():
        raise UserError(f"--media-root {media_root} is not a directory")
    if options.model is not None and not options.model.is_dir():
        raise UserError(f"--model {options.model} is not a directory")
    if data.chat_template is not None and options.model is None:
        raise UserError("--chat-template needs --model, whose chat format it replaces")
    return ReadingOptions(options.file, media_root, data, options.model, options.purpose, rewards)


def build_loader(reading: ReadingOptions) -> PromptLoader:
    """The loader that training makes of these options. Without a model it has Qwen2.5-VL's sizes and a stand-in for a
    tokenizer that knows no word: such a loader can check texts, but not count their tokens."""
    sampling = FrameSampling(
        fps=reading.data.video_fps,
        num_frames=reading.data.video_num_frames,
        max_frames=reading.data.video_max_frames,
        rule=reading.data.frame_sampling,
    )
    limits: dict[str, Any] = pixel_limits(reading.data)
    if reading.model is not None:
        tokenizer = load_tokenizer(reading.model, chat_template=reading.data.chat_template)
        return PromptLoader.from_model(
            reading.model,
            tokenizer=tokenizer,
            media_root=reading.media_root,
            sampling=sampling,
            prompt_template=reading.data.prompt_template,
            **limits,
        )
    builder = PromptBuilder(
        NoTokenizer(), visual_tokens=_QWEN_TOKENS, wording=WordingTemplate(reading.data.prompt_template)
    )
    return PromptLoader(
        builder, media_root=reading.media_root, settings=PreprocessSettings(**limits), sampling=sampling
    )


class NoTokenizer:
    """Stands in for a tokenizer where only the form of texts is checked. It has Qwen2.5-VL's chat format and end token,
    and gives no tokens at all."""

    chat_template = None
    all_special_tokens: Sequence[str] = ()
    added_tokens_decoder: Mapping[int, Any] = {}
    eos_token = "<|im_end|>"
    eos_token_id = 0
    unk_token_id = None

    def __len__(self) -> int:
        return 0

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        del text, add_special_tokens
        return {"input_ids": []}

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False):
        raise AssertionError("it has no chat template")

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        raise AssertionError("it has no tokens")

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise AssertionError("it has no tokens")

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        raise AssertionError("it has no tokens")

    def get_vocab(self) -> dict[str, int]:
        return {}


_QWEN_TOKENS = VisualTokens(
    vision_start="<|vision_start|>",
    vision_end="<|vision_end|>",
    image="<|image_pad|>",
    video="<|video_pad|>",
    image_id=0,
    video_id=1,
)
