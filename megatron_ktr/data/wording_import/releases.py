"""Where the releases keep the wording of their prompts: file, function and names, as facts about their repositories.

To add a release, add an entry to ``RELEASES`` (and our own words for its instructions to ``data/wording.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ktr.data.wording_import.pieces import Each, Fact, Pieces, Text

_AS_IN_RECORDS: Mapping[str, Pieces] = {
    name: (Fact(name),) for name in ("problem", "options", "problem_type", "data_type")
}


def _options(*line: Text | Fact, separator: str = "") -> Each:
    """The options of a record, which is shown one after the other as ``line``."""
    return Each(("option_letter", "option_text"), "lettered(options)", line, separator)


def _problem_with(*line: Text | Fact, name: str = "problem") -> Mapping[str, Pieces]:
    """The fields of a release whose question, called ``name``, ends with the options, which our records keep apart."""
    return {**_AS_IN_RECORDS, name: (Fact("problem"), _options(*line))}


@dataclass(frozen=True)
class Part:
    """One place of a release that asks questions."""

    files: tuple[str, ...]
    """Paths in the repository, best first. If none is there, a file whose path ends in the same way is looked for."""
    names: tuple[str, ...]
    """The names that hold the text there; a file that lacks one of them is not the one that is meant."""
    function: str | None = None
    """The function that makes the messages of one record, its first argument; None if a loop over all records does."""
    variable: str | None = None
    """The variable with the whole text; None if it is the ``text`` of the only text part of the messages."""
    fields: Mapping[str, Pieces] = field(default_factory=lambda: _AS_IN_RECORDS)
    """What the release's field of a record is in terms of ours. All others are looked up in the record as they are."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Options of the release that the text depends on, as its code spells them, with its own default."""


@dataclass(frozen=True)
class Release:
    """A repository with the wording of its prompts."""

    title: str
    parts: Mapping[str, Part]
    """By name; the first is the default."""


_TEMPLATES = ("QUESTION_TEMPLATE", "TYPE_TEMPLATE")
_VIDEO_R1_PARTS = {
    "train": Part(("src/r1-v/src/open_r1/grpo.py",), _TEMPLATES, function="make_conversation_image_and_video"),
    "eval": Part(("src/eval_bench.py",), _TEMPLATES),
}
_MMVU_FIELDS: Mapping[str, Pieces] = {
    "question": (Fact("problem"),),
    "optionized_str": (_options(Fact("option_letter"), Text(": "), Fact("option_text"), separator="\n"),),
}
RELEASES: Mapping[str, Release] = {
    "video_r1": Release("Video-R1 (tulerfeng/Video-R1)", _VIDEO_R1_PARTS),
    "video_ktr": Release("Video-KTR, arXiv 2601.19686, which derives from Video-R1", _VIDEO_R1_PARTS),
    "tw_grpo": Release(
        "TW-GRPO (longmalongma/TW-GRPO)",
        {
            "train": Part(
                ("src/open_r1/grpo.py",),
                ("QUESTION_TEMPLATE",),
                function="make_conversation_video",
                fields=_problem_with(Text("\n"), Fact("option_letter"), Text(" "), Fact("option_text")),
                settings={"model_args.question_type": "mixed"},
            )
        },
    ),
    "video_rts": Release(
        "Video-RTS (Ziyang412/Video-RTS)",
        {
            "train": Part(
                ("src/training_files/grpo.py",),
                ("QUESTION_TEMPLATE",),
                function="make_conversation_video",
                # Its questions end with a line break behind the last option as well.
                fields={
                    **_AS_IN_RECORDS,
                    "problem": (
                        Fact("problem"),
                        Fact('"\\n" if options else ""'),
                        _options(Fact("option_letter"), Text(". "), Fact("option_text"), Text("\n")),
                    ),
                },
            )
        },
    ),
    "video_holmes": Release(
        "Video-Holmes (TencentARC/Video-Holmes)",
        {
            "eval": Part(
                ("evaluate.py",),
                ("question_prompt",),
                function="evaluate",
                variable="question_prompt",
                fields={**_AS_IN_RECORDS, "Question": (Fact("problem"),), "Options": (Fact("options"),)},
            )
        },
    ),
    "mmvu": Release(
        "MMVU (yale-nlp/MMVU)",
        {
            part: Part(("utils/constant.py",), (name,), variable=name, fields=_MMVU_FIELDS)
            for part, name in (("eval", "MULTI_CHOICE_COT_PROMPT"), ("direct", "MULTI_CHOICE_DO_PROMPT"))
        },
    ),
    "tempcompass": Release(
        "TempCompass (llyx97/TempCompass)",
        {
            "eval": Part(
                ("run_qwen2_vl.py",),
                ("answer_prompt", "inp"),
                variable="inp",
                fields=_problem_with(
                    *(Text("\n"), Fact("option_letter"), Text(". "), Fact("option_text")), name="question"
                ),
                settings={"args.task_type": "multi-choice"},
            )
        },
    ),
}
