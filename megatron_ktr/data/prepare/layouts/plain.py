"""Plain rows of video (or image), question and answer, with or without options: CSV, TSV, JSONL or a table.

    video,question,answer            clip.mp4,How many balls are there?,3
    image,question,options,answer    a.png,Which?,"[""red"", ""blue""]",B

``--columns`` says what the columns are called: ``--columns video=path,question=q,answer=a``. The fields are

    id, video, image, question, answer, problem_type, start, end (of a clip, in seconds)
    options        a list, its JSON, or several columns: ``options=a0+a1+a2``
    answer_index   number of the right option, from 0, in place of ``answer``

With options it is multiple choice, and ``answer`` is a letter or an option's text. Otherwise the column
``problem_type`` says what it is; without one an answer that is a number is numerical, any other free-form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ktr.data.prepare.answers import (
    MULTIPLE_CHOICE,
    choice,
    choice_by_number,
    is_choice,
    may_be_letter,
    option_texts,
    options_in_text,
    refuse_unread_options,
    solution,
)
from megatron_ktr.data.prepare.fields import (
    clip,
    fields_of,
    media_paths,
    optional_text,
    refuse_option_columns,
    short,
    text,
)
from megatron_ktr.data.prepare.layout import Layout, Options, Record
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rewards.text import extract_answer, parse_number

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "problem_id", "qid"),
    "video": ("video", "video_path", "path"),
    "image": ("image", "image_path"),
    "question": ("question", "problem", "query", "q"),
    "answer": ("answer", "solution", "label", "a"),
    "answer_index": ("answer_index", "answer_idx", "correct_index"),
    "options": ("options", "candidates", "choices"),
    "problem_type": ("problem_type",),
    "start": ("start",),
    "end": ("end",),
}
"""Field -> the columns it is looked for in, unless ``--columns`` names one."""


def recognises(raw: Any) -> bool:
    if not isinstance(raw, dict):
        return False
    found = {field for field, names in COLUMNS.items() if any(name in raw for name in names)}
    return "question" in found and bool(found & {"answer", "answer_index"}) and bool(found & {"video", "image"})


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    row = _row(fields, options.columns)
    if row.get("options") in (None, "", []) and "options" not in options.columns:
        read = [name for names in COLUMNS.values() for name in names]
        refuse_option_columns(fields, read=[*options.columns.values(), *(name for name in read if len(name) > 1), "q"])
    kinds = [kind for kind in ("video", "image") if row.get(kind)]
    if len(kinds) != 1:
        raise ValueError(
            f"expected a path in either the video or the image column, got {' and '.join(kinds) or 'none'}"
        )
    paths = media_paths(row[kinds[0]], options, name=kinds[0])
    return {
        "problem_id": optional_text(row, "id"),
        **_asked(row),
        "data_type": kinds[0],
        kinds[0]: paths[0] if len(paths) == 1 else paths,
        **(clip(row.get("start"), row.get("end"), name="start, end") if kinds[0] == "video" else {}),
    }


def _row(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names."""
    row: dict[str, Any] = {}
    for name, usual in COLUMNS.items():
        if name not in columns:
            # A row without an answer has none: another column that may hold answers is not its answer.
            there = [column for column in usual if column in fields][: 1 if name == "answer" else None]
            row[name] = next((fields[column] for column in there if fields[column] not in (None, "")), None)
            continue
        named = columns[name].split("+")
        if missing := [column for column in named if column not in fields]:
            raise ValueError(f"--columns {name}={columns[name]}: the row has no column {short(missing[0])}")
        row[name] = fields[named[0]] if len(named) == 1 else [fields[column] for column in named]
    return row


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The question and its right answer."""
    problem_type, question = optional_text(row, "problem_type"), text(row, "question")
    may_be_choice = problem_type == "" or is_choice(problem_type)
    if row.get("options") not in (None, "", []):
        if not may_be_choice:
            raise ValueError(f"options in a question of type {short(problem_type)}: expected {MULTIPLE_CHOICE}")
        return {"problem": question, **_chosen(option_texts(_listed(row["options"])), row)}
    if may_be_choice and row.get("answer_index") in (None, ""):
        asked, texts, behind = options_in_text(question)
        if texts and not behind and may_be_letter(text(row, "answer")):
            return {"problem": asked, **choice(texts, text(row, "answer"))}
        refuse_unread_options(question, text(row, "answer"))
    if is_choice(problem_type):
        raise ValueError("a multiple-choice question without options")
    right = solution(text(row, "answer"))
    is_number = parse_number(extract_answer(right)) is not None
    usual = "numerical" if is_number else "free-form"
    return {"problem": question, "problem_type": problem_type or usual, "solution": right}


def _chosen(texts: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("answer_index") in (None, ""):
        return choice(texts, text(row, "answer"), may_be_text=True)
    judged = choice_by_number(texts, row["answer_index"], name="answer_index")
    try:
        other = choice(texts, text(row, "answer"))
    except ValueError:  # nothing that names an option
        return judged
    if other != judged:
        raise ValueError(f"the answer {short(row['answer'])} and the answer_index {short(row['answer_index'])} differ")
    return judged


def _listed(options: Any) -> Any:
    """The options of one CSV column: a JSON list. Of several columns those that are empty are left out at the end."""
    if isinstance(options, str):
        try:
            return parse_json(options)
        except ValueError:
            raise ValueError(
                f'expected options as a JSON list (["red", "blue"]) or in several columns, got {short(options)}'
            ) from None
    while isinstance(options, list) and options and options[-1] in (None, ""):
        options = options[:-1]
    return options


LAYOUT = Layout(
    name="plain",
    title="rows of video or image, question, answer and options; --columns names the columns",
    media_root="the folder that the paths are below",
    recognises=recognises,
    convert=convert,
    options=("columns",),
)
