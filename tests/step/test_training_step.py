"""One training step is the same step in every layout, and no step at all where there is nothing to learn.

Everything runs through Trainer and Policy on fixed groups with real frames (``tests/support/steps.py``). The yardstick
is one process with one micro-batch per group; ``test_ktr_update_against_hf.py`` holds that one against Hugging Face.
Key tokens are injected: a score at the threshold may fall on either side of it when sums are reordered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.types import RolloutGroup
from tests.support.layouts import BALANCED, FULL, LAYOUTS, OVERLAPPED, PACKED, SMALL, Layout, sizes_of
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import StepDifference, StepRecord, compare_steps, example_groups, run_steps, score_difference
from tests.support.tiny import save_tiny_hf

LOSS_TOLERANCE = 2e-6
"""The loss is a mean of a few terms of at most about 2, each of log-probs with rounding errors of 1e-6."""
SCORE_TOLERANCE = 1e-5
"""Log-probs and entropies in nats: fp32 sums of at most 199 terms in another order, four layers deep."""
VALUE_TOLERANCE = 1e-4
"""Relative, with a floor of 0.01: reported means of the same quantities; the KL is a small difference of log-probs."""
GRADIENT_TOLERANCE = 1e-4
"""Relative per tensor, as against Hugging Face: tensors whose gradient nearly cancels carry the noise of its parts."""
UPDATE_TOLERANCE = 1e-3
"""Relative per tensor, of what SGD changed: the gradients' tolerance, plus the rounding of weights near 1 (6e-8) that
moved by as little as 1e-4. Seen: 5.1e-4, where the gradients differ by 4e-6."""
NUM_STEPS = 2
"""The second step starts from what the first one left in the weights, also where they are still being gathered."""

GROUPS = ("mixed", "text", "long video", "even")
"""Two replicas: the second has only text. Four: only the first and third have media, the last no advantage."""


@dataclass(frozen=True)
class Case:
    """A model, its options, and the steps of a single process."""

    hf_dir: Path
    reference_dir: Path
    initial: dict[str, Tensor]
    values: dict[str, Any]
    expected: list[StepRecord]

    @property
    def masks(self) -> list[dict[str, dict[str, Tensor]]]:
        return [record.chosen for record in self.expected]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, Case]:
    return make_cases(tmp_path_factory, ranks)


def make_cases(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, Case]:
    """Untied without clipping; tied with clipping to a fifth of the gradient's norm."""
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "untied": ({}, {}),
        "tied, clipped": (dict(tie_word_embeddings=True, num_kv_heads=4, seed=2), dict(clip_grad=0.5)),
    }
    found = {}
    for name, (architecture, values) in settings.items():
        hf_dir, reference_dir = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference")
        initial = _published(save_tiny_hf(hf_dir, **architecture))
        save_tiny_hf(reference_dir, **{**architecture, "seed": 9})
        options = dict(hf_dir=hf_dir, reference_dir=reference_dir, values=values, num_steps=NUM_STEPS)
        expected = ranks(run_in_layout, 1, sizes=ParallelSizes(), rollout_groups=example_groups(*GROUPS), **options)[0]
        found[name] = Case(hf_dir, reference_dir, initial, values, expected)
    return found


def _published(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights under the names of published checkpoints; a tied head is the embedding's."""
    names = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    return {name: parameter.clone() for name, parameter in names.items()}


def run_in_layout(context: RankContext, *, sizes: ParallelSizes, **options: Any) -> list[StepRecord]:
    return run_steps(context.init(sizes), **options)


def differences_of(
    context: RankContext, *, layouts: list[Layout], cases: dict[str, Case], groups: list[RolloutGroup]
) -> dict[str, StepDifference]:
    """Every layout's steps against the case's, as seen by this rank."""
    found = {}
    for layout in layouts:
        case = cases[layout.case]
        records = run_steps(
            context.init(layout.sizes),
            hf_dir=case.hf_dir,
            reference_dir=case.reference_dir,
            rollout_groups=groups,
            values={**case.values, **layout.values},
            num_steps=NUM_STEPS,
            masks=case.masks,
            bucket_size=layout.bucket_size,
        )
        found[layout.name] = compare_steps(records, case.expected, initial=case.initial)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_two_steps_are_the_same_in_every_layout(ranks: RankPool, cases: dict[str, Case], world_size: int) -> None:
    """Scores, loss, metrics, gradient norm, gradients and SGD weights, on every rank: replicas cannot drift apart."""
    assert_layouts_agree(ranks, world_size, layouts=LAYOUTS[world_size], cases=cases)


def assert_layouts_agree(ranks: RankPool, world_size: int, *, layouts: list[Layout], cases: dict[str, Case]) -> None:
    """Two steps of ``GROUPS`` in each layout are those of its case, as every rank sees them."""
    for by_name in ranks(differences_of, world_size, layouts=layouts, cases=cases, groups=example_groups(*GROUPS)):
        for name, difference in by_name.items():
            _assert_small(name, difference)


def _assert_small(name: str, difference: StepDifference) -> None:
    limits = dict(
        loss=LOSS_TOLERANCE,
        score=SCORE_TOLERANCE,
        value=VALUE_TOLERANCE,
        gradient=GRADIENT_TOLERANCE,
        update=UPDATE_TOLERANCE,
    )
    for quantity, limit in limits.items():
        assert getattr(difference, quantity) <= limit, f"{name}: {difference}"


def test_the_yardstick_really_steps_clips_and_selects(cases: dict[str, Case]) -> None:
    """Small differences prove nothing where nothing happens."""
    for case in cases.values():
        first, second = case.expected
        assert first.values["has_stepped"] == second.values["has_stepped"] == 1.0
        assert abs(first.updates[0].loss - second.updates[0].loss) > 100 * LOSS_TOLERANCE
        assert first.values["kl"] > 0.05
        assert 0.2 < first.values["key_token_ratio"] < 0.9
        norm = sum(float(gradient.norm() ** 2) for gradient in first.updates[0].gradients.values()) ** 0.5
        # core divides by norm + 1e-6.
        clipped = case.values.get("clip_grad", first.updates[0].grad_norm)
        assert norm == pytest.approx(clipped, rel=1e-5)
        for name, weight in first.weights.items():
            step = -0.1 * first.updates[0].gradients[name]
            # Weights of magnitude 1 are rounded to 6e-8.
            assert torch.allclose(weight - case.initial[name], step, rtol=1e-5, atol=2e-7), name
    untied, clipped = cases.values()
    assert untied.expected[0].updates[0].grad_norm > 1.0
    assert clipped.expected[0].updates[0].grad_norm > 2 * clipped.values["clip_grad"]


def test_two_updates_with_token_mean_are_the_same_in_layouts(ranks: RankPool, cases: dict[str, Case]) -> None:
    """The denominator is known before the first backward, on replicas and stages that see none of the tokens."""
    values = dict(loss_aggregation="token", updates_per_rollout=2)
    expected = ranks(run_in_layout, 1, **_run_options(cases["untied"], values, masked=True))[0]
    assert len(expected[0].updates) == 2
    # The second update finds its weights gathered by nobody but its own forward.
    for sizes, layout in ((sizes_of(1, 2), {}), (sizes_of(2, sp=True), {}), (sizes_of(1, 2), OVERLAPPED)):
        options = _run_options(cases["untied"], {**values, **layout}, masked=True, sizes=sizes)
        for records in ranks(run_in_layout, 4, **options, bucket_size=SMALL):
            _assert_small(f"{sizes} {layout}", compare_steps(records, expected, initial=cases["untied"].initial))


ALGORITHMS: dict[str, dict[str, Any]] = {
    "batch advantage of rewards with KL, sequence ratio, two mini-batches": dict(
        objective="grpo",
        advantage="batch",
        kl_in_reward=True,
        kl_kind="k1",
        ratio="sequence",
        mini_batches=2,
        loss_aggregation="token",
        entropy_bonus=0.01,
    ),
    "key tokens with terms over all tokens, updated twice": dict(
        advantage="leave_one_out",
        loss_aggregation="constant",
        loss_constant=9,
        masked_denominator="all",
        kl_on="all",
        kl_kind="k2",
        sampled_entropy_penalty=0.06,
        dual_clip=1.5,
        updates_per_rollout=2,
    ),
}
FEW_LAYOUTS = {
    "tp2 sp": (sizes_of(2, sp=True), {}),
    "pp2": (sizes_of(1, 2), {}),
    "cp2": (sizes_of(cp=2), {}),
    "dp2 balanced, packed": (sizes_of(), {**BALANCED, **PACKED}),
}


def algorithm_in_layouts(context: RankContext, **options: Any) -> dict[str, list[StepRecord]]:
    return {
        name: run_steps(context.init(sizes), **{**options, "values": {**options["values"], **values}})
        for name, (sizes, values) in FEW_LAYOUTS.items()
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_parts_of_a_policy_gradient_are_the_same_in_layouts(ranks: RankPool, cases: dict[str, Case], name: str) -> None:
    """What they know of the global batch, and of whole responses, does not depend on the ranks that know it."""
    options = _run_options(cases["untied"], ALGORITHMS[name], masked=True)
    expected = ranks(run_in_layout, 1, **options)[0]
    assert len(expected[0].updates) == 2 and expected[0].values["has_stepped"] == 1.0
    del options["sizes"]
    for by_layout in ranks(algorithm_in_layouts, 2, **options):
        for layout, records in by_layout.items():
            _assert_small(layout, compare_steps(records, expected, initial=cases["untied"].initial))


def test_selection_and_shaping_over_the_global_batch_are_the_same_in_layouts(
    ranks: RankPool, cases: dict[str, Case]
) -> None:
    """VPPO with one threshold for all replicas: scores are gathered, and every replica finds its own part."""
    values = {**objective_entry("vppo").defaults, "objective": "vppo", "selection_scope": "batch", "kl_beta": 0.04}
    options = _run_options(cases["untied"], values)
    expected = ranks(run_in_layout, 1, **options)[0]
    assert expected[0].values["advantage_factor_max"] > 1.01
    chosen = {name: by_signal["dependence"] for name, by_signal in expected[0].chosen.items()}
    shares = {name: float(mask.float().mean()) for name, mask in chosen.items() if mask.any()}
    assert max(shares.values()) > 1.2 * min(shares.values()), "one threshold is not one for each prompt"
    del options["sizes"]
    for by_layout in ranks(algorithm_in_layouts, 2, **{**options, "masks": [expected[0].chosen]}):
        for layout, records in by_layout.items():
            _assert_small(layout, compare_steps(records, expected, initial=cases["untied"].initial))
            found = records[0].chosen
            # Rounding may move a token across the threshold.
            assert sum(int((found[name]["dependence"] != chosen[name]).sum()) for name in found) <= 1


def test_only_a_batch_that_is_equal_as_a_whole_has_nothing_to_learn_by_a_batch_advantage(
    ranks: RankPool, cases: dict[str, Case]
) -> None:
    """Every group has equal rewards: those of one replica are 0.7, those of the other 0.7 as well, or 0.2."""
    case = cases["untied"]
    equal = _equal_rewards(example_groups(*GROUPS))
    lower = [_with_accuracy(group, 0.2 if index % 2 else 0.7) for index, group in enumerate(equal)]
    options = _run_options(case, dict(kl_beta=0.0, objective="grpo", advantage="batch"))
    for groups, has_stepped in ((equal, 0.0), (lower, 1.0)):
        for records in ranks(run_in_layout, 2, **{**options, "rollout_groups": groups}):
            assert records[0].values["has_stepped"] == has_stepped
            assert len(records[0].updates) == int(has_stepped), "no pass is run where there is nothing to learn"


def test_an_entropy_bonus_alone_takes_a_step(ranks: RankPool, cases: dict[str, Case]) -> None:
    case = cases["untied"]
    options = _run_options(case, dict(kl_beta=0.0, objective="grpo", entropy_bonus=0.1))
    options["rollout_groups"] = _equal_rewards(example_groups(*GROUPS))
    (record,) = ranks(run_in_layout, 1, **options)[0]
    assert record.values["has_stepped"] == 1.0
    # The mean over responses of means over tokens is near the mean over tokens.
    assert record.values["loss"] == pytest.approx(-0.1 * record.values["entropy"], rel=0.05)


def _run_options(
    case: Case,
    values: dict[str, Any],
    *,
    groups: Sequence[str] = GROUPS,
    sizes: ParallelSizes | None = None,
    masked: bool = False,
) -> dict[str, Any]:
    return dict(
        sizes=sizes or ParallelSizes(),
        hf_dir=case.hf_dir,
        reference_dir=case.reference_dir,
        rollout_groups=example_groups(*groups),
        values={**case.values, **values},
        masks=case.masks if masked else None,
    )


# Nothing to learn


ADAM = dict(optimizer="adam", lr=0.01, weight_decay=0.1, kl_beta=0.0)
"""Momentum and weight decay would move the weights on no evidence."""


@pytest.mark.parametrize("length_bonus", [0.0, 0.2], ids=["no pass is run", "known only after the passes"])
def test_equal_rewards_everywhere_leave_every_bit_of_the_weights(
    ranks: RankPool, cases: dict[str, Case], length_bonus: float
) -> None:
    """With a length bonus the passes have to be run to find out; no response is long enough to get one."""
    case = cases["untied"]
    groups = _equal_rewards(example_groups(*GROUPS))
    values = {**ADAM, "length_bonus": length_bonus, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    for sizes in (ParallelSizes(), sizes_of(1, 2)):
        options = {**_run_options(case, values, sizes=sizes), "rollout_groups": groups, "num_steps": 2}
        for records in ranks(run_in_layout, 2, **options):
            for record in records:
                assert record.values["has_stepped"] == 0.0
                assert [update.has_stepped for update in record.updates] == ([False] if length_bonus else [])
                assert all(torch.equal(record.weights[name], weight) for name, weight in case.initial.items())


def _equal_rewards(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [_with_accuracy(group, 0.7) for group in groups]


def _with_accuracy(group: RolloutGroup, accuracy: float) -> RolloutGroup:
    rollouts = tuple(dataclasses.replace(rollout, rewards={"accuracy": accuracy}) for rollout in group.rollouts)
    return dataclasses.replace(group, rollouts=rollouts)


def test_replica_without_any_advantage_takes_the_same_step_as_the_others(
    ranks: RankPool, cases: dict[str, Case]
) -> None:
    """Its own gradient is zero; the collectives still find it, and it moves by its neighbours' gradient."""
    case = cases["untied"]
    options = _run_options(case, dict(kl_beta=0.0))
    first, second = example_groups("mixed", "long video")
    nothing = _equal_rewards(example_groups("text", "image"))
    options["rollout_groups"] = [first, nothing[0], second, nothing[1]]
    expected = ranks(run_in_layout, 1, **options)[0]
    options["masks"] = [expected[0].chosen]
    for overlap in (False, True):
        options["values"] = {"kl_beta": 0.0, "overlap_grad_reduce": overlap}
        for records in ranks(run_in_layout, 2, **options):
            assert records[0].values["has_stepped"] == 1.0
            _assert_small(f"overlap {overlap}", compare_steps(records, expected, initial=case.initial))


# Weight decay, frozen parts and learning rates


def test_weight_decay_leaves_biases_and_reaches_norms_where_asked(ranks: RankPool, cases: dict[str, Case]) -> None:
    """SGD's decay is a pull of lr * decay * weight beside the gradient, which is the same in all three runs."""
    case, decay = cases["untied"], 0.5
    found = {}
    for name, values in {
        "none": dict(weight_decay=0.0),
        "default": dict(weight_decay=decay),
        "norms too": dict(weight_decay=decay, weight_decay_norms=True),
    }.items():
        (record,) = ranks(run_in_layout, 1, **{**_run_options(case, values), "num_steps": 1})[0]
        found[name] = record.weights
    kinds = set()
    for name, initial in case.initial.items():
        kind = "bias" if name.endswith("bias") else "norm" if initial.ndim == 1 else "matrix"
        kinds.add(kind)
        for run, decayed in {"default": {"matrix"}, "norms too": {"matrix", "norm"}}.items():
            pull = 0.1 * decay * initial if kind in decayed else torch.zeros_like(initial)
            # fp32 of weights of order one.
            torch.testing.assert_close(found[run][name], found["none"][name] - pull, rtol=0, atol=1e-6, msg=name)
    assert kinds == {"bias", "norm", "matrix"}


def _part(name: str) -> str:
    if not name.startswith("visual."):
        return "language"
    return "merger" if name.startswith("visual.merger.") else "vision"


FREEZES = [
    ("vision",),
    ("merger",),
    ("language",),
    ("vision", "merger"),
    ("merger", "language"),
    ("vision", "language"),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_frozen_parts_keep_every_bit_and_the_rest_trains_as_before(
    ranks: RankPool, cases: dict[str, Case], world_size: int
) -> None:
    """Under pipeline parallelism a frozen language model leaves later stages without a single parameter to train;
    they still carry the gradient to the vision encoder. Every second replica sees text alone."""
    runs = {
        1: [(freeze, ParallelSizes(), {}, "untied") for freeze in FREEZES],
        2: [
            (("language",), sizes_of(1, 2), {}, "untied"),
            (("language",), sizes_of(1, 2), {}, "tied, clipped"),
            (("language",), sizes_of(1, 2, vpp=2), FULL, "untied"),
            (("vision", "merger"), sizes_of(1, 2), {}, "tied, clipped"),
            (("language",), sizes_of(2, sp=True), FULL, "untied"),
            (("language",), ParallelSizes(), OVERLAPPED, "untied"),
            (("vision", "merger"), ParallelSizes(), OVERLAPPED, "tied, clipped"),
        ],
        4: [
            (("language",), sizes_of(1, 2), OVERLAPPED, "untied"),
            (("merger",), sizes_of(1, 2), OVERLAPPED, "tied, clipped"),
            (("vision", "language"), sizes_of(2, 2, sp=True), {}, "untied"),
        ],
    }[world_size]
    for freeze, sizes, values, name in runs:
        case = cases[name]
        options = _run_options(case, {**values, "freeze": freeze, "clip_grad": 0.0}, sizes=sizes, masked=True)
        for records in ranks(run_in_layout, world_size, **options):
            _assert_frozen(records[0], case, freeze, f"{freeze} {sizes} {name}")


def _assert_frozen(record: StepRecord, case: Case, freeze: Sequence[str], run: str) -> None:
    whole = case.expected[0].updates[0]
    # The yardstick's gradients were scaled down where it clips.
    scale = max(1.0, whole.grad_norm / case.values.get("clip_grad", float("inf")))
    expected = {name: scale * g for name, g in whole.gradients.items() if _part(name) not in freeze}
    assert expected and record.values["has_stepped"] == 1.0, run
    moved = {name: weight - case.initial[name] for name, weight in record.weights.items()}
    frozen = moved.keys() - expected.keys()
    assert frozen and all(not moved[name].any() for name in frozen), run
    gradients = record.updates[0].gradients
    if gradients is not None:
        assert gradients.keys() == expected.keys(), run
        assert max_relative_difference(gradients, expected) <= GRADIENT_TOLERANCE, run
    steps = {name: -0.1 * gradient for name, gradient in expected.items()}
    _assert_moved(moved, steps)


def _assert_moved(moved: dict[str, Tensor], steps: dict[str, Tensor]) -> None:
    for name, step in steps.items():
        # Weights between 1 and 2 are rounded to 1.2e-7, which the smallest steps feel.
        limit = 1.5e-7 + GRADIENT_TOLERANCE * float(step.abs().max())
        assert float((moved[name] - step).abs().max()) <= limit, name


def test_vision_learning_rate_is_the_vision_encoders_alone(ranks: RankPool, cases: dict[str, Case]) -> None:
    case = cases["untied"]
    options = _run_options(case, dict(vision_lr=0.03), sizes=sizes_of(1, 2), masked=True)
    for records in ranks(run_in_layout, 2, **options):
        moved = {name: weight - case.initial[name] for name, weight in records[0].weights.items()}
        rates = {name: 0.1 if _part(name) == "language" else 0.03 for name in moved}
        gradients = case.expected[0].updates[0].gradients
        steps = {name: -rates[name] * gradient for name, gradient in gradients.items()}
        _assert_moved(moved, steps)


# Lower precision


@pytest.mark.parametrize("sizes", [ParallelSizes(), sizes_of(2, 2, sp=True)], ids=["one rank", "tp2 pp2 sp"])
def test_bf16_step_stays_near_fp32_and_keeps_gradients_in_fp32(
    ranks: RankPool, cases: dict[str, Case], sizes: ParallelSizes
) -> None:
    case = cases["untied"]
    options = _run_options(case, {"params_dtype": "bf16"}, sizes=sizes, masked=True)
    expected = case.expected[0]
    for records in ranks(run_in_layout, sizes.model, **options):
        update = records[0].updates[0]
        assert update.gradient_dtypes == {torch.float32}
        assert {weight.dtype for weight in records[0].weights.values()} == {torch.bfloat16}
        assert update.has_stepped
        for name, columns in records[0].scores.items():
            for key, values_R in columns.items():
                # Log-probs around -5 of hidden states rounded to 8 bits (0.4%) some twenty times.
                assert score_difference(values_R, expected.scores[name][key]) < 0.1, (name, key)
        # Ratios are 1 and advantages exact: only the KL term, 0.04 * about 0.4, feels the rounding.
        assert abs(update.loss - expected.updates[0].loss) < 5e-3
        # Every tensor's direction: rounding is random, gradients are not.
        for name, gradient in update.gradients.items():
            cosine = torch.cosine_similarity(gradient.flatten(), expected.updates[0].gradients[name].flatten(), dim=0)
            assert cosine > 0.9, (name, float(cosine))


def test_sgd_with_the_distributed_optimizer_is_refused(one_rank: ParallelGroups, cases: dict[str, Case]) -> None:
    from megatron_ktr.errors import UserError

    case = cases["untied"]
    with pytest.raises(UserError, match="use-distributed-optimizer"):
        run_steps(
            one_rank,
            hf_dir=case.hf_dir,
            rollout_groups=example_groups(*GROUPS),
            values=dict(optimizer="sgd", use_distributed_optimizer=True),
        )
