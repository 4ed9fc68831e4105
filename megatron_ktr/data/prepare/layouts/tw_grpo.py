"""TW-GRPO: CLEVRER's counterfactual questions and inverted NExT-GQA and STAR, where several letters may be right.

    {"id": "4882821564_1", "video": "/NExTQA/videos/4882821564.mp4", "question": "why didn't ...",
     "options": ["(A) unwrap it", "(B) playing with toy train", "(C) gesture something"],
     "problem": "why didn't ...\\nA unwrap it\\nB playing with toy train\\nC gesture something",
     "answer": "(B),(C)", "solution": "<answer>B,C</answer>", "type": "CW", "is_negated": true}

CLEVRER's file (``clevrer_counterfactual_train.json``) was not seen. Its trainer reads ``problem``, which has the
options in its text, ``solution`` and ``video``, and so does this.

Seen in: longmalongma/TW-GRPO, ``data/evaluation/nextgqa_val_mixed.json``, ``data/question_answer_inverse/``,
``src/open_r1/grpo.py`` and ``src/open_r1/trainer/grpo_trainer.py``.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts, options_in_text
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, media_path, optional_text, short, text
from megatron_ktr.data.prepare.layout import Layout, Options, Record


def recognises(raw: Any) -> bool:
    return has_fields(raw, "problem", "solution", "video") and not has_fields(raw, "problem_type")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    question, texts, behind = options_in_text(text(fields, "problem"))
    if fields.get("options") and optional_text(fields, "question"):
        question, texts, behind = text(fields, "question"), option_texts(fields["options"]), ""
    if not question or not texts or behind:
        raise ValueError(f"expected a question that ends with its options, got {short(text(fields, 'problem'))}")
    return {
        "problem_id": optional_text(fields, "id", "problem_id", "question_id"),
        "problem": question,
        **choice(texts, text(fields, "solution")),
        "data_type": "video",
        "video": media_path(fields.get("video"), options, name="video"),
        **extras(fields, [("type", "original_question_type"), "duration", "is_negated"]),
    }


LAYOUT = Layout(
    name="tw_grpo",
    title="TW-GRPO, CLEVRER counterfactual and inverted NExT-GQA and STAR (several right letters)",
    media_root="the folder that has NExTQA/videos, STAR or CLEVRER's video folders",
    recognises=recognises,
    convert=convert,
)
