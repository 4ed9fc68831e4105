"""Two evaluations compared: paired figures worked out by hand, and what cannot be compared is refused."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.item import Condition
from megatron_ktr.evaluation.results.compare import MACRO, NOT_BINARY, compare, comparison_markdown
from megatron_ktr.evaluation.results.figures import Headings
from tests.support.made_outcomes import INTACT, evaluation_of, item_of, outcome_of

HEADINGS = {"bench": Headings("A bench", ("kind",))}


def made(scores, *, kinds="", condition=INTACT, **options):
    kinds = kinds or "x" * len(scores)
    return evaluation_of(
        [
            outcome_of(item_of(n, video=f"v{n}", kind=kind), score, condition=condition)
            for n, (score, kind) in enumerate(zip(scores, kinds, strict=True))
            if score is not None
        ],
        **options,
    )


def test_difference_and_mcnemar_are_those_of_the_shared_items():
    # 9 items that B alone has right, 3 that A alone has, 4 both: p is that of the formula.
    a = made([0] * 9 + [1] * 3 + [1] * 4 + [1, None], settings={"model": {"name": "a"}, "seed": 0})
    b = made([1] * 9 + [0] * 3 + [1] * 4 + [None, 1], settings={"model": {"name": "b"}, "seed": 0})
    found = compare(a, b, HEADINGS)
    assert found["settings_that_differ"] == ["model.name"]
    (pair,) = found["benchmarks"]["bench"]["comparisons"]
    assert (pair["num_items"], pair["only_a"], pair["only_b"]) == (16, ["q16"], ["q17"])
    official = pair["protocols"]["official"]
    assert (official["num_a_better"], official["num_b_better"]) == (3, 9)
    assert official["difference"] == 0.375
    assert (official["accuracy_a"], official["accuracy_b"]) == (0.4375, 0.8125)
    assert official["mcnemar_p"] == 0.146
    low, high = official["interval"]
    # Standard deviation of the differences: mean square 12/16 less 0.375^2; the interval is about 1.96 of them.
    error = ((12 / 16 - 0.375**2) / 16) ** 0.5
    assert (low, high) == pytest.approx((0.375 - 1.96 * error, 0.375 + 1.96 * error), abs=0.07)
    assert 0.01 < official["p_value"] < 0.15
    assert "| A bench   | 32        | official" in comparison_markdown(found)


def test_holm_is_applied_within_an_axis():
    # x: 6 of 6 for B, p = 2/64; y: 5 of 5, p = 2/32. Adjusted: 2 * 2/64 and max(2/32, that).
    found = compare(made([0] * 11, kinds="x" * 6 + "y" * 5), made([1] * 11, kinds="x" * 6 + "y" * 5), HEADINGS)
    cells = found["benchmarks"]["bench"]["comparisons"][0]["protocols"]["strict"]["by_category"]["kind"]
    assert (cells["x"]["mcnemar_p"], cells["y"]["mcnemar_p"]) == (0.03125, 0.0625)
    assert (cells["x"]["mcnemar_p_holm"], cells["y"]["mcnemar_p_holm"]) == (0.0625, 0.0625)


def test_scores_between_0_and_1_have_no_mcnemar():
    found = compare(made([0.3, 1, 0]), made([0.6, 1, 1]), HEADINGS)
    official = found["benchmarks"]["bench"]["comparisons"][0]["protocols"]["official"]
    assert official["mcnemar_p"] is None and official["mcnemar_note"] == NOT_BINARY
    assert official["difference"] == 0.433333


def test_two_conditions_of_one_directory_are_compared():
    both = evaluation_of(made([0, 1]).outcomes + made([1, 1], condition=Condition(16)).outcomes)
    found = compare(both, both, HEADINGS, conditions=("32", "16"))
    (pair,) = found["benchmarks"]["bench"]["comparisons"]
    assert (pair["condition_a"], pair["condition_b"]) == ("32", "16")
    assert pair["protocols"]["lenient"]["difference"] == 0.5
    with pytest.raises(UserError, match="no answered item in common under '32' and '99' .*bench under 32, 16"):
        compare(both, both, HEADINGS, conditions=("32", "99"))


def test_macro_accuracy_is_compared_as_it_is_reported():
    headings = {"bench": Headings("A bench", ("kind",), macro_axis="kind")}
    found = compare(made([1, 1, 1, 0], kinds="xxxy"), made([1, 0, 0, 1], kinds="xxxy"), headings)
    official = found["benchmarks"]["bench"]["comparisons"][0]["protocols"]["official"]
    assert (official["accuracy_a"], official["accuracy_b"]) == (0.5, 0.666667)
    assert official["difference"] == pytest.approx(1 / 6, abs=1e-6)


def test_a_category_that_is_a_mean_itself_is_compared_as_it_is_reported():
    headings = {"bench": Headings("A bench", ("kind", "level"), macro_axis="kind", inner_axis="level")}
    asked = [
        item_of(number, video=f"v{number}", kind=kind, level=level)
        for number, (kind, level) in enumerate(zip("xxxy", "eehy", strict=True))
    ]
    a, b = (
        evaluation_of([outcome_of(item, score) for item, score in zip(asked, scores, strict=True)])
        for scores in ((1, 1, 0, 1), (1, 0, 1, 1))
    )
    official = compare(a, b, headings)["benchmarks"]["bench"]["comparisons"][0]["protocols"]["official"]
    kind = official["by_category"]["kind"]["x"]  # A: (2/2 + 0/1) / 2, B: (1/2 + 1/1) / 2
    assert (kind["accuracy_a"], kind["accuracy_b"], kind["difference"]) == (0.5, 0.75, 0.25)
    assert (kind["mcnemar_p"], kind["mcnemar_note"]) == (1.0, MACRO)
    assert official["by_category"]["kind"]["y"]["mcnemar_note"] == ""
    assert (official["accuracy_a"], official["accuracy_b"], official["difference"]) == (0.75, 0.875, 0.125)


def test_other_questions_under_the_same_name_are_refused():
    a, b = made([1, 0]), made([1, 0])
    item = b.items[1]
    changed = dataclasses.replace(item, record={**item.record, "solution": "<answer>C</answer>"})
    b = dataclasses.replace(b, items=(b.items[0], changed))
    with pytest.raises(UserError, match="item q1 of bench is not the same question in A and B: its solution differs"):
        compare(a, b, HEADINGS)


def test_nothing_in_common_is_refused():
    with pytest.raises(UserError, match="A and B have no answered item in common"):
        compare(made([1, None]), made([None, 1]), HEADINGS)
    with pytest.raises(UserError, match="no answered item in common .A has bench under 32; B has other under 32"):
        compare(made([1]), evaluation_of([outcome_of(item_of(0, benchmark="other"), 1)]), HEADINGS)
