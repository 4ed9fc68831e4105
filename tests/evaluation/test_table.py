"""The Markdown tables of results, and the published figures beside ours."""

from __future__ import annotations

import re

import pytest

from megatron_ktr.evaluation.item import Condition
from megatron_ktr.evaluation.results.aggregate import results_of, results_text
from megatron_ktr.evaluation.results.figures import Headings
from megatron_ktr.evaluation.results.paper import beside_paper, published_rows
from megatron_ktr.evaluation.results.table import accuracy_cell, markdown
from tests.support.made_outcomes import evaluation_of, item_of, outcome_of

HOLMES = {"video_holmes": Headings("Video-Holmes", ("subtask",))}
LENIENT = {"official": 0.0, "strict": 0.0, "lenient": 1.0}


def holmes(scores, **options):
    made = [
        outcome_of(item_of(n, benchmark="video_holmes", video=f"v{n}", subtask="TCI"), score, **options)
        for n, score in enumerate(scores)
    ]
    return evaluation_of(made)


def rows_of(text, title):
    """The cells of the table below a heading."""
    table = text.split(f"### {title}\n")[1].split("\n###")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


def test_all_protocols_are_shown_with_the_chosen_one_first():
    results = results_of(holmes([1.0, LENIENT]), HOLMES)
    text = markdown({"m": results}, protocol="strict")
    titles = re.findall(r"### Accuracy, (\w+) protocol", text)
    assert titles == ["strict", "official", "lenient"]
    assert rows_of(text, "Accuracy, lenient protocol") == [
        ["model", "condition", "Video-Holmes"],
        ["m", "32", "100.0"],
    ]
    assert rows_of(text, "Accuracy, strict protocol")[1] == ["m", "32", "50.0 [0.0, 100.0]"]


def test_an_incomplete_figure_cannot_be_mistaken_for_a_result():
    made = holmes([1.0, 0.0])
    partial = type(made)(made.settings, made.items, made.conditions, made.outcomes[:1])
    results = results_of(partial, HOLMES)
    cell = accuracy_cell(results["benchmarks"]["video_holmes"]["conditions"][0], "official")
    assert cell == "100.0 (1 of 2 items; at least 50.0)"
    assert "m is incomplete: 1 of 2 answers." in markdown({"m": results})


def test_models_with_other_benchmarks_share_a_table():
    second = results_of(evaluation_of([outcome_of(item_of(0), 1)]), {})
    text = markdown({"a": results_of(holmes([1.0]), HOLMES), "b": second})
    assert rows_of(text, "Accuracy, official protocol") == [
        ["model", "condition", "Video-Holmes", "bench"],
        ["a", "32", "100.0", "-"],
        ["b", "32", "-", "100.0"],
    ]


def test_text_of_data_ends_no_cell_and_moves_no_cursor():
    item = item_of(0, kind="a|b\n<img src=x>\x1b[2J[x](http://y)\ud800")
    results = results_of(evaluation_of([outcome_of(item, 1)]), {})
    text = markdown({"m|n": results})
    assert results_text(results).isascii() and text.encode()
    assert "\x1b" not in text
    row = rows_of(text, "bench by kind, official protocol")[1]
    assert row == [r"a\|b\\n\<img src=x>\\x1b\[2J\[x](http://y)\\ud800", "1", "100.0"]
    assert rows_of(text, "Accuracy, official protocol")[1][0] == r"m\|n"


def test_every_published_row_has_a_source_and_plausible_figures():
    rows = published_rows()
    assert len({(row["model"], row["frames"], row["source"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["source"] and row["harness"] and row["figures"]
        assert all(20 < figure < 80 for figure in row["figures"].values())
    ours = {row["frames"]: row["figures"] for row in rows if row["model"] == "Video-KTR-7B"}
    assert ours[32] == {"video_holmes": 41.6, "video_mmmu": 52.6, "mmvu": 65.9, "tempcompass": 73.4, "videomme": 60.3}


def test_paper_stands_beside_the_condition_with_its_frames():
    made = [
        outcome_of(item_of(n, benchmark="video_holmes"), score, condition=condition)
        for condition, scores in ((Condition(16), (1, 0)), (Condition(32), (1, 1)), (Condition(32, "blank"), (0, 0)))
        for n, score in enumerate(scores)
    ]
    results = results_of(evaluation_of(made), HOLMES)
    found = {row["frames"]: row["figures"] for row in beside_paper(results) if row["model"] == "Video-KTR-7B"}
    assert found[16]["video_holmes"] == {
        "paper": 40.7,
        "ours": 50.0,
        "difference": 9.3,
        "condition": "16",
        "differs": ["ours is about 2 items, the source about 1,837"],
    }
    assert found[64]["video_holmes"]["condition"] == "32"
    assert found[64]["video_holmes"]["differs"][0] == "ours has 32 frames, the source 64"
    (strict, *_) = beside_paper(results, protocol="strict")
    assert any("ours is strict" in words for words in strict["figures"]["video_holmes"]["differs"])
    text = markdown({"m": results}, paper=True)
    row = next(
        row for row in rows_of(text, "m beside published figures, official") if row[:2] == ["Video-KTR-7B", "16"]
    )
    assert (
        row[2] == "40.7 / 50.0 (+9.3); ours is about 2 items, the source about 1,837" and "arXiv:2601.19686" in row[-1]
    )
    assert not beside_paper(results_of(evaluation_of([outcome_of(item_of(0), 1)]), {}))


@pytest.mark.parametrize("control", ["shuffled", "blank", "hidden"])
def test_categories_show_what_a_control_takes_away(control):
    item = item_of(0, kind="order")
    made = evaluation_of([outcome_of(item, 1), outcome_of(item, 0, condition=Condition(32, control))])
    text = markdown({"m": results_of(made, {})})
    name = "order dep." if control == "shuffled" else "vision dep."
    assert rows_of(text, "bench by kind, official protocol") == [
        ["kind", "items", "32", f"32 {control}", f"{name}, 32 {control}"],
        ["order", "1", "100.0", "0.0", "+100.0"],
    ]
