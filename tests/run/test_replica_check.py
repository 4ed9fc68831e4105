"""Copies of weights are compared over real ranks: one flipped bit is found, and its tensor and rank are named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.replica_checksums import Difference, _combined, checksum
from megatron_ktr.errors import EXIT_ALARM
from megatron_ktr.run.directory import list_checkpoints
from megatron_ktr.run.replica_check import describe
from megatron_ktr.run.step_report import StepReport
from tests.support.layouts import sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.replayed import replay_values, write_text_replay
from tests.support.steps import make_config
from tests.support.tiny import save_tiny_hf

MATRIX, NORM, EMBEDDING = "linear_fc2.weight", "final_layernorm.weight", "word_embeddings.weight"


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replicas")
    save_tiny_hf(directory, num_layers=2, tie_word_embeddings=True)
    return directory


def flips(
    context: RankContext, *, hf_dir: Path, sizes: ParallelSizes, values: dict[str, Any], cases: list[tuple[int, str]]
) -> list[tuple[list[Difference], str | None, bool]]:
    """For each case (rank, end of a tensor's name): what is found after one bit was flipped there, the line that ends
    the run, and whether its state may be saved. The bit is put back afterwards, and then nothing is found."""
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.run.exports import ExportTimes
    from megatron_ktr.run.replica_check import ReplicaCheck, differences_of
    from models.qwen2_5_vl.conversion import named_model_parameters

    ranks = context.init(sizes)
    config = make_config(hf_dir, values, num_prompts=2, sizes=sizes)
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=ranks, platform=current(), num_steps=1)
    incidents: Any = SimpleNamespace(add=lambda *args, **facts: None)
    check = ReplicaCheck(3, policy=policy, incidents=incidents, exports=ExportTimes(5, num_steps=7))
    found = []
    for rank, ending in cases:
        named = list(named_model_parameters(policy.bare_chunks))
        tensors = [parameter for name, parameter in named if name.endswith(ending.removesuffix(" main"))]
        if context.rank == rank:
            tensor: Any = tensors[-1]
            tensor = tensor.main_param if ending.endswith(" main") else tensor
            bits = tensor.detach().view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
            bits[7] ^= 1
        assert check.after_step(StepReport(2, {}, (), tuple)) is None, "not due"
        stop = check.after_step(StepReport(3, {}, (), tuple))
        assert check.before_save(3) is None, "compared already"
        assert check.before_save(4) == stop, "a step that is due to be saved and not to be compared"
        assert all(check.after_step(StepReport(step, {}, (), tuple)) == stop for step in (5, 7)), "before an export"
        found.append((differences_of(policy), stop and stop.reason, stop is None or stop.is_state_sound))
        if context.rank == rank:
            bits[7] ^= 1
        assert differences_of(policy) == []
    return found


def _only(found: list[list[Any]], case: int) -> tuple[Difference, str]:
    """The one difference of a case, which all ranks found."""
    for of_rank in found:
        assert of_rank[case] == found[0][case]
    differences, reason, is_sound = found[0][case]
    assert len(differences) == 1 and reason is not None and not is_sound
    return differences[0], reason


def test_three_replicas_name_the_rank(ranks: RankPool, hf_dir: Path) -> None:
    found = ranks(flips, 3, hf_dir=hf_dir, sizes=ParallelSizes(), values={}, cases=[(2, MATRIX), (0, EMBEDDING)])
    for case, (rank, ending) in enumerate([(2, MATRIX), (0, EMBEDDING)]):
        difference, reason = _only(found, case)
        assert difference.name.endswith(ending) and difference.suspects == (rank,) and difference.is_certain
        assert f"rank {rank} holds another" in reason and ending in reason


def test_two_replicas_can_only_say_one_of_both(ranks: RankPool, hf_dir: Path) -> None:
    values = dict(params_dtype="bf16", optimizer="adam")
    cases = [(1, MATRIX), (1, f"{NORM} main")]
    found = ranks(flips, 2, hf_dir=hf_dir, sizes=ParallelSizes(), values=values, cases=cases)
    for case, what in enumerate([MATRIX, f"{NORM} (fp32 main parameter)"]):
        difference, reason = _only(found, case)
        assert difference.name.endswith(what) and difference.suspects == (0, 1) and not difference.is_certain
        assert "one of the ranks 0, 1 holds" in reason


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2 dp2"])
def test_copies_within_a_replica_are_compared_too(ranks: RankPool, hf_dir: Path, layout: str) -> None:
    """What tensor ranks split is no copy. With a second replica, two comparisons together name the rank."""
    if layout == "pp2":
        # The tied embedding of the first and of the last stage.
        difference, _ = _only(
            ranks(flips, 2, hf_dir=hf_dir, sizes=sizes_of(1, 2), values={}, cases=[(0, EMBEDDING)]), 0
        )
        assert difference.name == "tied word embedding" and difference.suspects == (0, 1)
        return
    size = 4 if layout == "tp2 dp2" else 2
    sizes = sizes_of(2, sp=True)
    found = ranks(flips, size, hf_dir=hf_dir, sizes=sizes, values={}, cases=[(1, NORM), (size - 1, MATRIX)])
    difference, _ = _only(found, 0)
    assert difference.name.endswith(NORM)
    assert (difference.suspects, difference.is_certain) == (((1,), True) if size == 4 else ((0, 1), False))
    if size == 2:
        assert found[0][1] == ([], None, True), "a split matrix has no copy"
    else:
        assert _only(found, 1)[0].suspects == (1, 3)


def train_with_a_flip(context: RankContext, *, config: Config, rank: int, step: int) -> int:
    """The training command's function. After ``step`` one bit of a weight of ``rank`` changes."""
    from megatron_ktr.train import train
    from megatron_ktr.trainer import Trainer

    original = Trainer.train_step

    def step_and_flip(self: Trainer, number: int) -> Any:
        report = original(self, number)
        if (number, context.rank) == (step, rank):
            parameter = next(p for p in self.policy.bare_chunks[0].parameters() if p.requires_grad and p.dim() == 2)
            parameter.detach().view(-1).view(torch.int32)[7] ^= 1
        return report

    Trainer.train_step = step_and_flip
    try:
        return train(config)
    finally:
        Trainer.train_step = original


def test_what_differs_is_not_saved_although_no_comparison_was_due(ranks: RankPool, tmp_path: Path) -> None:
    """Loaded into all ranks, it could never be found again."""
    inputs = write_text_replay(tmp_path)
    changes = dict(train_steps=6, prompts_per_step=2, save_interval=2, replica_check_interval=5)
    config = config_from_values(replay_values(inputs, tmp_path / "run", **changes))
    assert ranks(train_with_a_flip, world_size=2, config=config, rank=1, step=4) == [EXIT_ALARM, EXIT_ALARM]
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "export").exists()
    (incident,) = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    assert (incident["kind"], incident["step"]) == ("replica_mismatch", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checksum_is_exact_in_any_order_and_sees_every_bit(dtype: torch.dtype) -> None:
    values = torch.randn(4099, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()]
    bits = values.view(integers)
    assert int(checksum(values)) == sum(bits.tolist())
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    assert torch.equal(checksum(bits[order].view(dtype)), checksum(values))
    for bit in range(8 * values.element_size() - 1):
        changed = bits.clone()
        changed[1234] ^= 1 << bit
        assert not torch.equal(checksum(changed.view(dtype)), checksum(values))


def test_verdicts_about_the_same_tensor_are_put_together() -> None:
    assert _combined("a", [((0, 1), False)]) == Difference("a", (0, 1), False)
    assert _combined("a", [((1, 3), False), ((2, 3), False)]) == Difference("a", (3,), True)
    assert _combined("a", [((0, 1), False), ((2, 3), False)]) == Difference("a", (0, 1, 2, 3), False)
    assert _combined("a", [((2,), True)]) == Difference("a", (2,), True)
    many = [Difference(f"t{i}", (4,), True) for i in range(7)]
    assert "rank 4 holds another t0, t1, t2, t3, t4 and 2 more" in describe(many)
