"""A resumed run is the run that was never stopped: same layout bit for bit, other layouts to rounding.

The runs below train on recorded rollouts of a tiny model (text and one video) with plain GRPO: key-token selection has
thresholds, at which a rounding difference between layouts flips a whole token.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.synthetic import DEFAULT_TASKS, corpus, draw_scene, record_of, render, write_video
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.files.torch_dist_files import TorchDistReader
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.build import build_local_source
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.checkpoint_state import load_sharded_state
from megatron_ktr.run.directory import list_checkpoints, open_run_directory, step_name
from megatron_ktr.run.metrics import MetricsWriter
from megatron_ktr.trainer import Trainer
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.dist_checkpoint import convert_to_hf
from models.qwen2_5_vl.media import media_spec
from tests.support.parity import hf_logprobs, make_group, pack
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ranks import RankError
from tests.support.tiny import VOCAB_SIZE, save_tiny_hf

LOSS_TOLERANCE = 1e-6
"""Losses are 0.03 and 0.33; other layouts add the same fp32 numbers in another order. Seen: 2.5e-7."""
GRADIENT_TOLERANCE = 1e-5
"""Of the gradient norm; after an Adam step, which magnifies rounding in gradients near zero. Seen: 1e-6."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """``model/`` and ``rollouts.jsonl``: seven questions, the first with a video, three responses each."""
    out = tmp_path_factory.mktemp("data")
    save_tiny_model(
        out / "model", corpus=corpus(), hidden_size=64, ffn_size=96, num_layers=4, vision_hidden_size=32, vision_depth=1
    )
    rng = random.Random(0)
    lines = []
    for number in range(7):
        scene = draw_scene(DEFAULT_TASKS[number % len(DEFAULT_TASKS)], rng)
        record = record_of(scene, problem_id=str(number), path="clip.mp4")
        if number == 0:
            write_video(out / "clip.mp4", render(scene))
        else:
            # A question about colours without its video is as good a text as any.
            record = {name: record[name] for name in ("problem_id", "problem", "problem_type", "solution")}
        record["responses"] = [
            {"text": " ".join(rng.choices(corpus()[0].split() + ["red", "blue"], k=4)), "reward": float(reward)}
            for reward in (0, 1, number % 3)
        ]
        lines.append(json.dumps(record))
    (out / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def run_config(data_dir: Path, run_dir: Path, **values: Any) -> Config:
    defaults = dict(
        model=str(data_dir / "model"),
        prompt_template=str(data_dir / "model" / "prompt_template.txt"),
        replay_path=str(data_dir / "rollouts.jsonl"),
        num_generations=3,
        objective="grpo",
        kl_beta=0.5,
        length_bonus=0.0,
        lr=1e-3,
        lr_warmup_steps=2,
        train_steps=4,
        prompts_per_step=4,
        save_interval=2,
        run_dir=str(run_dir),
        seed=3,
    )
    return config_from_values(defaults | values)


def split(config: Config) -> ParallelSizes:
    parallel = config.parallel
    return ParallelSizes(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )


def train(config: Config, ranks: ParallelGroups) -> dict[str, Any]:
    """As train.py does it; what came out of it."""
    start = broadcast_object(open_run_directory(config) if ranks.rank == 0 else None, group=ranks.world, source=0)
    model_dir = config.model.model
    model_config = Qwen2_5_VLConfig.from_hf(model_dir)
    media = media_spec(model_config, patchify=PreprocessSettings.from_model(model_dir).patchify)
    vocab_size = model_config.text.vocab_size
    tokenizer = load_tokenizer(model_dir)
    local = build_local_source(config, ranks=ranks, tokenizer=tokenizer, vocab_size=vocab_size)
    source = ReplicaSource(local, ranks=ranks)
    num_steps = config.trainer.train_steps
    policy = Policy(model_dir, options=PolicyOptions.of(config), ranks=ranks, platform=current(), num_steps=num_steps)
    objective = build_objective(config.objective, reward=config.reward)
    policy.add_reference()
    trainer = Trainer(options=StepOptions.of(config), policy=policy, source=source, objective=objective, media=media)
    checkpoints = Checkpoints(start.run_dir, policy=policy, source=trainer, options=CheckpointOptions.of(config))
    if start.checkpoint:
        assert checkpoints.load(start.checkpoint) == start.step
    writer = MetricsWriter(start.run_dir if ranks.rank == 0 else None, first_step=start.step + 1)
    losses, problems = {}, {}
    for step in range(start.step + 1, num_steps + 1):
        report = trainer.train_step(step)
        writer.write(step, report.values)
        checkpoints.after_step(step)
        losses[step] = (report.values["loss"], report.values["grad_norm"], report.values["learning_rate"])
        problems[step] = [group.prompt.problem_id for group in report.groups]
    checkpoints.close()
    writer.close()
    return {
        "losses": losses,
        "problems": problems,
        "weights": {name: tensor.clone() for name, tensor in policy.export()},
        "random": torch.rand(3),
        "noise": trainer.noise.state_dict(),
    }


def train_and_resume(context, *, config: Config, resumed: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole run; then, in a copy where its last checkpoint was cut off half-way, the resumed one."""
    torch.manual_seed(17 + context.rank)
    whole = train(config, context.init(split(config)))
    if context.rank == 0:
        shutil.copytree(config.trainer.run_dir, resumed.trainer.run_dir)
        cut_off(Path(resumed.trainer.run_dir), 4)
    torch.distributed.barrier()
    torch.manual_seed(99)
    return whole, train(resumed, context.init(split(resumed)))


def cut_off(run_dir: Path, step: int) -> None:
    """As a crash while saving leaves it: tensors, but neither the metadata nor the name, and half a record."""
    scratch = run_dir / "checkpoints" / f".{step_name(step)}"
    (run_dir / "checkpoints" / step_name(step)).rename(scratch)
    (scratch / "metadata.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')


NOISE = dict(objective="video_ktr", noise_every=5, min_shift="auto")
"""The noise is measured at the first step only. A resumed run that had lost it would measure it anew, with other
weights."""
LAYOUTS = {
    "dp2": (2, {}),
    "tp2 pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "cp2": (2, dict(context_parallel_size=2)),
    "dp2, noise measured": (2, NOISE),
}


@pytest.fixture(scope="module")
def runs(ranks, data_dir, tmp_path_factory) -> dict[str, tuple[Path, list[tuple[dict, dict]]]]:
    """Per layout: the run directory, and per rank what the whole and the resumed run did."""
    results = {}
    for name, (world_size, layout) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("runs")
        config = run_config(data_dir, folder / "whole", **layout)
        resumed = run_config(data_dir, folder / "resumed", resume=True, **layout)
        results[name] = (folder, ranks(train_and_resume, world_size=world_size, config=config, resumed=resumed))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs, layout):
    for whole, resumed in runs[layout][1]:
        assert resumed["losses"] == {step: whole["losses"][step] for step in (3, 4)}
        assert resumed["problems"] == {step: whole["problems"][step] for step in (3, 4)}
        assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())
        assert torch.equal(whole["random"], resumed["random"]), "the random state of each rank goes on"
        assert whole["noise"] == resumed["noise"] and bool(whole["noise"]) == ("noise" in layout)
    steps = [whole["losses"][step] for step in range(1, 5)]
    assert len({loss for loss, _, _ in steps}) == 4 and len({rate for _, _, rate in steps}) > 2, "a run that moves"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_directory_holds_every_step_once_and_both_configs(runs, layout):
    folder, _ = runs[layout]
    whole, resumed = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in whole]
    assert (folder / "resumed/config.yaml").read_bytes() == (folder / "whole/config.yaml").read_bytes()
    assert (folder / "resumed/config_from_step_00000003.yaml").is_file()
    assert sorted(path.name for path in (folder / "resumed/checkpoints").iterdir()) == [step_name(2), step_name(4)]


def resume_elsewhere(context, *, config: Config) -> dict[str, Any]:
    return train(config, context.init(split(config)))


@pytest.mark.parametrize(
    "saved, world_size, layout",
    [
        ("tp2 pp2", 2, dict()),
        ("tp2 pp2", 2, dict(tensor_model_parallel_size=2, sequence_parallel=True, micro_batch_groups=2)),
        ("dp2", 4, dict(tensor_model_parallel_size=2)),
        ("dp2", 4, dict(context_parallel_size=2)),
        ("cp2", 2, dict(pipeline_model_parallel_size=2)),
    ],
    ids=["tp2 pp2 to dp2", "tp2 pp2 to tp2 sp", "dp2 to tp2 dp2", "dp2 to cp2 dp2", "cp2 to pp2"],
)
def test_another_layout_continues_with_the_same_losses(ranks, runs, data_dir, tmp_path, saved, world_size, layout):
    folder, results = runs[saved]
    shutil.copytree(folder / "whole", tmp_path / "run")
    cut_off(tmp_path / "run", 4)
    config = run_config(data_dir, tmp_path / "run", resume=True, **layout)
    expected = results[0][0]
    for resumed in ranks(resume_elsewhere, world_size=world_size, config=config):
        for step in (3, 4):
            (loss, norm, rate), (expected_loss, expected_norm, _) = resumed["losses"][step], expected["losses"][step]
            assert abs(loss - expected_loss) <= LOSS_TOLERANCE
            assert abs(norm - expected_norm) <= GRADIENT_TOLERANCE * expected_norm
            assert rate == expected["losses"][step][2]


def run_command(context, *, config: Config) -> int:
    """What ``python -m megatron_ktr.train`` runs."""
    from megatron_ktr.train import train as train_command

    return train_command(config)


def test_auto_resume_goes_back_to_the_checkpoint_before_the_damaged_one(ranks, runs, data_dir, tmp_path):
    """40 bytes flipped in the middle of the weights: loaded, they would ruin the model without a word."""
    folder, _ = runs["dp2"]
    shutil.copytree(folder / "whole", tmp_path / "run")
    damaged = tmp_path / "run/checkpoints" / step_name(4) / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0xFF for byte in content[middle : middle + 40])
    damaged.write_bytes(content)
    config = run_config(data_dir, tmp_path / "run", auto_resume=True)
    assert ranks(run_command, world_size=2, config=config) == [0, 0]
    again, whole = (
        [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for run_dir in (tmp_path / "run", folder / "whole")
    )
    for name in ("step", "loss", "grad_norm"):
        assert [record[name] for record in again] == [record[name] for record in whole], "bit for bit"
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"damaged_{step_name(4)}", step_name(2), step_name(4)]
    assert (tmp_path / "run/checkpoints" / names[0] / "__0_0.distcp").read_bytes() == content, "kept as it was"
    # The export has checksums of its own: a run that starts from a damaged one is refused.
    weights = tmp_path / "run/export/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    start = run_config(data_dir, tmp_path / "next", model=str(weights.parent))
    with pytest.raises(RankError, match=r"--model: \S+export is damaged: model.safetensors: other content"):
        ranks(run_command, world_size=2, config=start)
    assert not (tmp_path / "next").exists()


def score(context, *, config: Config, checkpoint: Path, group: Any) -> torch.Tensor:
    groups = context.init(split(config))
    policy = Policy(config.model.model, options=PolicyOptions.of(config), ranks=groups, platform=current(), num_steps=4)
    load_sharded_state(policy, checkpoint)
    (statistics,) = policy.score([pack([group])])
    return policy.from_last_stage(statistics.logprob_R if statistics is not None else None)


def test_converted_training_checkpoint_gives_hugging_face_our_logprobs(ranks, runs, data_dir, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder, results = runs["tp2 pp2"]
    (_, checkpoint) = list_checkpoints(folder / "whole")[-1]
    convert_to_hf(checkpoint, tmp_path / "hf")
    hf_model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, tensor in results[0][0]["weights"].items():
        if name != "lm_head.weight":
            assert torch.equal(read_tensor(tmp_path / "hf", name), tensor)
    group = make_group(Qwen2_5_VLConfig.from_hf(tmp_path / "hf"), media=(), response_lengths=(4, 3), seed=0)
    config = run_config(data_dir, folder, **LAYOUTS["dp2"][1])
    ours_R = ranks(score, world_size=1, config=config, checkpoint=checkpoint, group=group)[0]
    with torch.no_grad():
        theirs_R = torch.cat(hf_logprobs(hf_model, group))
    # fp32 sums of at most 96 terms in different orders, four layers deep.
    assert (ours_R - theirs_R).abs().max() <= 1e-5


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


# The stored state


def step_on_noise(policy: Policy, seed: int) -> None:
    """One optimizer step on random gradients, the same in every layout that splits no parameter differently."""
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
        for name, parameter in chunk.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    policy.optimizer.step()
    policy.scheduler.step(increment=1)


class NoData:
    """A source that is nowhere."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def save_reload_save(context, *, hf_dir: Path, folder: Path, layouts: list[dict[str, Any]], values: dict) -> list[str]:
    """Checkpoints of one state, each saved in a layout after loading the one before it."""
    previous = None
    for number, layout in enumerate(layouts):
        run_dir = folder / str(number)
        config = config_from_values(dict(model=str(hf_dir), run_dir=str(run_dir), lr=1e-2) | values | layout)
        virtual = 2 if layout.get("num_layers_per_virtual_pipeline_stage") else None
        sizes = split(config)
        sizes = ParallelSizes(tensor=sizes.tensor, pipeline=sizes.pipeline, virtual_pipeline=virtual)
        policy = Policy(
            hf_dir, options=PolicyOptions.of(config), ranks=context.init(sizes), platform=current(), num_steps=5
        )
        if previous is None:
            step_on_noise(policy, 1)
            step_on_noise(policy, 2)
        else:
            load_sharded_state(policy, previous)
        checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions.of(config))
        checkpoints.save(2)
        checkpoints.close()
        previous = run_dir / "checkpoints" / step_name(2)
    return [str(number) for number in range(len(layouts))]


CHAINS = {
    "distributed, padded vision mlp": (
        dict(vision_ffn_size=42, vision_depth=2),
        dict(),
        [
            dict(tensor_model_parallel_size=4),
            dict(),
            dict(tensor_model_parallel_size=2),
            dict(tensor_model_parallel_size=4),
        ],
    ),
    "distributed, tied, chunks, bf16": (
        dict(tie_word_embeddings=True, vision_depth=2, vision_ffn_size=42),
        dict(params_dtype="bf16"),
        [
            dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
            dict(tensor_model_parallel_size=4),
            dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        ],
    ),
    "replicated optimizer, frozen vision": (
        dict(vision_depth=2),
        dict(use_distributed_optimizer=False, freeze=("vision",)),
        [dict(pipeline_model_parallel_size=2), dict(tensor_model_parallel_size=2)],
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_state_is_the_same_tensors_in_whatever_layout_it_was_loaded_and_saved(ranks, tmp_path, chain):
    options, values, layouts = CHAINS[chain]
    save_tiny_hf(tmp_path / "hf", **options)
    ranks(save_reload_save, hf_dir=tmp_path / "hf", folder=tmp_path, layouts=layouts, values=values)
    first, *others = (
        TorchDistReader(tmp_path / str(number) / "checkpoints" / step_name(2)) for number in range(len(layouts))
    )
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in first.tensors)
    for other in others:
        assert other.tensors.keys() == first.tensors.keys()
        assert [key for key in first.tensors if not torch.equal(whole(first, key), whole(other, key))] == []
    copies = [key for key in first.tensors if key.startswith("optimizer.state.param.")]
    assert len(copies) == (0 if chain.startswith("replicated") else len(first.tensors) // 4), "model, copy, two moments"
    for key in copies:
        # Were state stored under the wrong parameter, all layouts would agree on it.
        weight = whole(first, key.removeprefix("optimizer.state.param."))
        assert torch.equal(whole(first, key).to(weight.dtype), weight), key


def whole(reader: TorchDistReader, key: str) -> torch.Tensor:
    size = tuple(reader.tensors[key].size)
    tensor = reader.read(key, offset=(0,) * len(size), shape=size)
    # Rows beyond the vocabulary are padding: as many as the saving layout needed.
    return tensor[:VOCAB_SIZE] if key.endswith(("word_embeddings.weight", "output_layer.weight")) else tensor


# Failures


def lone_policy(data_dir: Path, run_dir: Path, ranks: ParallelGroups, **values: Any) -> Policy:
    config = run_config(data_dir, run_dir, **values)
    return Policy(config.model.model, options=PolicyOptions.of(config), ranks=ranks, platform=current(), num_steps=4)


@pytest.mark.parametrize("call", ["save_tensor", "save_config"])
def test_full_disk_is_one_line_and_older_checkpoints_stay(one_rank, data_dir, tmp_path, monkeypatch, call):
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    policy = lone_policy(data_dir, tmp_path / "run", one_rank)
    checkpoints = Checkpoints(
        tmp_path / "run", policy=policy, source=NoData(), options=CheckpointOptions(resolved="", keep_checkpoints=2)
    )
    checkpoints.save(2)
    checkpoints.close()
    monkeypatch.setattr(f"megatron_ktr.distributed.checkpoint_writer.{call}", fail)
    checkpoints.save(4)
    with pytest.raises(UserError, match=r"cannot save step 4 to .*: disk full; the last complete .*step_00000002$"):
        checkpoints.close()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [step_name(2)]
    before = {name: tensor.clone() for name, tensor in policy.export()}
    load_sharded_state(policy, tmp_path / "run/checkpoints" / step_name(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.export())


def test_training_goes_on_while_the_snapshot_is_written(one_rank, data_dir, tmp_path, monkeypatch):
    """The thread is held until the weights have changed: the checkpoint still has those of the moment of saving."""
    import threading

    from megatron_ktr.distributed import checkpoint_writer

    may_write, save_tensor = threading.Event(), checkpoint_writer.save_tensor
    monkeypatch.setattr(
        checkpoint_writer, "save_tensor", lambda *args: (may_write.wait(PATIENCE_SECONDS), save_tensor(*args))[1]
    )
    policy = lone_policy(data_dir, tmp_path / "run", one_rank, lr_warmup_steps=0)
    checkpoints = Checkpoints(
        tmp_path / "run", policy=policy, source=NoData(), options=CheckpointOptions(resolved="", keep_checkpoints=1)
    )
    saved = {name: tensor.clone() for name, tensor in policy.export()}
    checkpoints.save(1)
    step_on_noise(policy, 1)
    checkpoints.after_step(1)
    assert list_checkpoints(tmp_path / "run") == []
    may_write.set()
    checkpoints.save(2)
    checkpoints.close()
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2], "keep_checkpoints 1"
    changed = {name: tensor.clone() for name, tensor in policy.export()}
    assert not any(torch.equal(saved[name], tensor) for name, tensor in changed.items() if tensor.ndim > 1)
