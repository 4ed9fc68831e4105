"""The page of an evaluation: figures without scripts, items filtered in a browser, and text that stays text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from PIL import Image

from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.item import Answer, Condition
from megatron_ktr.evaluation.results.aggregate import results_of
from megatron_ktr.evaluation.results.figures import Headings
from megatron_ktr.evaluation.results.page import write_page_of
from megatron_ktr.evaluation.results.statistics import Resampling
from megatron_ktr.report.strips import LONG_SIDE, MOST_FRAMES, MediaPlace, StripFolder
from tests.support.made_outcomes import INTACT, evaluation_of, item_of, outcome_of
from tests.support.patience import PATIENCE_SECONDS
from tests.support.videos import numbered_frames, write_video

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = (
    "needle </script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "<!-- \u2028 \u202e \x1b[2J \x00 \ud800"
)
HEADINGS = {"bench": Headings("A <b>bench</b>", ("kind",)), "other": Headings("Other")}
SHUFFLED = Condition(32, "shuffled")


def made(num, *, shift):
    """``num`` items of two benchmarks under two conditions. Scores follow from the item's number."""
    outcomes = []
    for condition in (INTACT, SHUFFLED):
        for n in range(num):
            item = item_of(n, benchmark="bench" if n % 3 else "other", video=f"v{n // 5}", kind=f"kind {n % 4}")
            official, lenient = float((n + shift) % 2), float((n + shift) % 5 > 0)
            scores = {"official": official, "strict": official, "lenient": max(official, lenient)}
            outcome = outcome_of(item, scores, condition=condition, text=EVIL if n == 7 else "so B")
            if n % 50 == 1:
                outcome = dataclasses.replace(outcome, answers=(Answer("", problem="no such file"),))
            outcomes.append(outcome)
    return evaluation_of(outcomes)


def write(path, evaluations, **options):
    models = {name: results_of(of, HEADINGS, resampling=Resampling(50)) for name, of in evaluations.items()}
    return write_page_of(path, evaluations, models, HEADINGS, **options)


def test_figures_stand_in_the_page_without_scripts(tmp_path):
    write(tmp_path / "report.html", {"a model": made(20, shift=0)}, notes=["wording <ours>"])
    text = (tmp_path / "report.html").read_text()
    static = re.sub(r"<script.*", "", text, flags=re.DOTALL)
    assert "A &lt;b&gt;bench&lt;/b&gt;" in static and "<b>bench" not in static
    for words in (
        "Accuracy, official protocol",
        "order dep., 32 shuffled",
        "no such file",
        "32 shuffled",
        "wording &lt;ours&gt;",
    ):
        assert words in static
    assert "needle" not in static
    assert "onclick" not in text and "onload=" not in text


def test_policy_allows_the_one_script_and_pictures_beside_the_page(tmp_path):
    write(tmp_path / "report.html", {"a": made(10, shift=0)})
    text = (tmp_path / "report.html").read_text()
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1).replace("&#x27;", "'")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "<" not in data and data.isascii()
    responses = [run["t"] for item in json.loads(data)["items"] for run in item["r"]]
    assert [EVIL] in responses


def test_an_incomplete_run_is_named_first(tmp_path):
    whole = made(10, shift=0)
    write(tmp_path / "report.html", {"a": dataclasses.replace(whole, outcomes=whole.outcomes[:7])})
    text = (tmp_path / "report.html").read_text()
    assert "a is not complete: 7 of 20 answers are there" in text.split("<main>")[0]


def test_the_page_replaces_itself_and_nothing_else(tmp_path):
    page = tmp_path / "report.html"
    write(page, {"a": made(2, shift=0)})
    before = page.read_bytes()
    write(page, {"a": made(2, shift=0)})
    assert page.read_bytes() == before
    for foreign in ("<!DOCTYPE html><html><head></head></html>", "my notes"):
        page.write_text(foreign)
        with pytest.raises(UserError, match="is there and is"):
            write(page, {"a": made(2, shift=0)})
        assert page.read_text() == foreign


def test_other_questions_of_the_same_name_share_no_page(tmp_path):
    first, second = made(2, shift=0), made(2, shift=1)
    changed = dataclasses.replace(second.items[0], record={**second.items[0].record, "problem": "Another?"})
    second = dataclasses.replace(second, items=(changed, *second.items[1:]))
    with pytest.raises(UserError, match="item q0 of other is not the same question"):
        write(tmp_path / "report.html", {"a": first, "b": second})


def test_frames_are_written_once_a_video_and_read_back(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(30), fps=10)
    strips = StripFolder(tmp_path / "out" / "report.html")
    source = MediaSource("video", "v.mp4")
    place = MediaPlace(tmp_path, FrameSampling(num_frames=16))
    found = strips.find(source, group="bench", place=place)
    assert len(found["captions"]) == MOST_FRAMES and found["captions"][0] == "0.0 s"
    assert found["num_sampled"] == 16
    with Image.open(tmp_path / "out" / found["url"]) as image:
        assert image.size == (found["width"], found["height"])
        assert image.width % MOST_FRAMES == 0 and image.width // MOST_FRAMES <= LONG_SIDE
    # Once written it needs no video.
    assert strips.find(source, group="bench", place=None) == found
    assert "problem" in strips.find(source, group="other", place=None)
    missing = strips.find(MediaSource("video", "missing.mp4"), group="bench", place=place)
    assert missing["name"] == "missing.mp4" and "missing.mp4" in missing["problem"]


def test_frames_that_a_model_was_shown_need_no_second_decoding(tmp_path):
    strips = StripFolder(tmp_path / "report.html")
    frames = torch.arange(4, dtype=torch.uint8).mul(60)[:, None, None, None].expand(4, 3, 28, 56)
    source = MediaSource("video", ("a.jpg", "b.jpg"))
    strips.save(source, frames, group="bench", seconds=[0.0, 0.5, 1.0, 1.5])
    found = strips.find(source, group="bench", place=None)
    assert (found["width"], found["height"]) == (4 * 56, 28)
    assert found["captions"] == ["0.0 s", "0.5 s", "1.0 s", "1.5 s"]
    with Image.open(tmp_path / found["url"]) as image:
        # JPEG changes a flat grey by little; the four tiles are 60 apart.
        assert [image.getpixel((28 + 56 * n, 14))[0] for n in range(4)] == pytest.approx([0, 60, 120, 180], abs=4)


def opened(page: Path, address: str, profile: Path) -> str:
    """The document after the script has run, as Chromium writes it out."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"{page.as_uri()}{address}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout


def count_of(document: str) -> str:
    return re.search(r'<p id="count"[^>]*>(.*?)</p>', document).group(1)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_filters_of_3000_items_in_a_browser(tmp_path):
    page, profile = tmp_path / "a page#1" / "report.html", tmp_path / "profile"
    evaluations = {"first": made(3000, shift=0), "second": made(3000, shift=1)}
    source = MediaSource("video", "v1.mp4")  # of the items 5 .. 9
    StripFolder(page).save(source, torch.full((2, 3, 28, 28), 90, dtype=torch.uint8), group="bench", seconds=[0, 1])
    write(page, evaluations)

    document = opened(page, "", profile)
    assert count_of(document) == "3,000 of 3,000 items, page 1 of 150"
    assert document.count('<article class="group">') == 20

    numbers = [n for n in range(3000) if n % 3 and n % 4 == 2]  # bench, kind 2
    wrong = [n for n in numbers if n % 50 == 1 or not ((n % 2) or n % 5 > 0)]
    address = "#benchmark=bench&category.kind=kind+2&model=first&condition=32&protocol=lenient&verdict=wrong"
    document = opened(page, address, profile)
    assert count_of(document) == f"{len(wrong)} of 3,000 items, page 1 of {-(-len(wrong) // 20)}"
    ids = re.findall(r'<h4 dir="auto">A &lt;b&gt;bench&lt;/b&gt; (q\d+) ', document)
    assert ids == [f"q{n}" for n in wrong[:20]]

    # The two models differ on every item that could be asked.
    assert count_of(opened(page, "#differs=models&model=first", profile)).startswith("2,940 of 3,000")
    assert count_of(opened(page, "#state=problem&page=3", profile)) == "60 of 3,000 items, page 3 of 3"
    document = opened(page, "#model=third&nonsense=1&verdict=right", profile)
    assert "not understood in the address: model, nonsense" in count_of(document)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_text_of_a_model_stays_text_in_a_browser(tmp_path):
    page = tmp_path / "report.html"
    evaluation = made(10, shift=0)
    StripFolder(page).save(
        MediaSource("video", "v1.mp4"), torch.full((2, 3, 28, 28), 90, dtype=torch.uint8), group="bench", seconds=[0, 1]
    )
    write(page, {"a": evaluation})
    document = opened(page, f"#text={quote('NEEDLE </script>')}", tmp_path / "profile")
    assert count_of(document) == "1 of 10 items"
    assert "<title>Evaluation of a</title>" in document
    shown = document.split('<div id="list">')[1].split('<script type="application/json"')[0]
    assert "<script" not in shown and shown.count("<img") == 1  # its frames
    assert re.search(r'<img[^>]* src="frames/\w+\.jpg"', shown)
    assert "&lt;img src=x onerror=" in shown
    for number in ("U+202E", "U+001B", "U+0000", "U+2028"):
        assert number in shown
    assert "\u202e" not in shown and "U+D800" in shown and "\x1b" not in shown
