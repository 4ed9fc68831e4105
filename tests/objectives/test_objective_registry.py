"""An objective that registers itself in this file is trained with by its name; words are known without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config import OPTIONS, config_from_values, configuration_page, load_config, words
from megatron_ktr.config import objective_registry as registry
from megatron_ktr.config.sections import ObjectiveSection, RolloutSection
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.policy_gradient import BuildContext, PolicyGradient, build_policy_gradient
from megatron_ktr.types import BatchFacts, ScoredBatch, TokenScores, TokenStreams
from tests.support.groups import MEDIA, group_of, video
from tests.support.objectives import grpo
from tests.support.paths import REPOSITORY

MINIMAL = ["--model", "some/model", "--replay-path", "rollouts.jsonl"]


class Doubled:
    """Doubles every weight."""

    needs_divergence = False
    needs_divergence_gradient = False

    def shape(self, streams: TokenStreams, item: ScoredBatch, facts: BatchFacts) -> TokenStreams:
        return dataclasses.replace(streams, weight_R=2 * streams.weight_R)


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


@pytest.fixture
def doubled(monkeypatch):
    for name in registry.BUILT_IN:
        registry.objective_entry(name)  # imported now, they register for good and not only for this test
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register(DOUBLED)


def test_an_objective_of_ones_own_is_configured_by_name(doubled):
    config = load_config([*MINIMAL, "--objective", "doubled_grpo", "--num-shuffles", "3"])
    assert config.objective.objective == "doubled_grpo" and config.samples is False, "recorded responses"
    assert "doubled_grpo" in OPTIONS["objective"].choices
    assert "| `doubled_grpo` | Doubled GRPO | GRPO, twice | `num_shuffles` |" in configuration_page()
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
