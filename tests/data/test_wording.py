"""Wordings by name, blanks, what a run says about its wording, and chat templates of the user."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_ktr.config import config_from_values, load_config, read_notes, save_resolved
from megatron_ktr.config.checks import check
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.records import check_record
from megatron_ktr.data.template import WordingTemplate, load_tokenizer
from megatron_ktr.data.wording import BUILT_IN, WITHOUT_BLOCKS, lettered
from megatron_ktr.errors import UserError
from megatron_ktr.files.hf_files import copy_side_files
from megatron_ktr.rollout.questions import prompt_loader
from tests.support.tokenizer import save_tiny_tokenizer

TYPES = ["multiple choice", "numerical", "OCR", "free-form", "regression", "another"]
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}answer: {% endif %}"
)


def record(**fields: Any) -> dict[str, Any]:
    return check_record({"problem": "Which?", "solution": "A", **fields}, number=1)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_wording_asks_the_question_with_its_options_and_for_the_form_of_the_rewards(name: str) -> None:
    wording = WordingTemplate(name)
    asked = wording.render(record(options=["A. red", "B. blue"], problem_type="multiple choice")).user
    blocks = () if name in WITHOUT_BLOCKS else ("<think>", "</think>", "<answer>", "</answer>")
    for part in ("Which?", "red", "blue", *blocks):
        assert part in asked
    assert asked == asked.strip() and "A. A" not in asked and "letter" in asked
    for problem_type in TYPES:
        plain = wording.render(record(problem_type=problem_type)).user
        assert "Which?" in plain and ("<answer>" in plain) == bool(blocks) and "red" not in plain
    assert "digest " + wording.digest[:12] in wording.describe()


def test_the_default_is_the_file_that_older_runs_were_made_with() -> None:
    """Its digest is in their checkpoints: a run that is resumed compares it."""
    assert WordingTemplate().digest.startswith("ff08caf42f88")
    assert WordingTemplate().describe().startswith("think_answer (built in), digest ")


def test_the_wording_for_times_and_boxes_is_the_default_for_all_other_types() -> None:
    wording, default = WordingTemplate("grounding"), WordingTemplate()
    for kind in ("multiple choice", "numerical", "OCR", "free-form", "regression", "riddle", ""):
        given = {"problem": "Q?", "problem_type": kind, "options": ["A. x"], "data_type": "video"}
        assert wording.render(given) == default.render(given)
    boxes = {"problem": "Q?", "problem_type": "spatial grounding", "box_size": [640, 360]}
    assert "pixels of a picture that is 640 wide and 360 high" in wording.render(boxes).user
    assert '{"time": [start, end]}' in wording.render({"problem": "Q?", "problem_type": "temporal grounding"}).user


@pytest.mark.parametrize(
    ("template", "text"),
    [(" {{ problem }} \n\n", "Which?"), ("{% set keep_blanks = true %} {{ problem }} \n\n", " Which? \n")],
)
def test_blanks_are_kept_where_a_template_says_so(tmp_path: Path, template: str, text: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    assert WordingTemplate(tmp_path / "own.jinja").render(record()).user == text


def test_a_name_is_a_wording_of_ours_and_a_path_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("video_r1").write_text("Mine: {{ problem }}")
    assert WordingTemplate("video_r1").is_built_in
    own = WordingTemplate("./video_r1")
    assert own.render(record()).user == "Mine: Which?" and "the user's file" in own.describe()
    for wording in (own, WordingTemplate("tw_grpo")):
        copy = pickle.loads(pickle.dumps(wording))
        assert copy.describe() == wording.describe() and copy.render(record()) == wording.render(record())
    with pytest.raises(UserError, match="prompt_template: video_r2 .* one of think_answer, video_r1, video_ktr"):
        WordingTemplate("video_r2")


def test_letters_are_cut_off_only_where_all_options_have_theirs() -> None:
    assert lettered(["(A) red", "(B) blue"]) == [("A", "red"), ("B", "blue")]
    assert lettered(["A: red", "B. blue"]) == [("A", "red"), ("B", "blue")]
    assert lettered(["B. red", "A. blue"]) == [("A", "B. red"), ("B", "A. blue")]
    assert lettered(["A red hat", "B"]) == [("A", "A red hat"), ("B", "B")] and lettered([]) == []


def test_the_configuration_of_a_run_notes_its_wording_and_loads_again(tmp_path: Path) -> None:
    config = config_from_values({"model": "m", "data_path": "d.jsonl", "engine": "hf"})
    notes = ["wording: video_r1 (..), digest 1", "wording: a\nb"]
    save_resolved(config, tmp_path / "config.yaml", notes=notes)
    assert read_notes((tmp_path / "config.yaml").read_text()) == [notes[0], "wording: a b"]
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_no_text_of_a_file_can_break_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "odd.jinja").write_text('{% set release = {"name": "x\x1b[1m\\n# y: z", "file": [1]} %}{{ problem }}')
    line = WordingTemplate(tmp_path / "odd.jinja").describe()
    assert line.isprintable() and "the text of x" in line
    for value in ("problem", "[1]", "'text'"):
        (tmp_path / "odd.jinja").write_text("{% set release = " + value + " %}")
        assert "the user's file" in WordingTemplate(tmp_path / "odd.jinja").describe()


# Chat templates


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer with a chat template in every place that programs read one from."""
    (tmp_path / "model").mkdir()
    save_tiny_tokenizer(tmp_path / "model")
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        path = tmp_path / "model" / name
        values = json.loads(path.read_text()) if path.is_file() else {"kept": 1}
        path.write_text(json.dumps({**values, "chat_template": "old"}))
    (tmp_path / "chat.jinja").write_text(CHAT)
    return tmp_path / "model"


def test_a_chat_template_takes_the_place_of_the_models_in_prompts_and_saved_files(model: Path) -> None:
    tokenizer = load_tokenizer(model, chat_template=model.parent / "chat.jinja")
    loader = PromptLoader.from_model(model, media_root=model, tokenizer=tokenizer, prompt_template="tw_grpo")
    assert loader.builder.chat_text(record(), []).startswith("user: Which?\nWrite how")
    assert loader.builder.chat_text(record(), []).endswith(";answer: ")
    copy_side_files(model, model.parent / "export", chat_template=tokenizer.chat_template)
    assert AutoTokenizer.from_pretrained(model.parent / "export").chat_template == CHAT
    assert (model.parent / "export" / "chat_template.jinja").read_text() == CHAT
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        assert json.loads((model.parent / "export" / name).read_text())["chat_template"] == CHAT, "for older programs"
    assert json.loads((model.parent / "export" / "processor_config.json").read_text())["kept"] == 1


def test_another_chat_template_is_another_wording_for_a_resumed_run(model: Path) -> None:
    (model.parent / "questions.json").write_text("[]")
    values = {"model": str(model), "engine": "hf", "data_path": str(model.parent / "questions.json")}
    plain = prompt_loader(config_from_values(values), tokenizer=load_tokenizer(model))
    assert plain.wording_digest == WordingTemplate().digest and "chat template" not in plain.describe_wording()
    digests = set()
    for text in (CHAT, CHAT + "{# another #}"):
        (model.parent / "chat.jinja").write_text(text)
        config = config_from_values({**values, "chat_template": str(model.parent / "chat.jinja")})
        loader = prompt_loader(config, tokenizer=load_tokenizer(model, chat_template=config.data.chat_template))
        assert re.search("; the user's chat template, digest [0-9a-f]{12}$", loader.describe_wording())
        digests.add(loader.wording_digest)
    assert len(digests) == 2 and plain.wording_digest not in digests


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read"),
        (" \n", "is empty"),
        ("{% if %}", "failed: "),
        ("{{ nothing.at_all }}", "failed: "),
        ("{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}", "no system"),
        ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", "does not show a turn .*third probe"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", "opens no turn for the answer"),
        (
            "{% if add_generation_prompt %}x{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
            "opens no turn",
        ),
    ],
)
def test_what_is_no_chat_template_is_refused_before_anything_is_built(
    model: Path, text: str | None, reason: str
) -> None:
    path = model.parent / "chat.jinja"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"chat_template: .*{reason}"):
        load_tokenizer(model, chat_template=path)


def test_a_mark_of_an_editor_is_no_text_and_a_wording_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "marked.jinja").write_text("\ufeff{{ problem }}", encoding="utf-8")
    assert WordingTemplate(tmp_path / "marked.jinja").render(record()).user == "Which?"
    (tmp_path / "empty.jinja").write_text("{# nothing #} \n")
    with pytest.raises(UserError, match="gives no text"):
        WordingTemplate(tmp_path / "empty.jinja").render(record())


def test_options_that_contradict_each_other_are_refused() -> None:
    base = {"model": "m", "data_path": "d.jsonl", "engine": "hf"}
    for values, reason in (
        ({"chat_template": "c.jinja", "lora_rank": 4, "lora_export": "adapter"}, "--chat-template cannot be saved"),
        ({"frame_sampling": "fps", "video_num_frames": 8}, "--video-num-frames is not read by --frame-sampling fps"),
        ({"frame_sampling": "fixed"}, "--frame-sampling fixed needs --video-num-frames"),
        ({"frame_sampling": "resampled"}, "--frame-sampling resampled needs --video-num-frames"),
    ):
        with pytest.raises(UserError, match=reason):
            check(config_from_values({**base, **values}))
