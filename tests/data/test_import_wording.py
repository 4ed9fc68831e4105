"""The wording of a release, read out of a checkout: the prompt's tokens are those of the release's chat call.

The repositories are made up (``tests/support/releases.py``). What a release would send is found by running functions
of the made-up source here, which the importer never does.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.data.records import check_record
from megatron_ktr.data.template import PromptBuilder, VisualTokens
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.data.wording_import.importer import import_wording
from megatron_ktr.errors import UserError
from megatron_ktr.types import VisualInput
from tests.support.fuzzing import fuzzed
from tests.support.releases import COMMIT, FILES, VIDEO_R1, write_release
from tests.support.tokenizer import tiny_tokenizer
from tools import import_wording as tool

CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|>"
    "<|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat format, which takes lists of parts as the processor's chat call does."""
CHOICE = {
    "problem": " Which one? ",
    "options": ["A. red", "B. {blue}"],
    "problem_type": "multiple choice",
    "data_type": "video",
    "solution": "A",
}
NUMBER = {"problem": "How many?", "problem_type": "numerical", "data_type": "image", "solution": "3"}


def imported(folder: Path, release: str, **options: Any) -> WordingTemplate:
    wording = import_wording(folder, release=release, **options)
    (folder / "imported.jinja").write_text(wording.template, encoding="utf-8")
    return WordingTemplate(folder / "imported.jinja")


def sent_by(source: str, function: str, record: dict[str, Any], **names: Any) -> list[dict[str, Any]]:
    """The messages that the release's own function makes of its record."""
    main = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    wanted = [
        node
        for node in main.body
        if (isinstance(node, ast.Assign) and "TEMPLATE" in ast.unparse(node.targets[0]))
        or (isinstance(node, ast.If) and "TEMPLATE" in ast.unparse(node))
        or (isinstance(node, ast.FunctionDef) and node.name == function)
    ]
    exec(compile(ast.Module(wanted, []), "release", "exec"), names)  # made-up code of this repository
    return names[function](record)["prompt"]


def check_same(wording: WordingTemplate, record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    builder = PromptBuilder(
        tokenizer, visual_tokens=VisualTokens.from_model("nowhere", tokenizer), merge_size=2, wording=wording
    )
    kind = record["data_type"]
    medium = VisualInput(kind, torch.zeros(2, 3, 28, 28, dtype=torch.uint8), (1, 2, 2), 1.0, "medium")  # one token
    prompt = builder.build(check_record({**record, kind: "a.mp4" if kind == "video" else "a.png"}, number=1), [medium])
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert list(prompt.token_ids) == list(expected)


@pytest.mark.parametrize("release", ["video_r1", "video_ktr"])
@pytest.mark.parametrize("record", [CHOICE, NUMBER], ids=["choice", "number"])
def test_tokens_of_video_r1_and_video_ktr_are_those_of_its_chat_call(
    tmp_path: Path, release: str, record: dict[str, Any]
) -> None:
    messages = sent_by(VIDEO_R1, "make_conversation_image_and_video", record)
    text = messages[0]["content"][-1]["text"]
    assert text.startswith("  ") and (text.endswith("\n") or record is NUMBER), "blanks that must be kept"
    check_same(imported(write_release(tmp_path, release), release), record, messages)


@pytest.mark.parametrize("kind", ["mixed", "single", "multiple"])
def test_tokens_of_tw_grpo_are_those_of_its_chat_call_for_each_setting(tmp_path: Path, kind: str) -> None:
    write_release(tmp_path, "tw_grpo")
    given = {} if kind == "mixed" else {"settings": {"model_args.question_type": kind}}
    theirs = {**CHOICE, "problem": " Which one? \nA red\nB {blue}"}
    model_args = type("Arguments", (), {"question_type": kind})
    messages = sent_by(
        FILES["tw_grpo"]["src/open_r1/grpo.py"], "make_conversation_video", theirs, model_args=model_args
    )
    check_same(imported(tmp_path, "tw_grpo", **given), CHOICE, messages)


def test_tokens_of_video_rts_are_those_of_its_chat_call(tmp_path: Path) -> None:
    write_release(tmp_path, "video_rts")
    theirs = {**CHOICE, "problem": " Which one? \nA. red\nB. {blue}\n"}
    messages = sent_by(FILES["video_rts"]["src/training_files/grpo.py"], "make_conversation_video", theirs)
    check_same(imported(tmp_path, "video_rts"), CHOICE, messages)
    # Records that have the options in their question already say them once.
    check_same(imported(tmp_path, "video_rts"), {**theirs, "options": []}, messages)


def test_tokens_of_video_holmes_are_those_of_its_chat_call(tmp_path: Path) -> None:
    text = "Solve it. Asked is:  Which one? . To choose from: A: red, B: {blue}. So:"
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    check_same(imported(write_release(tmp_path, "video_holmes"), "video_holmes"), CHOICE, messages)


def test_the_evaluations_wording_is_another_part(tmp_path: Path) -> None:
    wording = imported(write_release(tmp_path, "video_ktr"), "video_ktr", part="eval")
    assert wording.render(CHOICE).user == " Which one? Choices:\nA. red\nB. {blue}\n\nMull it over. A letter."
    assert wording.release["part"] == "eval" and wording.release["file"] == "src/eval_bench.py"


def test_templates_of_mmvu_are_read_with_their_dollar_signs(tmp_path: Path) -> None:
    release = write_release(tmp_path, "mmvu")
    asked = "\nQ:  Which one? \nA: red\nB: {blue}\n\nSay why. End with $LETTER, which costs $5."
    assert imported(release, "mmvu").render(CHOICE).user == asked
    assert imported(release, "mmvu", part="direct").render(CHOICE).user == "Q:  Which one? \nA: red\nB: {blue}\n"
    source = release / "utils" / "constant.py"
    published = source.read_text()
    for changed in ("Q: $question $subject", "Q: $question costs $ 5"):
        source.write_text(published.replace("Q: $question\n", f"{changed}\n"))
        with pytest.raises(UserError, match="of the template is not understood"):
            import_wording(release, release="mmvu")


def test_words_of_tempcompass_are_those_of_its_task(tmp_path: Path) -> None:
    release = write_release(tmp_path, "tempcompass")
    assert imported(release, "tempcompass").render(CHOICE).user == " Which one? \nA. red\nB. {blue}\nThe best one:"
    yes_no = imported(release, "tempcompass", settings={"args.task_type": "yes_no"})
    assert yes_no.render({**CHOICE, "options": []}).user == " Which one? \nYes or no:"


def test_a_problem_type_that_the_release_has_no_words_for_is_an_error(tmp_path: Path) -> None:
    wording = imported(write_release(tmp_path, "video_r1"), "video_r1")
    with pytest.raises(UserError, match="temporal grounding"):
        wording.render({**NUMBER, "problem_type": "temporal grounding"})


def test_the_file_says_where_its_text_is_from(tmp_path: Path) -> None:
    wording = imported(write_release(tmp_path, "video_ktr"), "video_ktr")
    assert wording.release["commit"] == COMMIT and re.fullmatch("[0-9a-f]{64}", wording.release["sha256"])
    assert "the text of video_ktr, train, src/r1-v/src/open_r1/grpo.py at commit 0123456789ab" in wording.describe()
    for changes in ({"HEAD": COMMIT}, {"HEAD": "ref: refs/heads/new"}, {"HEAD": "ref: ../../etc/passwd"}, {"HEAD": ""}):
        (tmp_path / ".git" / "HEAD").write_text(changes["HEAD"])
        found = import_wording(tmp_path, release="video_ktr").facts["commit"]
        assert found == (COMMIT if changes["HEAD"] == COMMIT else None)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<image>" not in text)


@given(before=texts, after=texts, of_type=texts)
@fuzzed(80)
def test_any_text_is_imported_character_by_character(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: str, of_type: str
) -> None:
    """Quotes, backslashes, braces, Jinja's own signs, control characters, line breaks of any kind."""
    template = before.replace("{", "{{").replace("}", "}}") + "{Question}" + after.replace("{", "{{").replace("}", "}}")
    source = (
        f"def main():\n    QUESTION_TEMPLATE = {template!r}\n    TYPE_TEMPLATE = {{'numerical': {of_type!r}}}\n"
        "    def make_conversation_image_and_video(example):\n"
        "        return [{'role': 'user', 'content': [{'type': 'video'}, {'type': 'text', 'text': "
        "QUESTION_TEMPLATE.format(Question=example['problem']) + TYPE_TEMPLATE[example['problem_type']]}]}]\n"
    )
    folder = tmp_path_factory.mktemp("release")
    (folder / "src/r1-v/src/open_r1").mkdir(parents=True)
    (folder / "src/r1-v/src/open_r1/grpo.py").write_bytes(source.encode())
    if not (before + after + of_type).strip():
        return
    assert imported(folder, "video_r1").render(NUMBER).user == f"{before}How many?{after}{of_type}"


TRAIN = "src/r1-v/src/open_r1/grpo.py"
BROKEN: dict[str, tuple[dict[str, str | None], str]] = {
    "nothing there": ({TRAIN: None}, f"looked in .* for the wording of video_r1, train: {TRAIN}; found no file"),
    "two elsewhere": (
        {TRAIN: None, "a/open_r1/grpo.py": VIDEO_R1, "b/open_r1/grpo.py": VIDEO_R1},
        "found a/open_r1/grpo.py, b/open_r1/grpo.py",
    ),
    "no table": (
        {TRAIN: VIDEO_R1.replace("TYPE_TEMPLATE", "TYPES")},
        r"looked in .* for QUESTION_TEMPLATE, TYPE_TEMPLATE, make_.*\(\); found QUESTION_TEMPLATE, make_.*\(\)$",
    ),
    "no Python": ({TRAIN: "def main(:"}, "cannot be read as Python"),
    "bytes": ({TRAIN: "\0"}, "cannot be read as Python"),
    "made by a call": (
        {TRAIN: VIDEO_R1.replace("QUESTION_TEMPLATE = (", "QUESTION_TEMPLATE = read_it(")},
        "line [0-9]+: read_it.* is not understood",
    ),
    "changed in a loop": (
        {
            TRAIN: VIDEO_R1.replace("    dataset = dataset.map", "    pass\n    dataset = dataset.map").replace(
                "    TYPE_TEMPLATE = {", "    while True:\n        QUESTION_TEMPLATE += 'x'\n    TYPE_TEMPLATE = {"
            )
        },
        "in a way that is not followed",
    ),
    "with a place of a medium": ({TRAIN: VIDEO_R1.replace("Ponder", "<image> Ponder")}, "its text has <image>"),
    "without the question": (
        {
            TRAIN: VIDEO_R1.replace("{Question}", "").replace(
                "+ TYPE_TEMPLATE[example['problem_type']]", "+ TYPE_TEMPLATE['numerical']"
            )
        },
        "does not have the question",
    ),
    "half a character": ({TRAIN: VIDEO_R1.replace("Ponder", "\\ud800")}, "half a character"),
    "media last": (
        {
            TRAIN: VIDEO_R1.replace("{\"type\": example['data_type']},", "").replace(
                "TYPE_TEMPLATE[example['problem_type']]}", "TYPE_TEMPLATE[example['problem_type']]}, {'type': 'video'}"
            )
        },
        "expected one text, behind the media",
    ),
    "a text that doubles": (
        {
            TRAIN: VIDEO_R1.replace(
                "    TYPE_TEMPLATE = {",
                "".join("    QUESTION_TEMPLATE = QUESTION_TEMPLATE + QUESTION_TEMPLATE\n" for _ in range(40))
                + "    TYPE_TEMPLATE = {",
            )
        },
        "more than 100000 characters",
    ),
    "a table changed by a key": (
        {
            TRAIN: VIDEO_R1.replace(
                "    def make_conversation_image(",
                "    TYPE_TEMPLATE['numerical'] = 'x'\n    def make_conversation_image(",
            )
        },
        "TYPE_TEMPLATE may be changed there",
    ),
    "a table changed by a call": (
        {
            TRAIN: VIDEO_R1.replace(
                "    def make_conversation_image(", "    TYPE_TEMPLATE.update(more)\n    def make_conversation_image("
            )
        },
        "TYPE_TEMPLATE may be changed there",
    ),
    "changed behind the function": (
        {
            TRAIN: VIDEO_R1.replace(
                "    dataset = dataset.map", "    QUESTION_TEMPLATE = 'x'\n    dataset = dataset.map"
            )
        },
        "in a way that is not followed",
    ),
    "imported": (
        {
            TRAIN: VIDEO_R1.replace(
                "    TYPE_TEMPLATE = {", "    from words import QUESTION_TEMPLATE\n    TYPE_TEMPLATE = {"
            )
        },
        "in a way that is not followed",
    ),
    "a loop that is left": (
        {TRAIN: VIDEO_R1.replace('question += op + "\\n"\n', 'question += op + "\\n"\n                break\n')},
        "it is made in a loop|it depends on",
    ),
    "nested deeply": (
        {TRAIN: VIDEO_R1 + "x = " + "(" * 3000 + ")" * 3000},
        "cannot be read as Python|nested too deeply",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkout_without_the_wording_gets_one_line_that_says_what_was_looked_for(tmp_path: Path, what: str) -> None:
    changes, reason = BROKEN[what]
    write_release(tmp_path, "video_r1")
    for path, source in changes.items():
        if source is None:
            (tmp_path / path).unlink()
        else:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=reason) as caught:
        import_wording(tmp_path, release="video_r1")
    assert str(caught.value).startswith("RELEASE_DIR: ")


def test_a_release_that_has_moved_its_file_is_found_by_its_last_folder(tmp_path: Path) -> None:
    write_release(tmp_path, "video_r1")
    (tmp_path / "code" / "open_r1").mkdir(parents=True)
    (tmp_path / TRAIN).rename(tmp_path / "code" / "open_r1" / "grpo.py")
    assert import_wording(tmp_path, release="video_r1").facts["file"] == "code/open_r1/grpo.py"


def test_the_tool_writes_a_template_that_prompts_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = write_release(tmp_path / "release", "tw_grpo")

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["import_wording.py", str(release), "--of", "tw_grpo", *arguments])
        assert tool.main() == 0
        return capsys.readouterr().out

    said = run("--out", str(tmp_path / "a.jinja"))
    assert "the text of tw_grpo" in said and "QUESTION_TEMPLATE (line " in said
    facts = json.loads(
        run("--out", str(tmp_path / "b.jinja"), "--setting", "model_args.question_type=single", "--json")
    )
    assert facts["name"] == "tw_grpo" and facts["settings"] == {"model_args.question_type": "single"}
    assert facts["digest"] == WordingTemplate(tmp_path / "b.jinja").digest
    assert WordingTemplate(facts["out"]).render(NUMBER).user == "How many?  One letter."
    for arguments, reason in (
        (["--out", str(tmp_path / "a.jinja")], "already exists"),
        (["--out", "video_r1"], "a wording of ours has that name"),
        (["--out", str(tmp_path / "nowhere" / "c.jinja")], "cannot be written"),
        (["--out", str(tmp_path / "c.jinja"), "--part", "eval"], "--part eval: tw_grpo has train"),
        (["--out", str(tmp_path / "c.jinja"), "--setting", "x=1"], "depends on model_args.question_type"),
        (["--out", str(tmp_path / "c.jinja"), "--setting", "x"], "expected NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=reason):
            run(*arguments)
    assert not (tmp_path / "c.jinja").exists()
