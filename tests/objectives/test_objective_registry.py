"""An objective and a signal that register themselves in this file are trained with by their names, reported and
planned; words are known without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_ktr.accounting.planner import Request, find_plans
from megatron_ktr.accounting.rates import settings_of
from megatron_ktr.attribution.signals.base import Signal
from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config import (
    OPTIONS,
    config_from_values,
    configuration_page,
    load_config,
    save_resolved,
    signal_registry,
    words,
)
from megatron_ktr.config import objective_registry as registry
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.sections import ObjectiveSection, RolloutSection
from megatron_ktr.config.signal_registry import SignalEntry
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.policy_gradient import BuildContext, PolicyGradient, build_policy_gradient
from megatron_ktr.report.html import write_report
from megatron_ktr.rollout.replay import write_rollouts
from megatron_ktr.types import BatchFacts, ResponseSelection, ScoredBatch, TokenScores, TokenStreams
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.groups import MEDIA, group_of, video
from tests.support.objectives import grpo
from tests.support.paths import REPOSITORY
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf

MINIMAL = ["--model", "some/model", "--replay-path", "rollouts.jsonl"]


class Doubled:
    """Doubles every weight."""

    needs_divergence = False
    needs_divergence_gradient = False

    def shape(self, streams: TokenStreams, item: ScoredBatch, facts: BatchFacts) -> TokenStreams:
        return replace(streams, weight_R=2 * streams.weight_R)


def build_doubled(section: ObjectiveSection, context: BuildContext) -> PolicyGradient:
    return build_policy_gradient(section, context, shapings=(Doubled(),))


def rules_of_doubled(section: ObjectiveSection, rollout: RolloutSection) -> Iterator[str]:
    if rollout.num_generations % 2:
        yield "--num-generations must be even for --objective doubled_grpo"


DOUBLED = registry.ObjectiveEntry(
    "doubled_grpo",
    "Doubled GRPO",
    "GRPO, twice",
    build_doubled,
    rules=(rules_of_doubled,),
    own_options=("num_shuffles",),
    defaults={"clip_high": 0.28, "max_response_length": 512},
)


def surprise(scores: TokenScores, dtype: torch.dtype) -> torch.Tensor:
    return -scores.policy_logprob_R


SURPRISE = SignalEntry("surprise", "that the model held for improbable", lambda section: Signal("surprise", surprise))


@pytest.fixture
def doubled(monkeypatch):
    for name in registry.BUILT_IN:
        registry.objective_entry(name)  # imported now, they register for good and not only for this test
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register(DOUBLED)
    monkeypatch.setattr(signal_registry, "_entries", dict(signal_registry._entries))
    signal_registry.register_signal(SURPRISE)


def test_an_objective_of_ones_own_is_configured_by_name(doubled):
    config = load_config([*MINIMAL, "--objective", "doubled_grpo", "--num-shuffles", "3"])
    assert config.objective.objective == "doubled_grpo" and config.samples is False, "recorded responses"
    assert "doubled_grpo" in OPTIONS["objective"].choices
    sets = "`clip_high 0.28`, `max_response_length 512`"
    assert f"| `doubled_grpo` | Doubled GRPO | GRPO, twice | {sets} | `num_shuffles` |" in configuration_page()
    assert (config.objective.clip_high, config.rollout.max_response_length) == (0.28, 512), "its own defaults"
    given = load_config([*MINIMAL, "--objective", "doubled_grpo", "--clip-high", "0.2"])
    assert (given.objective.clip_high, given.rollout.max_response_length) == (0.2, 512), "what is given wins"
    with pytest.raises(UserError, match="did you mean doubled_grpo"):
        load_config([*MINIMAL, "--objective", "dubled_grpo"])
    with pytest.raises(UserError, match="must be even"):
        load_config([*MINIMAL, "--objective", "doubled_grpo", "--num-generations", "3"])
    with pytest.raises(UserError, match="--num-shuffles is not read by --objective grpo"):
        load_config([*MINIMAL, "--objective", "grpo", "--num-shuffles", "3"])
    with pytest.raises(ValueError, match="two objectives"):
        registry.register(registry.ObjectiveEntry("doubled_grpo", "", "", build_doubled))


def test_it_is_built_and_gives_token_streams(doubled):
    section = config_from_values({"objective": "doubled_grpo", "kl_beta": 0.0}).objective
    objective = build_objective(section)
    group = group_of(1, video(4), responses=[[3] * 3, [3] * 2])
    batch = pack_groups([group], view="intact", media=MEDIA)
    scores = TokenScores(policy_logprob_R=torch.zeros(5))
    item = ScoredBatch(batch, scores, [group])
    ours = objective.token_streams(item, BatchFacts(2))
    theirs = grpo(kl_beta=0.0).token_streams(item, BatchFacts(2))
    assert torch.equal(ours.weight_R, 2 * theirs.weight_R) and torch.equal(ours.advantage_R, theirs.advantage_R)


def test_they_are_trained_with_reported_and_planned_without_another_file(doubled, one_rank, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    save_tiny_hf(model)
    groups = example_groups("mixed", "text")
    values = dict(objective="doubled_grpo", selection="signals", signals=("surprise",), selection_ratio=(0.25,))
    values |= dict(kl_beta=0.0, selection_rule="rank")
    (record,) = run_steps(one_rank, hf_dir=model, rollout_groups=groups, values=values)
    assert record.updates[0].has_stepped and record.values["key_token_ratio/surprise"] == pytest.approx(0.25, abs=0.05)
    for group in groups:
        mask_R = record.chosen[group.prompt.problem_id]["surprise"]
        logprob_R = record.scores[group.prompt.problem_id]["policy_logprob_R"]
        assert logprob_R[mask_R].max() < logprob_R[~mask_R].min()
    half = dict(values, objective="grpo")
    (other,) = run_steps(one_rank, hf_dir=model, rollout_groups=groups, values=half)
    assert record.updates[0].loss == pytest.approx(2 * other.updates[0].loss, rel=1e-6)

    config = config_from_values({**values, "model": str(model), "run_dir": str(run)})
    marks = [map(tuple, record.key_tokens[group.prompt.problem_id]) for group in groups]
    chosen = [[ResponseSelection(mask, {"surprise": mask}) for mask in of_group] for of_group in marks]
    asked = {"problem": "Which?", "problem_type": "multiple choice", "solution": "<answer>A</answer>", "options": ["A"]}
    shown = [replace(group, prompt=replace(group.prompt, record=asked)) for group in groups]
    write_rollouts(run / "rollouts" / "step_00000001.jsonl", shown, selections=chosen)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, **record.values}) + "\n")
    save_resolved(config, run / "config.yaml")
    page = tmp_path / "report.html"
    write_report([(None, run)], out=page)
    text = page.read_text()
    for expected in ("Doubled GRPO", "surprise", SURPRISE.meaning, "doubled_grpo"):
        assert expected in text, expected

    settings = settings_of(StepOptions.of(config), build_objective(config.objective))
    assert settings.views == () and not settings.has_reference
    plans = find_plans(Request(PUBLISHED_CONFIGS["7B"], num_gpus=8, gpu_memory_gb=80, num_frames=16, settings=settings))
    assert plans and "--tensor-model-parallel-size" in plans[0].flags


def test_names_of_signals_are_unique_and_not_those_of_controls(doubled):
    for name in ("surprise", "random", "weighted"):
        with pytest.raises(ValueError, match=name):
            signal_registry.register_signal(SignalEntry(name, "", lambda section: None))


def test_configuration_and_its_words_are_read_without_torch():
    program = "import sys; import megatron_ktr.config, megatron_ktr.config.words; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert answer.stdout.strip() == "False"


def test_every_built_in_objective_registers_under_the_name_of_its_file():
    for name in registry.BUILT_IN:
        assert registry.objective_entry(name).name == name
        assert (REPOSITORY / "megatron_ktr" / "objectives" / f"{name}.py").is_file()


def test_default_lists_have_words_of_their_types():
    assert ObjectiveSection().signals == words.SIGNALS
