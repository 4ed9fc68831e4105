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

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.prepare.answers import MULTIPLE_CHOICE, choice, choice_by_number, option_texts, solution
from megatron_ktr.data.prepare.fields import clip, fields_of, media_paths, optional_text, short, text
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
    row = _row(fields_of(raw), options.columns)
    kinds = [kind for kind in ("video", "image") if row.get(kind)]
    if len(kinds) != 1:
        raise ValueError(
            f"expected a path in either the video or the image column, got {' and '.join(kinds) or 'none'}"
        )
    paths = media_paths(row[kinds[0]], options, name=kinds[0])
    return {
        "problem_id": optional_text(row, "id"),
        "problem": text(row, "question"),
        **_judged(row),
        "data_type": kinds[0],
        kinds[0]: paths[0] if len(paths) == 1 else paths,
        **(clip(row.get("start"), row.get("end"), name="start, end") if kinds[0] == "video" else {}),
    }


def _row(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names."""
    row: dict[str, Any] = {}
    for name, usual in COLUMNS.items():
        if name not in columns:
            row[name] = next((fields[column] for column in usual if fields.get(column) not in (None, "")), None)
            continue
        named = columns[name].split("+")
        if missing := [column for column in named if column not in fields]:
            raise ValueError(f"--columns {name}={columns[name]}: the row has no column {short(missing[0])}")
        row[name] = fields[named[0]] if len(named) == 1 else [fields[column] for column in named]
    return row


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    problem_type = optional_text(row, "problem_type")
    if row.get("options") in (None, "", []):
        if problem_type == MULTIPLE_CHOICE:
            raise ValueError("a multiple-choice question without options")
        right = solution(text(row, "answer"))
        is_number = parse_number(extract_answer(right)) is not None
        return {"problem_type": problem_type or ("numerical" if is_number else "free-form"), "solution": right}
    if problem_type not in ("", MULTIPLE_CHOICE):
        raise ValueError(f"options in a question of type {short(problem_type)}: expected {MULTIPLE_CHOICE}")
    texts = option_texts(_listed(row["options"]))
    if row.get("answer_index") not in (None, ""):
        return choice_by_number(texts, row["answer_index"], name="answer_index")
    return choice(texts, text(row, "answer"))


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
