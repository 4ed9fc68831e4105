"""The options of the data: questions, media, and what the model sees of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.data_sources import DataSource, parse_data_path, sources_of
from megatron_ktr.config.limits import MOST_FRAMES, MOST_GB, MOST_PIXELS, MOST_SECONDS, MOST_TOKENS
from megatron_ktr.config.words import FrameRule


@dataclass(frozen=True)
class DataSection:
    """Questions and their media. Media paths stay inside media_root."""

    data_path: str | tuple[DataSource, ...] | None = _option(
        None,
        "JSON or JSONL file of questions (Video-R1 records), or several with weights, a.jsonl:0.7,b.jsonl:0.3; in a "
        "run file a list of mappings with path, weight or epochs, name, media_root, prompt_template and "
        "reward_functions (docs/data_at_scale.md)",
        parse=parse_data_path,
    )
    media_root: str | None = _option(None, "Directory of the media; none = the directory of the questions' file")
    prompt_template: str | None = _option(
        None,
        "Wording of the prompt: a Jinja file, or our own words for the instructions of video_r1, video_ktr, tw_grpo, "
        "video_rts or video_holmes (docs/wording.md); none = think_answer, the built-in wording",
    )
    chat_template: str | None = _option(
        None, "Jinja file with the chat format in place of the model's own; saved with checkpoints and the export"
    )
    problem_types: tuple[str, ...] = _option((), "Keep only questions of these problem types; empty = all")
    shuffle_data: bool = _option(True, "Visit the questions in a new seeded order in every epoch")
    length_buckets: int = _option(
        0,
        "Supervised: the records of so many steps are sorted by length before they fill the steps, so that those of a "
        "step have nearly the same length; the order of the steps stays random; 0 = off",
        low=0,
        high=1_000_000,
    )
    ignore_fields: tuple[str, ...] = _option(
        (), "Fields of records that are only data here, although their names look like instructions (docs/records.md)"
    )
    record_store_dir: str | None = _option(
        None,
        "Directory of this machine for the records of question files, which all runs and ranks share there; none = the "
        "user's cache directory, for files of 8 MiB or more, and memory for smaller ones",
    )
    max_skip_share: float = _option(
        0.1,
        "Stop when more than this share is unusable: of the records, before the model is built, for what is known "
        "without decoding; then of the prompts drawn",
        low=0,
        high=1,
    )
    max_prompt_length: int = _option(
        16384, "Longest prompt in tokens; longer ones are skipped and counted", low=1, high=MOST_TOKENS
    )
    media_cache_gb: float = _option(
        0.5,
        "Resized media kept in memory between epochs on each reading rank, in 10^9 bytes; 0 = none",
        low=0,
        high=MOST_GB,
    )
    frame_cache_dir: str | None = _option(
        None, "Directory of decoded frames, kept for other epochs, runs and nodes, which may share it; none = no cache"
    )
    frame_cache_gb: float = _option(
        100.0, "About the most that the frame cache takes, in 10^9 bytes", above=0, high=MOST_GB
    )
    data_workers: int | None = _option(
        None,
        "Processes on each reading rank that decode beside training; 0 = the training process decodes; none = 0 with "
        "--platform cpu, else the cores for each rank of the node, at most 4",
        low=0,
        high=256,
    )
    prefetch_steps: int = _option(
        1,
        "Steps whose media the workers load ahead of the present one; nothing is read ahead without workers",
        low=0,
        high=1000,
    )
    data_timeout_seconds: float = _option(
        300.0,
        "Longest time for decoding the media of one question in a worker; then it is skipped",
        above=0,
        high=MOST_SECONDS,
    )
    data_worker_memory_gb: float = _option(
        8.0, "Most memory of one worker, in 10^9 bytes; a question that needs more is skipped", low=1, high=1e6
    )
    frame_sampling: FrameRule | None = _option(
        None,
        "Rule by which frames are chosen (docs/preprocessing.md): fps = video_fps a second, at most video_max_frames; "
        "fixed = video_num_frames; resampled = video_num_frames of those that fps takes; none = fixed where "
        "video_num_frames is given, else fps",
    )
    video_fps: float = _option(2.0, "Frames sampled per second of video", above=0, high=1000)
    video_num_frames: int | None = _option(
        None, "Fixed number of frames, for the frame_sampling fixed and resampled; even", low=2, high=MOST_FRAMES
    )
    video_max_frames: int = _option(16, "Most frames of one video; even", low=2, high=MOST_FRAMES)
    video_min_pixels: int = _option(
        4 * 28 * 28, "Frames with fewer pixels are enlarged to it or just above it", low=1, high=MOST_PIXELS
    )
    video_max_pixels: int = _option(
        128 * 28 * 28, "Frames with more pixels are reduced to it or just below it", low=1, high=MOST_PIXELS
    )
    video_total_pixels: int = _option(
        int(128000 * 28 * 28 * 0.9),
        "Pixels that all pairs of frames of a video share (docs/preprocessing.md)",
        low=1,
        high=MOST_PIXELS,
    )
    image_min_pixels: int = _option(
        4 * 28 * 28, "Images with fewer pixels are enlarged to it or just above it", low=1, high=MOST_PIXELS
    )
    image_max_pixels: int = _option(
        1280 * 28 * 28, "Images with more pixels are reduced to it or just below it", low=1, high=MOST_PIXELS
    )
    substitute_video: str | None = _option(
        None,
        "With original_compat: a video below media_root that takes the place of every video that cannot be used, as in "
        "the release; counted (substituted_media) and named; none = the question is skipped",
    )
    substitute_image: str | None = _option(None, "The same for images")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The files of ``data_path``, with what each has of its own."""
        return sources_of(self.data_path)
