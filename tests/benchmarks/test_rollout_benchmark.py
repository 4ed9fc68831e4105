"""``benchmarks/rollout/run.py`` in small: equal numbers of tokens from both engines, log-probs the trainer confirms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.vllm


def test_engines_answer_alike_also_where_a_step_of_vllm_does_not_hold_all_prompts(tmp_path, monkeypatch) -> None:
    """Prompts of 300 tokens, four of each, in steps of 460: a prompt computed in parts would end vLLM on CPU, as
    requests have random generators of their own."""
    pytest.importorskip("vllm", reason="the vLLM environment only")
    from benchmarks.rollout.parts import MAX_PROMPT, Lengths, Workload
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start
    from megatron_ktr.rollout.colocated import engine as vllm_colocated

    monkeypatch.setattr(vllm_colocated, "BATCHED_TOKENS", 1)
    platform = start("cpu")
    groups = init_parallel(ParallelSizes(), platform=platform)
    lengths = Lengths(least=3, most=12, mean=6)
    work = Workload(tmp_path, num_prompts=2, num_samples=4, lengths=lengths, ranks=groups, platform=platform)
    engines = work.engines()
    try:
        assert work.num_visual_tokens >= 256
        scheduler = engines["vllm"]._llm.llm_engine.vllm_config.scheduler_config
        assert scheduler.max_num_batched_tokens == MAX_PROMPT + lengths.most < 2 * work.num_visual_tokens
        size = 4 * sum(parameter.numel() for parameter in engines["hf"].model.parameters())
        found = {}
        for name, engine in engines.items():
            turn, answered = work.take_turn(engine, step=0)
            found[name] = [len(rollout.token_ids) for group in answered for rollout in group.rollouts]
            assert turn.num_tokens == sum(found[name]) and turn.tokens_per_second > 0
            assert turn.update_bytes == size  # every weight crosses, in fp32
            # fp32 sums in another order; another video or older weights differ by tenths.
            assert work.gaps(answered).mean() < 1e-4
        assert found["hf"] == found["vllm"] and len(set(found["hf"])) > 1
    finally:
        engines["vllm"].close()
        destroy_parallel()


@pytest.mark.slow
def test_rollout_benchmark_writes_its_summary(tmp_path: Path) -> None:
    sizes = ["--prompts", "2", "--samples", "2", "--least", "2", "--most", "6", "--mean", "4", "--threads", "1"]
    command = [sys.executable, "benchmarks/rollout/run.py", "--json", "--warm-up", "0", "--repeats", "1", *sizes]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "a.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    assert report["summary"].keys() == {"vllm_over_hf", "weight_update_seconds", "logprob_gap_mean"}
    speed = {entry["engine"]: entry["tokens_per_second"] for entry in report["results"]}
    assert report["summary"]["vllm_over_hf"] == pytest.approx(speed["vllm"] / speed["hf"])
    assert {"load_before", "load_after", "threads"} <= report["machine"].keys()
