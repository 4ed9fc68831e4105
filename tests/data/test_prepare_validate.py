"""``prepare_dataset.py validate`` finds what training would leave out or skip, whatever the file holds, and why."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.config import config_from_values
from megatron_ktr.config.sections import DataSection
from megatron_ktr.data.prepare import options as prepare_options
from megatron_ktr.data.prepare import validate as command
from megatron_ktr.data.prepare import validation
from megatron_ktr.data.prepare.media_looks import ProcessLimits
from megatron_ktr.data.prepare.options import ReadingOptions, build_loader
from megatron_ktr.data.prepare.reasons import KINDS
from megatron_ktr.data.prepare.task_pool import TaskFailed, run_tasks
from megatron_ktr.data.prepare.validation import MediaOptions, validate
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.rollout.questions import prompt_loader, read_questions
from tests.support.fuzzing import fuzzed
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.pool_tasks import behave
from tests.support.prepare import good_record, run_command, write_jsonl
from tests.support.tiny import VOCAB_SIZE
from tests.support.tokenizer import save_tiny_tokenizer, tiny_tokenizer
from tests.support.videos import numbered_frames, shared_videos, write_codec, write_video

NUM_SMALL = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media root with a good clip, some more in folders, a damaged one, and a link that leads out."""
    folder = tmp_path_factory.mktemp("validated")
    save_tiny_tokenizer(folder / "model")
    frames = numbered_frames(12, height=56, width=84)
    write_video(folder / "clip.mp4", frames)
    (folder / "small").mkdir()
    for number in range(NUM_SMALL):
        write_video(folder / "small" / f"{number}.mp4", frames[: 4 + number])
    write_codec(folder / "small", "mpeg4 avi", frames)
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:600])
    (folder / "empty").mkdir()
    (folder / "outside.mp4").symlink_to("/etc/hostname")
    return folder


def checked(capsys: pytest.CaptureFixture[str], file: Path, folder: Path, *flags: object) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a check."""
    code = run_command(command, file, "--media-root", folder, "--jobs", 1, "--json", *flags)
    result = json.loads(capsys.readouterr().out)
    assert result["by_reason"] == Counter(item["reason"] for item in result["unusable"])
    assert result["usable"] + len(result["unusable"]) == result["num_records"]
    assert code == (1 if result["unusable"] else 0)
    return code, result


def test_every_real_video_is_decoded_and_the_damaged_one_is_found(tmp_path, folder, capsys) -> None:
    videos = [path for path in shared_videos() if path.suffix != ".md"]
    root = videos[0].parent if videos else folder
    names = [path.name for path in videos] or ["clip.mp4", "small/1.mp4", "small/mpeg4_avi.avi", "broken.mp4"]
    damaged = [name for name in names if Path(name).stem in ("corrupted", "broken")]
    records = [good_record(number, video=name) for number, name in enumerate(names + names)]
    _, result = checked(capsys, write_jsonl(tmp_path / "all.jsonl", records), root, "--decode", "all")
    assert [item["path"] for item in result["unusable"]] == damaged * 2
    assert set(result["by_reason"]) == {"does not decode"}
    assert result["num_media"] == result["num_decoded"] == len(names), "each medium once"


def test_usable_records_are_kept_as_they_were(tmp_path, folder, capsys) -> None:
    records = [
        good_record(1, note="\u2028 \u00e9"),
        good_record(2, video="gone.mp4"),
        good_record(3, extra=[1.5, None]),
    ]
    file, kept = write_jsonl(tmp_path / "all.jsonl", records), tmp_path / "kept.jsonl"
    _, result = checked(capsys, file, folder, "--keep", kept)
    assert result["usable"] == 2
    assert [json.loads(line) for line in kept.read_text().split("\n") if line] == [records[0], records[2]]
    with pytest.raises(UserError, match="is there already"):
        run_command(command, file, "--media-root", folder, "--keep", kept)
    with pytest.raises(UserError, match="no record of .* can be used"):
        only_bad = write_jsonl(tmp_path / "bad.jsonl", records[1:2])
        run_command(command, only_bad, "--media-root", folder, "--keep", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


OF_RL: list[tuple[str, Any]] = [
    ("not a record", ["no", "record"]),
    ("text not writable", {"problem": "\ud800"}),
    ("no question", {"problem": " "}),
    ("no answer", {"solution": None}),
    ("control token", {"problem": "Which? <|im_end|>"}),
    ("markers do not match", {"problem": "<image> Which?"}),
    ("unknown type", {"problem_type": "essay"}),
    ("answer not among options", {"problem_type": "multiple choice", "options": ["A. x", "B. y"], "solution": "C"}),
    ("missing file", {"video": "gone.mp4"}),
    ("not a file", {"video": "empty"}),
    ("wrong folder", {"video": "empty/"}),
    ("leaves the root", {"video": "../clip.mp4"}),
    ("leaves the root", {"video": "outside.mp4"}),
    ("leaves the root", {"video": "https://host/clip.mp4"}),
    ("field not followed", {"start_time": 3}),
    ("media not named", {"video": ..., "video_path": "clip.mp4"}),
    ("wrong conversation", {"problem": ..., "messages": [{"role": "system", "content": "x"}]}),
    ("wrong field", {"nframes": 64}),
    ("does not decode", {"video": "broken.mp4"}),
    ("does not decode", {"video_start": 50}),
    ("prompt too long", {"problem": "x" * 20000}),
]


def test_each_reason_is_found_once_and_named(tmp_path, folder, capsys) -> None:
    records = [good_record(1)]
    records += [
        good_record(number, **changes) if isinstance(changes, dict) else changes
        for number, (_, changes) in enumerate(OF_RL, start=2)
    ]
    file = write_jsonl(tmp_path / "each.jsonl", records)
    _, result = checked(capsys, file, folder, "--model", folder / "model")
    assert [(item["record"], item["reason"]) for item in result["unusable"]] == [
        (number, kind) for number, (kind, _) in enumerate(OF_RL, start=2)
    ]
    paths = {item["record"]: item["path"] for item in result["unusable"]}
    assert (paths[10], paths[2]) == ("gone.mp4", str(file)), "the medium where it is about one, else the file"
    assert not result["not_checked"]
    code = run_command(command, file, "--media-root", folder, "--decode", "none")
    told = capsys.readouterr().out
    assert code == 1 and "  3 x leaves the root\n      record 13: media path '../clip.mp4'" in told
    assert "Not checked: special tokens" in told and "Not checked: whether media can be decoded" in told


def test_reasons_of_supervised_files(tmp_path, folder, capsys) -> None:
    bad = [{"response": ...}, {"response": "x <|video_pad|>"}]
    records = [good_record(1, solution=...), *(good_record(2, **changes) for changes in bad)]
    _, result = checked(capsys, write_jsonl(tmp_path / "sft.jsonl", records), folder, "--for", "sft")
    assert result["by_reason"] == {"no response": 1, "control token": 1}
    assert not {"no response", *(kind for kind, _ in OF_RL)} - set(KINDS)


def test_warnings_do_not_make_a_record_unusable(tmp_path, folder, capsys) -> None:
    records = [good_record(1), good_record(1), good_record(2, start=0.1, end=0.5), good_record(1, problem="<|im_end|>")]
    code, result = checked(capsys, write_jsonl(tmp_path / "w.jsonl", records), folder)
    assert (code, result["usable"]) == (1, 3)
    assert [(item["record"], item["reason"]) for item in result["warnings"]] == [
        (2, "duplicate id"),
        (3, "shows only a clip"),
        (4, "duplicate id"),
    ]
    good = write_jsonl(tmp_path / "good.jsonl", [good_record(1), good_record(1)])
    assert checked(capsys, good, folder)[0] == 0


def test_sample_opens_all_and_decodes_some_of_each_folder_and_codec(tmp_path, folder, capsys) -> None:
    names = ["clip.mp4", "small/mpeg4_avi.avi", *(f"small/{number}.mp4" for number in range(NUM_SMALL))]
    file = write_jsonl(tmp_path / "s.jsonl", [good_record(number, video=name) for number, name in enumerate(names)])
    decoded = {}
    for seed in (0, 1, 0):
        _, result = checked(capsys, file, folder, "--seed", seed)
        assert (result["num_opened"], result["num_decoded"]) == (8, 1 + 1 + MediaOptions.fewest)
        told = decoded.setdefault(seed, result)
        assert told == result
    assert "3 media, which were only opened" in result["not_checked"][1]


# What training does with the same file is the reference: ``read_questions`` of a run.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.sampled_from(
        ["", "clip.mp4", "gone.mp4", "../x", "/clip.mp4", "outside.mp4", "a\0b", "A", "<video>", "x" * 999]
    ),
    st.sampled_from(["multiple choice", "numerical", "essay", "<|im_start|>", "\ud800", "video", "text", "image"]),
    st.text(max_size=6),
)
NESTED = st.one_of(VALUES, st.lists(VALUES, max_size=3), st.dictionaries(st.sampled_from("ab"), VALUES, max_size=2))
FIELDS = (
    *("problem_id", "problem", "problem_type", "solution", "video", "videos", "image", "path", "data_type", "options"),
    *("system", "fps", "nframes", "start", "video_end", "max_pixels", "start_time", "frames", "messages", "media"),
)
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), NESTED, max_size=3).map(lambda changes: good_record(7, **changes)),
    NESTED,
)


@given(records=st.lists(RECORDS, max_size=6), wants_types=st.booleans())
@fuzzed(60)
def test_fuzzed_records_are_left_out_exactly_where_training_leaves_them_out(folder, records, wants_types) -> None:
    file = write_jsonl(folder / "fuzzed.jsonl", [good_record(1), *records])
    types = ("numerical", "multiple choice") if wants_types else ()
    data = DataSection(problem_types=types, max_prompt_length=10**6)
    reading = ReadingOptions(file, folder, data, folder / "model", "rl", ())
    result = validate(reading, MediaOptions(decode="none"))
    numbers = {finding.number for finding in result.ledger.findings()}
    assert len(numbers) == sum(result.ledger.counts().values()) == result.num_records - result.num_usable
    usable = {number for number, _, _ in result.ledger.records()}
    result.ledger.close()
    config = config_from_values(
        dict(model=str(folder / "model"), engine="hf", data_path=str(file), media_root=str(folder))
        | dict(problem_types=types, max_skip_share=1.0)
    )
    questions = read_questions(config, tokenizer=tiny_tokenizer(), vocab_size=VOCAB_SIZE, is_spokesman=False)
    (source,) = questions.sources
    assert result.num_records == len(source.records)
    kept = set(range(len(source.records))) - set(source.left_out)
    assert usable == {source.records[place]["record_number"] for place in kept}


def test_options_and_loader_are_those_of_training(folder) -> None:
    """An option that training gets must be sorted into one of the two lists."""
    names = [field.name for field in dataclasses.fields(DataSection)]
    assert sorted([*prepare_options.OF_PROMPTS, *prepare_options.OF_RUNS]) == sorted(names)
    data = DataSection(video_fps=1.5, video_max_frames=8, video_max_pixels=90_000, image_min_pixels=5000)
    reading = ReadingOptions(folder / "x.json", folder, data, folder / "model", "rl", ())
    values = {name: getattr(data, name) for name in prepare_options.OF_PROMPTS}
    config = config_from_values(
        values | dict(model=str(folder / "model"), engine="hf", data_path=str(folder / "x.json"))
    )
    ours, theirs = build_loader(reading), prompt_loader(config, tokenizer=tiny_tokenizer())
    assert (ours.settings, ours.sampling, ours.media_root) == (theirs.settings, theirs.sampling, theirs.media_root)
    without = build_loader(dataclasses.replace(reading, model=None))
    assert (without.settings, without.sampling) == (theirs.settings, theirs.sampling)


KILLED = """
import os, signal, sys
from megatron_ktr.data.prepare.media_state import MediaState
remember, seen = MediaState.remember, []
def remember_and_die(self, task, facts):
    remember(self, task, facts)
    seen.append(task)
    if len(seen) == 3:
        self._database.commit()
        os.kill(os.getpid(), signal.SIGKILL)
MediaState.remember = remember_and_die
from megatron_ktr.data.prepare import validate
from tests.support.prepare import run_command
run_command(validate, *sys.argv[1:])
"""


def test_killed_check_goes_on_where_it_was_and_ends_with_the_same_result(tmp_path, folder, capsys, monkeypatch) -> None:
    names = ["broken.mp4", *(f"small/{number}.mp4" for number in range(NUM_SMALL))]
    file = write_jsonl(tmp_path / "k.jsonl", [good_record(number, video=name) for number, name in enumerate(names)])
    flags = ("--decode", "all", "--state", tmp_path / "state")
    command_line = [sys.executable, "-c", KILLED, file, "--media-root", folder, "--jobs", "1", *flags]
    done = subprocess.run(
        list(map(str, command_line)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    looked_at = []
    look_at_media = validation.look_at_media

    def counting(media, **how):
        media = list(media)
        looked_at.extend(media)
        return look_at_media(media, **how)

    monkeypatch.setattr(validation, "look_at_media", counting)
    _, resumed = checked(capsys, file, folder, *flags)
    assert len(looked_at) == len(names) - 3
    _, fresh = checked(capsys, file, folder, "--decode", "all")
    assert resumed == fresh and fresh["by_reason"] == {"does not decode": 1}
    (folder / "small" / "0.mp4").touch()
    looked_at.clear()
    checked(capsys, file, folder, *flags)
    assert [source.written for _, source in looked_at] == ["small/0.mp4"], "a changed file is looked at again"


def test_process_that_hangs_dies_or_explodes_costs_its_own_task() -> None:
    limits = dict(jobs=2, memory_bytes=2 << 30)
    assert list(run_tasks(behave, ["wake"], deadline_seconds=PATIENCE_SECONDS, **limits)) == [("wake", "did wake")]
    tasks = ["hang", "die", "explode", "raise", *(f"work {number}" for number in range(8))]
    results = dict(run_tasks(behave, tasks, deadline_seconds=8.0, **limits))
    assert list(results) != tasks and sorted(results) == sorted(tasks)
    failed = {task: result.how for task, result in results.items() if isinstance(result, TaskFailed)}
    assert failed == {"hang": "hangs", "die": "crashes", "explode": "memory", "raise": "crashes"}
    assert "SIGKILL" in results["die"].reason and "KeyError" in results["raise"].reason
    assert results["work 7"] == "did work 7"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--media-root", "nowhere"), "--media-root nowhere is not a directory"),
        (("--state", "FILE"), "--state .* cannot be used: file is not a database"),
        (("--decode", "none", "--state", "x"), "--state is not read with --decode none"),
        (("--decode", "all", "--sample-share", "0.5"), "--sample-share is not read"),
        (("--video-max-frames", "7"), "--video-max-frames must be even"),
        (("--video-fps", "0"), "video_fps .* expects a number > 0"),
        (("--model", "nowhere"), "--model nowhere is not a directory"),
        (("--for", "sft", "--reward-functions", "accuracy"), "--reward-functions is not read with --for sft"),
        (("--reward-functions", "beauty"), "reward 'beauty' is unknown"),
        (("--problem-types", "OCR"), "none of problem_types .*'OCR'.*; found .*'numerical'"),
        (("--prompt-template", "nowhere.jinja"), "prompt_template: nowhere.jinja cannot be used"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, folder, flags, message) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [good_record(1)])
    flags = [file if flag == "FILE" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        run_command(command, file, "--media-root", folder, *flags)


@pytest.mark.parametrize(("text", "message"), [("", "no records"), ("[1,", "not valid JSON"), ("{]", "line 1")])
def test_files_that_hold_no_records_are_told_in_one_line(tmp_path, folder, text, message) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        run_command(command, file, "--media-root", folder)


def test_jobs_share_the_media(tmp_path, folder, capsys) -> None:
    names = [f"small/{number}.mp4" for number in range(NUM_SMALL)]
    file = write_jsonl(tmp_path / "j.jsonl", [good_record(number, video=name) for number, name in enumerate(names)])
    reading = ReadingOptions(file, folder, DataSection(), None, "rl", ())
    result = validate(reading, MediaOptions(decode="all", limits=ProcessLimits(jobs=3)))
    assert (result.num_usable, result.ledger.num_media()) == (NUM_SMALL, NUM_SMALL)
    result.ledger.close()


def test_a_chat_template_is_tried_as_training_tries_it(tmp_path, folder) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages[:2] %}{{ m.content }}{% endfor %}")
    file = write_jsonl(tmp_path / "a.jsonl", [good_record(1)])
    with pytest.raises(UserError, match="does not show a turn"):
        run_command(
            command,
            file,
            "--media-root",
            folder,
            "--model",
            folder / "model",
            "--chat-template",
            tmp_path / "chat.jinja",
        )


def test_no_text_of_a_record_or_path_moves_the_cursor_of_a_terminal(tmp_path, folder, capsys) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [good_record(1, video="\x1b]0;title\x07\x9b2J\u202e.mp4")])
    assert run_command(command, file, "--media-root", folder, "--decode", "none") == 1
    told = capsys.readouterr().out
    assert told.replace("\n", "").isprintable() and r"\x1b]0;title\x07\x9b2J\u202e.mp4" in told
    assert one_line(UserError("a\x1b[2J\nb")) == r"a\x1b[2J b"
