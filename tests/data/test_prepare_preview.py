"""``prepare_dataset.py preview`` shows the prompt that training makes, and text of records stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.records import read_records
from megatron_ktr.errors import UserError
from megatron_ktr.report import preview as command
from tests.support.prepare import good_record, run_command, write_jsonl
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></pre>\x00\u202e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    save_tiny_tokenizer(folder / "model")
    write_video(folder / "clip.mp4", numbered_frames(40, height=112, width=168))
    (folder / "broken.mp4").write_bytes(b"no video")
    records = [
        good_record(1, video_start=1),
        good_record(HOSTILE, problem=HOSTILE, options=[HOSTILE], solution=HOSTILE),
        good_record(3, video="broken.mp4"),
        good_record(4, problem="<|im_end|>"),
        "no record",
        good_record(6, video=..., problem_type="free-form"),
    ]
    write_jsonl(folder / "all.jsonl", records)
    return folder


class Page(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.texts.append(data)


def write_page(folder: Path, *flags: object) -> tuple[str, Page]:
    out = folder / "page.html"
    flags = (folder / "all.jsonl", "--media-root", folder, "--model", folder / "model", "--out", out, *flags)
    assert run_command(command, *flags) == 0
    text = out.read_text()
    return text, Page(text)


def test_page_shows_the_prompt_and_the_frames_of_training(folder) -> None:
    text, page = write_page(folder, "--records", "1", "--video-max-frames", "4")
    record = read_records(write_jsonl(folder / "one.jsonl", [good_record(1, video_start=1)]))[0]
    prompt = PromptLoader.from_model(
        folder / "model",
        media_root=folder,
        sampling=FrameSampling(max_frames=4),
        video_min_pixels=4 * 784,
        video_max_pixels=128 * 784,
    ).load(record)
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    height, width = prompt.media[0].frames_FCHW.shape[-2:]
    assert [(item["width"], item["height"]) for item in pictures] == [(str(width), str(height))] * 4
    assert [item["alt"] for item in pictures] == ["1.00 s", "2.00 s", "2.90 s", "3.90 s"], "times in the file: 10 fps"
    visual = prompt.media[0].grid_thw[0] * height * width // 784
    shown = "".join(page.texts)
    assert f"<|vision_start|><|video_pad|> x {visual:,}<|vision_end|>Which?" in shown
    assert f"tokens {len(prompt.token_ids):,}of them visual {visual:,}" in shown
    assert "--max-prompt-length 16384: no prompt is longer" in shown
    assert f"seconds a grid {prompt.media[0].seconds_per_grid:.4g}" in shown and "Answer: 1" in shown
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "http" not in text.replace("http-equiv", "")


def test_text_of_a_record_is_inert(folder) -> None:
    text, page = write_page(folder, "--records", "2")
    names = {tag for tag, _ in page.elements}
    assert "script" not in names and all(
        attributes["src"].startswith("data:") for tag, attributes in page.elements if tag == "img"
    )
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x00" not in text and "<script>alert(1)</script>" in "".join(page.texts)


def test_records_that_cannot_be_used_are_shown_with_the_reason(folder, capsys) -> None:
    _, page = write_page(folder, "--records", "3,4,5")
    shown = "".join(page.texts)
    assert "Training cannot use it: broken.mp4: cannot be opened as a video" in shown
    assert "Training cannot use it: its text contains the control token <|im_end|>" in shown
    assert "Record 5Training cannot use it: expected an object, got str" in shown
    capsys.readouterr()
    _, page = write_page(folder, "--num", "2", "--json")
    assert len(json.loads(capsys.readouterr().out)["records"]) == 2
    _, page = write_page(folder, "--records", "1", "--max-prompt-length", "300")
    assert "Training skips it: longer than --max-prompt-length 300 tokens." in "".join(page.texts)


def test_nothing_but_a_page_is_overwritten(folder, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no page: name another file"):
        write_page(folder, "--records", "1", "--out", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--records", "9"), "--records: .* has no record 9"),
        (("--records", "1,x"), "--records expects"),
        (("--records", "1", "--num", "3"), "--num is not read with --records"),
        (("--out", "/proc/nothing/page.html"), "--out .* cannot be written"),
    ],
)
def test_wrong_options_are_told(folder, flags, message) -> None:
    with pytest.raises(UserError, match=message):
        write_page(folder, *flags)
