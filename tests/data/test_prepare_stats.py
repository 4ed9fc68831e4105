"""``prepare_dataset.py stats`` measures a sample, and its suggestions hold when training follows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ktr.config.sections import DataSection
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.prepare import stats as command
from megatron_ktr.data.prepare.media_looks import ProcessLimits
from megatron_ktr.data.prepare.options import ReadingOptions
from megatron_ktr.data.prepare.prompt_lengths import Rules, count_tokens, effects_in_words
from megatron_ktr.data.prepare.record_reader import RecordReader
from megatron_ktr.data.prepare.record_sample import sample_records, sampled_prompts
from megatron_ktr.data.prepare.stats import Spread
from megatron_ktr.data.prepare.token_budget import suggest_options
from megatron_ktr.data.records import read_records
from tests.support.prepare import good_record, run_command, write_jsonl
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, write_codec, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of several lengths and sizes, and a list of pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("measured")
    save_tiny_tokenizer(folder / "model")
    write_video(folder / "long.mp4", numbered_frames(100, height=224, width=392))
    write_video(folder / "short.mp4", numbered_frames(6, height=560, width=280))
    write_codec(folder, "mpeg4 avi", numbered_frames(30, height=112, width=112))
    for number in range(8):
        Image.new("RGB", (300, 200), (number, 0, 0)).save(folder / f"{number}.png")
    records = [
        good_record(1, video="long.mp4"),
        good_record(2, video="short.mp4", problem_type="OCR"),
        good_record(3, video="mpeg4_avi.avi", video_start=1),
        good_record(4, video=[f"{number}.png" for number in range(8)], fps=4),
        good_record(5, video=..., image="0.png", min_pixels=50_000),
        good_record(6, video="long.mp4", nframes=10),
        good_record(7, video="gone.mp4"),
    ]
    write_jsonl(folder / "all.jsonl", records)
    return folder


def reading(folder: Path, **options: object) -> ReadingOptions:
    return ReadingOptions(folder / "all.jsonl", folder, DataSection(**options), folder / "model", "rl", ())  # type: ignore[arg-type]


def loader(folder: Path, *, max_frames: int, **pixels: int) -> PromptLoader:
    """Made as training makes it, without the code under test."""
    data = DataSection()
    names = ("video_min_pixels", "video_max_pixels", "image_min_pixels", "image_max_pixels", "video_total_pixels")
    limits = {name: getattr(data, name) for name in names} | pixels
    return PromptLoader.from_model(
        folder / "model", media_root=folder, sampling=FrameSampling(fps=2.0, max_frames=max_frames), **limits
    )


def test_lengths_without_decoding_are_those_of_training_under_every_option(folder) -> None:
    reader = RecordReader(reading(folder))
    sample = sample_records(reader, size=100)
    prompts = sampled_prompts(sample, reader, limits=ProcessLimits()).prompts
    rules = Rules(reader.loader.sampling, reader.loader.settings)
    records = {record["record_number"]: record for record in read_records(folder / "all.jsonl")}
    assert [prompt.number for prompt in prompts] == [1, 2, 3, 4, 5, 6]
    for max_frames, max_pixels in ((16, 128 * 784), (10, 768 * 784), (24, 16 * 784)):
        real = loader(folder, max_frames=max_frames, video_max_pixels=max_pixels)
        changed = rules.with_limits(max_frames=max_frames, max_pixels=max_pixels)
        for prompt in prompts:
            assert count_tokens(prompt, changed) == len(real.load(records[prompt.number]).token_ids)


def test_suggested_options_fit_and_the_next_larger_ones_do_not(folder) -> None:
    reader = RecordReader(reading(folder))
    prompts = sampled_prompts(sample_records(reader, size=100), reader, limits=ProcessLimits()).prompts
    budget = 700
    found = suggest_options(prompts, Rules(reader.loader.sampling, reader.loader.settings), token_budget=budget)
    # 20 frames are the most that any video gives, and one record asks for 10.
    assert [item.video_max_frames for item in found] == [16, 32]
    records = read_records(folder / "all.jsonl")[:6]
    for item in found:
        real = loader(folder, max_frames=item.video_max_frames, video_max_pixels=item.video_max_pixels)
        lengths = [len(real.load(record).token_ids) for record in records]
        assert max(lengths) == item.longest_tokens <= budget and item.fitting_share == 1.0
        more = loader(folder, max_frames=item.video_max_frames, video_max_pixels=item.video_max_pixels + 32 * 784)
        assert max(len(more.load(record).token_ids) for record in records) > budget
    assert not suggest_options(prompts, Rules(reader.loader.sampling, reader.loader.settings), token_budget=100)


def test_only_options_that_training_takes_are_suggested(folder) -> None:
    reader = RecordReader(reading(folder, video_min_pixels=64 * 784, video_num_frames=16))
    prompts = sampled_prompts(sample_records(reader, size=100), reader, limits=ProcessLimits()).prompts
    rules = Rules(reader.loader.sampling, reader.loader.settings)
    for budget in (700, 1500, 5000):
        for found in suggest_options(prompts, rules, token_budget=budget):
            assert found.video_max_pixels >= 64 * 784 and found.video_max_frames >= 16


def test_ninety_percent_are_at_most_the_number_that_is_said() -> None:
    for values in ([10.0, 16.0], [float(n) for n in range(10)], [float(n) for n in range(11)], [3.0]):
        spread = Spread.of(values)
        assert spread is not None and sum(value <= spread.high for value in values) >= 0.9 * len(values)
        assert sum(value < spread.high for value in values) < 0.9 * len(values)


def test_a_sample_without_a_whole_prompt_and_text_for_terminals(tmp_path, folder, capsys) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "a.png").write_bytes((next(folder.rglob("*.png"))).read_bytes())
    row = {"problem": "Which?", "problem_type": "x\x1b[2J\x9b2J", "response": "1", "image": "a.png", "video": "bad.mp4"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert run_command(command, tmp_path / "q.jsonl", "--for", "sft", "--jobs", 1) == 0
    told = capsys.readouterr().out
    assert r"x\x1b[2J\x9b2J 1" in told and "Decoding costs" not in told and told.replace("\n", "").isprintable()


def test_words_say_what_the_options_drop_and_shrink(folder) -> None:
    reader = RecordReader(reading(folder, video_max_frames=10))
    prompts = sampled_prompts(sample_records(reader, size=100), reader, limits=ProcessLimits()).prompts
    rules = Rules(reader.loader.sampling, reader.loader.settings)
    longest = max(length for prompt in prompts if (length := count_tokens(prompt, rules)))
    too_long, frames, pixels, images = effects_in_words(prompts, rules, max_prompt_length=longest - 1)
    assert too_long.startswith(f"--max-prompt-length {longest - 1}: 2 of 6 prompts are longer")
    # long.mp4: 10 s at 2 a second; the record that asks for 10 frames of it counts as a medium of its own.
    assert (
        frames
        == "--video-max-frames 10: 1 of 5 videos give fewer frames than they would without it (median 20, now 10)."
    )
    assert pixels.startswith(
        "--video-max-pixels 100352: frames of 1 of 5 videos are reduced by it (the median from 280 x 560 "
    )
    assert images == "--image-max-pixels 1003520: no image is reduced by it."


def test_figures_of_a_file_and_its_json(folder, capsys) -> None:
    flags = (folder / "all.jsonl", "--media-root", folder, "--model", folder / "model", "--jobs", 1)
    assert run_command(command, *flags, "--decode-sample", 2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_records"], result["num_usable"], result["problems"]) == (7, 6, {"missing file": 1})
    assert result["problem_types"] == {"numerical": 5, "OCR": 1}
    assert result["codecs"] == {"h264": 3, "png": 2, "mpeg4": 1}
    assert result["sizes"]["392 x 224"] == 2
    assert (result["seconds"]["least"], result["seconds"]["most"]) == (pytest.approx(0.6), 10.0)
    assert result["decoding"]["num_media"] == 2 and result["decoding"]["megabytes_per_second"] > 0
    assert run_command(command, *flags, "--decode-sample", 0, "--token-budget", 700, "--sample", 3) == 0
    told = capsys.readouterr().out
    assert "In a sample of 3 records" in told and "For 700 tokens a prompt" in told and "Decoding costs" not in told
