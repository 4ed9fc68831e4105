"""Vision that does not reach the loss shows in the metrics of a step, in a model that is broken and in no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.policy.vision_watch import ALIKE, NO_SHIFT, VISION_FAULTS, spread, vision_faults
from megatron_ktr.types import RolloutGroup
from tests.support.layouts import sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf

ALIKE_FAULTS = {"vision/tokens_alike", "vision/videos_alike"}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], set[str]]] = {
    # name: how the model is broken, groups, options, what is found
    "as it should be": ("", ("mixed", "long video"), {}, set()),
    "frozen encoder": ("", ("mixed", "long video"), dict(freeze=("vision", "merger")), set()),
    "text alone": ("constant", ("text", "even"), {}, set()),
    "the same video twice": ("", ("long video", "long video"), {}, set()),
    "constant features": ("constant", ("mixed", "long video"), {}, ALIKE_FAULTS),
    "constant features of one video": ("constant", ("long video",), {}, ALIKE_FAULTS - {"vision/videos_alike"}),
    "a frozen encoder with constant features": (
        "constant",
        ("mixed", "long video"),
        dict(freeze=("vision", "merger"), objective="grpo"),
        ALIKE_FAULTS,
    ),
    "a video whose answers are all as good, beside a text": (
        "equal",
        ("text", "long video"),
        dict(objective="grpo", kl_beta=0.0),
        set(),
    ),
    "features that the model drops": ("dropped", ("mixed", "long video"), {}, {"vision/no_gradient"}),
}


def _with_equal_rewards(group: RolloutGroup) -> RolloutGroup:
    rewards = group.rollouts[0].rewards
    rollouts = tuple(dataclasses.replace(one, rewards=rewards) for one in group.rollouts)
    return dataclasses.replace(group, rollouts=rollouts)


def faults_of(context: RankContext, *, hf_dir: Path) -> dict[str, tuple[set[str], dict[str, float]]]:
    """For each case: the faults among the metrics of a step, and the numbers that they are found by."""
    parallel = context.init(sizes_of(1, 2))
    found = {}
    for name, (broken, groups, values, _) in CASES.items():
        watched: dict[str, float] = {}

        def break_model(policy: Any, broken: str = broken, watched: dict[str, float] = watched) -> None:
            update, features = policy.update, policy.vision.with_features
            for vision in policy.vision._passes.values():
                if vision is not None and broken == "constant":
                    encode = vision._encoder
                    vision._encoder = lambda *args, encode=encode: encode(*args) * 0.0 + 0.3

            def dropped(*args: Any, **kwargs: Any) -> Any:
                batch = features(*args, **kwargs)
                features_ED = batch.features_ED
                return batch if features_ED is None else dataclasses.replace(batch, features_ED=features_ED * 0.0)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                result = update(*args, **kwargs)
                watched.update(result.watched)
                return result

            policy.update = recorded
            if broken == "dropped":
                policy.vision.with_features = dropped

        numbered = [group for i, one in enumerate(groups) for group in example_groups(one, problem_suffix=str(i))]
        if broken == "equal":
            numbered = [group if not group.prompt.media else _with_equal_rewards(group) for group in numbered]
        records = run_steps(parallel, hf_dir=hf_dir, rollout_groups=numbered, values=values, before=break_model)
        found[name] = {one for one in VISION_FAULTS if records[0].values.get(one)}, watched
        assert not [one for one in records[0].values if one.startswith("watched/")]
    return found


def test_a_broken_model_is_told_from_sound_ones(ranks: RankPool, tmp_path: Path) -> None:
    """Over two pipeline stages: the first has the features, the last the scores, and every rank says the same."""
    save_tiny_hf(tmp_path, num_layers=2)
    first, second = ranks(faults_of, 2, hf_dir=tmp_path)
    assert first == second
    assert {name: faults for name, (faults, _) in first.items()} == {name: case[3] for name, case in CASES.items()}
    _, sound = first["as it should be"]
    assert sound["token_spread"] > 10 * ALIKE and sound["video_spread"] > 5 * ALIKE and sound["gradient_max"] > 0
    assert sound["shift/hidden"] > 10 * NO_SHIFT
    _, text = first["text alone"]
    assert "token_spread" not in text


def test_rounding_is_no_difference_and_a_shift_within_the_noise_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(64, generator=generator)
    rows = row.expand(100, 64) * (1 + torch.randn(100, 64, generator=generator) * 2**-9)
    assert (
        float(spread(rows.to(torch.bfloat16))) < ALIKE < 0.5 < float(spread(torch.randn(100, 64, generator=generator)))
    )
    assert float(spread(torch.zeros(3, 4))) == 0.0
    watched = {"token_spread": 1.0, "shift/hidden": 0.03, "shift/shuffled": 0.0}
    assert vision_faults(watched, has_stepped=True) == {}, "the order of frames may well not matter"
    assert vision_faults(watched, has_stepped=True, noise=0.05) == {"vision/no_shift": 1.0}
    assert vision_faults({"shift/hidden": 0.0}, has_stepped=True) == {}, "nothing was shown"
    still = {"token_spread": 1.0, "gradient_max": 0.0}
    assert vision_faults(still, has_stepped=False) == {}
    assert vision_faults(still, has_stepped=True) == {"vision/no_gradient": 1.0}
