"""Options of policy gradients: every preset is one line, and what would not act is refused or said."""

from __future__ import annotations

import pytest

from megatron_ktr.config import load_config
from megatron_ktr.config.load import save_resolved
from megatron_ktr.config.objective_registry import BUILT_IN, objective_entry
from megatron_ktr.config.policy_gradient_rules import notes
from megatron_ktr.errors import UserError
from tests.config.test_config import MINIMAL, ONLINE, SFT, error_of


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "sft"])
def test_an_objective_is_one_line_and_what_is_given_wins(name):
    for engine in ([], ONLINE):
        config = load_config([*MINIMAL, *engine, "--objective", name])
        for option, value in objective_entry(name).defaults.items():
            section = next(s for s in (config.objective, config.rollout, config.reward) if hasattr(s, option))
            assert getattr(section, option) == value
    given = load_config([*MINIMAL, "--objective", name, "--kl-beta", "0.3", "--clip-high", "0.4"])
    assert (given.objective.kl_beta, given.objective.clip_high) == (0.3, 0.4)


REFUSED = {
    "--mini-batches 3": "--mini-batches 3 must divide --prompts-per-step 8",
    "--mini-batches 0": "mini_batches",
    "--advantage-over tokens": "--advantage-over tokens needs an --advantage over the global batch, such as batch",
    "--advantage batch --original-compat": "--original-compat does not go with --advantage batch",
    "--advantage mean": "group_mean",
    "--num-generations 1": "only --advantage batch does not",
    "--advantage batch_baseline --num-generations 1": "--num-generations must be at least 2",
    "--loss-constant 100": "--loss-constant needs --loss-aggregation constant, got sequence",
    "--ratio sequence --dual-clip 3": "--dual-clip needs --ratio token, got sequence",
    "--dual-clip 1": "dual_clip",
    "--ratio-cap 3": "--ratio-cap needs --ratio cispo, got token",
    "--kl-in-reward --kl-kind k3_plus": "choose --kl-kind k3",
    "--kl-kind full --kl-beta 0": "needs --kl-beta above 0; --measure-full-kl reports",
    "--kl-in-reward --kl-on all": "--kl-on is not read with --kl-in-reward",
    "--objective gspo --kl-in-reward": "--kl-in-reward needs --kl-beta above 0",
    "--kl-beta 0 --kl-on all": "--kl-on needs --kl-beta above 0",
    "--signals entropy --token-weights rank --selection-ratio 0.3": "--selection-ratio is not read",
    "--signals entropy --token-weights soft_mask --selection-rule rank": "--selection-rule is not read",
    "--entropy-bonus -1": "entropy_bonus",
    "--mini-batches 2 --train-steps 5 --lr-warmup-steps 11": "exceeds the 10 optimizer steps",
    "--objective tw_grpo --tw-weight-gradient --mini-batches 2": "--mini-batches 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_would_not_act_is_refused_in_words(flags):
    assert REFUSED[flags] in error_of([*MINIMAL, "--prompts-per-step", "8", *flags.split()])


def test_supervised_training_refuses_options_of_policy_gradients():
    for flags in (["--advantage", "batch"], ["--ratio", "cispo"], ["--kl-in-reward"], ["--entropy-bonus", "0.1"]):
        assert f"{flags[0]} is not read by --objective sft" in error_of([*MINIMAL, *SFT, *flags])
    assert "choose sequence or token" in error_of([*MINIMAL, *SFT, "--loss-aggregation", "constant"])
    assert load_config([*MINIMAL, *SFT, "--prompts-per-step", "8", "--mini-batches", "2"]).objective.num_updates == 2


def test_one_response_for_each_prompt_is_enough_for_a_batch_advantage():
    config = load_config([*MINIMAL, "--objective", "reinforce_pp", "--num-generations", "1"])
    assert config.rollout.num_generations == 1


def test_a_ratio_that_cannot_act_and_a_kl_without_gradient_are_said():
    def told(*flags):
        return notes(load_config([*MINIMAL, "--prompts-per-step", "8", *flags]))

    (line,) = told("--objective", "gspo")
    assert line.startswith("ratio sequence: with one update per rollout every ratio is 1")
    assert told("--objective", "gspo", "--mini-batches", "4") == told("--objective", "grpo") == []
    assert (
        told("--dual-clip", "3")[0].startswith("dual_clip 3:")
        and told("--dual-clip", "3", "--updates-per-rollout", "2") == []
    )
    assert "no gradient in expectation" in told("--kl-kind", "k1")[0]
    assert told("--kl-kind", "k1", "--kl-in-reward") == told("--kl-kind", "k1", "--kl-beta", "0") == []
    assert "objective dapo has no KL (kl_beta 0)" in told("--objective", "dapo", "--kl-kind", "k2")[0]
    several = ("--objective", "cispo", "--mini-batches", "4")
    assert told(*several) == [] and told(*several, "--clip-high", "5")[0].startswith("clip_high 5: ratio cispo has no")


def test_a_preset_whose_options_are_overridden_says_which(tmp_path):
    grpo = load_config([*MINIMAL, "--objective", "grpo"])
    save_resolved(grpo, tmp_path / "config.yaml")
    assert notes(grpo) == []
    # The file holds every option of GRPO, so that nothing but the name is left of DAPO.
    (line,) = notes(load_config(["--config", str(tmp_path / "config.yaml"), "--objective", "dapo"]))
    assert line.startswith("dapo with other options than its own: loss_aggregation sequence (not token), ")
    for part in ("clip_high 0.2 (not 0.28)", "kl_beta 0.04 (not 0)", "filter_groups off (not equal)"):
        assert part in line
    assert "clip_low" not in line
    lines = notes(load_config([*MINIMAL, "--objective", "rloo", "--kl-beta", "0"]))
    assert lines == ["rloo with other options than its own: kl_beta 0 (not 0.05)"]


def test_mini_batches_that_leave_a_replica_without_prompts_are_refused():
    from megatron_ktr.distributed.groups import ParallelSizes
    from megatron_ktr.run.preflight import check_micro_batches

    config = load_config([*MINIMAL, "--prompts-per-step", "8", "--mini-batches", "4"])
    check_micro_batches(config, sizes=ParallelSizes(), data_size=2)
    with pytest.raises(
        UserError, match="--mini-batches 4 needs prompts for every replica in each: 2 prompts per replica"
    ):
        check_micro_batches(config, sizes=ParallelSizes(), data_size=4)
    interleaved = ParallelSizes(pipeline=2, virtual_pipeline=2)
    with pytest.raises(UserError, match="per replica and optimizer step, got 1 = 1 prompts"):
        check_micro_batches(config, sizes=interleaved, data_size=2)
