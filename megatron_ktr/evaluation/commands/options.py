"""The options of ``tools/evaluate.py`` that say what is asked and where results go, and what they mean together."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.config.limits import LARGEST_INTEGER
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.errors import UserError, number, whole
from megatron_ktr.evaluation.asking.scaling import MOST_FRAMES, MOST_VOTES, SPARSE_TO_DENSE, Voting
from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.engines.base import AnswerSampling
from megatron_ktr.evaluation.engines.build import EngineOptions
from megatron_ktr.evaluation.engines.build import add_arguments as add_engine_arguments
from megatron_ktr.evaluation.item import CONTROLS, Condition, Control
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES

DEFAULT_FRAMES = 32
DEFAULT_IMAGE_PIXELS = 1280 * 28 * 28
_PIXELS = whole(high=LARGEST_INTEGER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of an evaluation. None stands for what the benchmark or the engine says."""
    _add_questions(parser.add_argument_group("what is asked"))
    _add_changes(parser.add_argument_group("instead of what the benchmark says"))
    _add_output(parser.add_argument_group("output"))
    _add_media(parser.add_argument_group("reading of media"))
    add_engine_arguments(parser)


def _add_questions(group: Any) -> None:
    group.add_argument(
        "--benchmark",
        nargs="+",
        required=True,
        metavar="NAME[=PATH]|FILE",
        help="benchmarks, with commas or blanks between them; PATH is what you downloaded; FILE has records in the "
        "style of Video-R1",
    )
    group.add_argument("--benchmark-root", type=Path, metavar="DIR", help="the files of NAME lie in DIR/NAME")
    group.add_argument(
        "--media-root",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="where the videos lie (default: beside the benchmark's files)",
    )
    group.add_argument(
        "--frames", nargs="+", metavar="N,...", help=f"the most frames of a video, a column each ({DEFAULT_FRAMES})"
    )
    group.add_argument(
        "--control",
        nargs="+",
        default=["intact"],
        metavar="C,...",
        help=f"what the model sees, a column each: {', '.join(CONTROLS)} (intact)",
    )
    group.add_argument(
        "--votes",
        type=whole(low=2, high=MOST_VOTES),
        metavar="N",
        help="N answers to each question; the majority counts",
    )
    group.add_argument("--vote-temperature", type=number(above=0.0, high=2.0), help="of --votes (0.7)")
    group.add_argument("--vote-top-p", type=number(above=0.0, high=1.0), help="of --votes (1)")
    group.add_argument(
        "--test-time-scaling",
        choices=(SPARSE_TO_DENSE,),
        help="Video-RTS: 5 answers at 32 frames, and again at twice as many while they do not agree",
    )
    group.add_argument(
        "--limit", type=whole(), metavar="N", help="only N questions of each benchmark, chosen by --seed at random"
    )
    group.add_argument("--seed", type=whole(low=0, high=LARGEST_INTEGER), default=0, help="of all that is random (0)")


def _add_changes(group: Any) -> None:
    group.add_argument(
        "--prompt-template",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="wording of the questions: a file of tools/import_wording.py, one of your own, or a built-in name",
    )
    group.add_argument("--temperature", type=number(high=2.0))
    group.add_argument("--top-p", type=number(above=0.0, high=1.0))
    group.add_argument("--max-tokens", type=whole(), help="the longest response")
    group.add_argument("--frame-sampling", choices=("fps", "fixed", "resampled"), help="how frames are chosen")
    group.add_argument("--fps", type=number(above=0.0, high=1000.0), help="frames a second, by the rules with a rate")
    group.add_argument("--max-pixels", type=_PIXELS, help="of one frame of a video")
    group.add_argument(
        "--image-max-pixels", type=_PIXELS, default=DEFAULT_IMAGE_PIXELS, help=f"of an image ({DEFAULT_IMAGE_PIXELS})"
    )


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=Path, metavar="DIR", help="a new directory, or one of an evaluation to go on with")
    group.add_argument(
        "--protocol",
        choices=PROTOCOL_NAMES,
        default="official",
        help="whose figures come first; the others stand in the results too (official)",
    )
    group.add_argument("--paper", action="store_true", help="published figures beside ours")
    group.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    group.add_argument("--check", action="store_true", help="read and check all questions and media; needs no model")
    group.add_argument(
        "--retry-problems", action="store_true", help="ask again what could not be asked: videos that are there now"
    )


def _add_media(group: Any) -> None:
    group.add_argument(
        "--max-missing-share",
        type=number(high=1.0),
        default=0.05,
        help="the share of a benchmark's questions whose media may be missing and count as wrong (0.05)",
    )
    group.add_argument(
        "--data-workers",
        type=whole(low=0, high=256),
        help="processes that decode videos; 0: this process decodes (default: the cores but one, at most 16)",
    )
    group.add_argument(
        "--data-timeout-seconds",
        type=number(above=0.0, high=86400.0),
        default=300.0,
        help="a question whose media take longer counts as wrong (300)",
    )
    group.add_argument("--frame-cache-dir", type=Path, metavar="DIR", help="keeps resized frames for later evaluations")
    group.add_argument(
        "--frame-cache-gb", type=number(above=0.0, high=1e6), default=100.0, help="about the most that it takes (100)"
    )


def conditions_of(options: argparse.Namespace) -> list[Condition]:
    """Every control at every number of frames, with one kind of voting.

    Raises:
        UserError: a word is none of these, or options contradict each other.
    """
    scaling = "single"
    if options.votes is not None and options.test_time_scaling is not None:
        raise UserError("--votes and --test-time-scaling exclude each other: give two commands with the same --out")
    if options.votes is not None:
        scaling = f"votes:{options.votes}"
    elif options.test_time_scaling is not None:
        scaling = options.test_time_scaling
    if options.votes is None and (options.vote_temperature is not None or options.vote_top_p is not None):
        raise UserError("--vote-temperature and --vote-top-p are about --votes, which is not given")
    if scaling != "single" and (options.temperature is not None or options.top_p is not None):
        others = "--vote-temperature and --vote-top-p" if options.votes is not None else "its own ones"
        raise UserError(f"--temperature and --top-p are about single answers; {scaling} has {others}")
    default = MOST_FRAMES if scaling == SPARSE_TO_DENSE else DEFAULT_FRAMES
    frames = [_frames(word) for word in _words(options.frames or [str(default)])]
    known: dict[str, Control] = {control: control for control in CONTROLS}
    controls = _words(options.control)
    for word in controls:
        if word not in known:
            raise UserError(f"--control {word!r}: expected {', '.join(CONTROLS)}")
    found = [Condition(number, known[word], scaling) for number in frames for word in controls]
    if not found:
        raise UserError("--frames and --control: expected at least one value each")
    return list(dict.fromkeys(found))


def voting_of(options: argparse.Namespace) -> Voting:
    given = {"temperature": options.vote_temperature, "top_p": options.vote_top_p}
    return Voting(**{name: value for name, value in given.items() if value is not None})


def sampling_for(sampling: AnswerSampling, options: argparse.Namespace) -> AnswerSampling:
    """The benchmark's sampling with what the options change."""
    return _changed(sampling, {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")})


def frames_for(rule: FrameRule, options: argparse.Namespace) -> FrameRule:
    """The benchmark's frames with what the options change.

    Raises:
        UserError: a rate is given for a rule that has none.
    """
    changed = _changed(rule, {"rule": options.frame_sampling, "fps": options.fps, "max_pixels": options.max_pixels})
    if options.fps is not None and (changed.rule == "fixed" or options.test_time_scaling is not None):
        raise UserError("--fps has no meaning where the number of frames is fixed")
    return changed


def preprocess_for(options: argparse.Namespace, engine: EngineOptions) -> PreprocessSettings:
    """Sizes of patches and frames: the model's where it lies here, else Qwen2.5-VL's.

    Raises:
        UserError: the model's files are damaged, or a limit is less than one visual token.
    """
    if engine.directory is not None and Path(engine.directory).is_dir():
        return PreprocessSettings.from_model(engine.directory, image_max_pixels=options.image_max_pixels)
    least = min(PreprocessSettings.image_min_pixels, options.image_max_pixels)
    return PreprocessSettings(image_min_pixels=least, image_max_pixels=options.image_max_pixels)


def _changed(value: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(value, **{name: change for name, change in changes.items() if change is not None})


def _words(values: Sequence[str]) -> list[str]:
    return [word.strip() for value in values for word in value.split(",") if word.strip()]


def _frames(word: str) -> int:
    try:
        return whole(low=2, high=4096, even=True)(word)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--frames: {error}: two frames make one temporal patch") from None
