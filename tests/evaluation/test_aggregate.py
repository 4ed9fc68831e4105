"""results.json: every figure of a small made-up evaluation, worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_ktr.evaluation.item import Answer, Condition
from megatron_ktr.evaluation.registry import load_benchmark
from megatron_ktr.evaluation.results.aggregate import results_of, results_text
from megatron_ktr.evaluation.results.figures import Headings
from tests.support.made_outcomes import INTACT, evaluation_of, item_of, outcome_of

SHUFFLED = Condition(32, "shuffled")
HEADINGS = {"bench": Headings("A bench", ("kind",))}
MACRO = {"bench": Headings("A bench", ("kind",), macro_axis="kind")}


def items(kinds, *, per_video=1):
    return [item_of(number, video=f"v{number // per_video}", kind=kind) for number, kind in enumerate(kinds)]


def condition_of(results, place=0):
    return results["benchmarks"]["bench"]["conditions"][place]


def test_accuracy_is_the_mean_over_items_or_over_categories():
    made = evaluation_of([outcome_of(item, score) for item, score in zip(items("xxxy"), (1, 1, 0, 0.5), strict=True)])
    micro = condition_of(results_of(made, HEADINGS))["protocols"]["official"]
    assert micro["accuracy"] == 0.625
    assert micro["by_category"]["kind"]["x"]["accuracy"] == 0.666667
    assert micro["by_category"]["kind"]["y"] == {"accuracy": 0.5, "interval": None, "num_items": 1}
    macro = condition_of(results_of(made, MACRO))["protocols"]["official"]
    assert macro["accuracy"] == 0.583333  # (2/3 + 1/2) / 2
    low, high = macro["interval"]
    assert low < 0.583333 < high


def test_the_three_difficulties_of_a_direction_count_as_one_type_of_vsibench():
    types = ["object_rel_direction"] * 6 + ["route_planning"] * 2
    difficulties = ["easy"] * 4 + ["medium", "hard"]
    inner = [f"object_rel_direction_{name}" for name in difficulties] + ["route_planning"] * 2
    asked = [
        item_of(number, benchmark="vsibench", video=f"v{number}", type=kind, question_type=name, dataset="scannet")
        for number, (kind, name) in enumerate(zip(types, inner, strict=True))
    ]
    made = evaluation_of([outcome_of(one, score) for one, score in zip(asked, (1, 1, 1, 0, 0, 0, 0, 1), strict=True)])
    results = results_of(made, {"vsibench": Headings.of(load_benchmark("vsibench"))})
    official = results["benchmarks"]["vsibench"]["conditions"][0]["protocols"]["official"]
    # Direction: (3/4 + 0 + 0) / 3 = 0.25, and not 3/6. Overall: (0.25 + 0.5) / 2.
    direction = official["by_category"]["type"]["object_rel_direction"]
    assert (direction["accuracy"], direction["num_items"]) == (0.25, 6)
    assert official["by_category"]["question_type"]["object_rel_direction_easy"]["accuracy"] == 0.75
    assert official["accuracy"] == 0.375
    low, high = official["interval"]
    assert low < 0.375 < high


def test_problems_count_as_wrong_and_are_listed_but_not_in_rates():
    first, second, third = items("xxx")
    made = evaluation_of(
        [
            outcome_of(first, 1, num_tokens=30, seconds=2.0),
            outcome_of(second, {"official": 0, "strict": 0, "lenient": 1}, is_finished=False, has_format=False),
            # A verdict on no answer must not count, whatever it says.
            outcome_of(third, 1, problem="no such file", num_tokens=0, has_format=False),
        ]
    )
    found = condition_of(results_of(made, HEADINGS))
    assert found["problems"] == [{"item_id": "q2", "reason": "no such file"}]
    assert {protocol: values["accuracy"] for protocol, values in found["protocols"].items()} == {
        "official": 0.333333,
        "strict": 0.333333,
        "lenient": 0.666667,
    }
    assert (found["num_answered"], found["num_asked"], found["num_truncated"]) == (3, 2, 1)
    assert found["format_rate"] == 0.5
    assert found["cost"] == {
        "responses": 1.0,
        "response_tokens": 20.0,
        "prompt_tokens": 0.0,
        "frames": 32.0,
        "seconds": 1.5,
    }
    assert found["disagreements"] == [
        {"protocols": ["official", "lenient"], "num_items": 1, "item_ids": ["q1"]},
        {"protocols": ["strict", "lenient"], "num_items": 1, "item_ids": ["q1"]},
    ]


def test_a_run_in_progress_says_so_and_gives_a_lower_bound():
    answered, missing = items("xy")
    results = results_of(evaluation_of([outcome_of(answered, 1)], items=[missing]), MACRO)
    assert (results["complete"], results["num_wanted"], results["num_answered"]) == (False, 2, 1)
    found = condition_of(results)
    assert (found["complete"], found["num_missing"]) == (False, 1)
    assert found["protocols"]["official"]["accuracy"] == 1.0
    assert found["protocols"]["official"]["lower_bound"] == 0.5


def test_a_condition_without_answers_has_no_figures():
    item = item_of(0, kind="x")
    made = evaluation_of([outcome_of(item, 1)])
    unanswered = type(made)(made.settings, made.items, (INTACT, SHUFFLED), made.outcomes)
    found = condition_of(results_of(unanswered, HEADINGS), 1)
    assert found["protocols"]["official"]["accuracy"] is None
    assert found["protocols"]["official"]["lower_bound"] == 0.0
    assert found["format_rate"] is None


def test_order_dependence_leaves_out_items_that_cannot_be_shuffled():
    four = items("xxyy")
    intact = [outcome_of(item, score) for item, score in zip(four, (1, 1, 1, 0), strict=True)]
    shuffled = [
        outcome_of(four[0], 0, condition=SHUFFLED),
        outcome_of(four[1], 1, condition=SHUFFLED),
        outcome_of(four[2], 0, condition=SHUFFLED),
        outcome_of(four[3], 1, condition=SHUFFLED, is_control_felt=False),
    ]
    (control,) = results_of(evaluation_of(intact + shuffled), HEADINGS)["benchmarks"]["bench"]["controls"]
    assert control["measure"] == "order_dependence"
    assert (control["condition"], control["intact"]) == ("32 shuffled", "32")
    assert (control["num_pairs"], control["num_unchanged"]) == (3, 1)
    official = control["protocols"]["official"]
    assert official["difference"] == 0.666667  # intact 3 of 3, shuffled 1 of 3
    assert official["interval"] == [0.0, 1.0]
    assert official["by_category"]["kind"]["x"]["difference"] == 0.5
    assert official["by_category"]["kind"]["y"]["difference"] == 1.0


def test_voting_stands_beside_a_single_answer_with_its_cost():
    votes = Condition(32, scaling="votes:3")
    two = items("xx")
    vote = [Answer("<answer>B</answer>", num_tokens=20, num_frames=32, seconds=0.5)] * 3
    made = evaluation_of(
        [outcome_of(two[0], 0), outcome_of(two[1], 1)]
        + [outcome_of(item, 1, condition=votes, answers=vote) for item in two]
    )
    (scaling,) = results_of(made, HEADINGS)["benchmarks"]["bench"]["scaling"]
    assert scaling["protocols"]["strict"]["difference"] == 0.5
    assert scaling["cost"]["frames"] == 96.0 and scaling["cost_ratio"]["response_tokens"] == 6.0
    assert scaling["cost_ratio"]["prompt_tokens"] is None  # the engine did not tell
    assert scaling["responses"] == {"3": 2}


def test_same_input_gives_same_bytes_in_any_order_of_answers():
    made = evaluation_of([outcome_of(item, n % 3 / 2) for n, item in enumerate(items("xyzxyz" * 5, per_video=3))])
    shuffled = type(made)(made.settings, made.items, made.conditions, made.outcomes[::-1])
    text = results_text(results_of(made, HEADINGS))
    assert text == results_text(results_of(shuffled, HEADINGS))
    assert "NaN" not in text and json.loads(text)["version"] == 1


def test_an_item_with_two_outcomes_is_a_mistake():
    outcome = outcome_of(item_of(0), 1)
    with pytest.raises(ValueError, match="two outcomes of q0"):
        results_of(evaluation_of([outcome, outcome]), {})


def test_only_what_was_asked_has_columns():
    first, second = item_of(0), item_of(1, benchmark="other")
    made = evaluation_of([outcome_of(first, 1), outcome_of(second, 1, condition=SHUFFLED)])
    made = dataclasses.replace(made, asked=(("bench", INTACT), ("other", SHUFFLED)))
    results = results_of(made, {})
    assert results["complete"] and results["num_wanted"] == 2
    names = {name: [c["name"] for c in found["conditions"]] for name, found in results["benchmarks"].items()}
    assert names == {"bench": ["32"], "other": ["32 shuffled"]}
