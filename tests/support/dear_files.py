"""The test files that take longest, the dearest first: they are started first, so that the last ones to run are short.

The order is that of the processor seconds of a file with all processes it starts, on the CPU stack; files of commands
and launchers, which take long for other reasons, stand near the beginning. A file that is missing here takes less than
about fifteen seconds, or is new. ``tests/house/test_makefile.py`` finds a name that is wrong.
"""

from __future__ import annotations

from pathlib import PurePath

DEAREST_FIRST = (
    "house/test_commands.py",
    "faults/test_faults.py",
    "step/test_training_step.py",
    "step/test_head_in_training.py",
    "run/test_checkpoint.py",
    "step/test_context_parallel.py",
    "policy/test_rollout_offload.py",
    "benchmarks/test_training_step_benchmark.py",
    "step/test_every_objective_in_layouts.py",
    "house/test_both_stacks.py",
    "distributed/test_two_nodes.py",
    "evaluation/test_end_to_end.py",
    "run/test_elastic.py",
    "run/test_killed_runs.py",
    "run/test_watchdog.py",
    "run/test_watching.py",
    "benchmarks/test_soak.py",
    "rollout/test_server_faults.py",
    "run/test_full_disk.py",
    "benchmarks/test_evaluation_benchmark.py",
    "benchmarks/test_data_benchmark.py",
    "tools/test_benchmark_throughput.py",
    "benchmarks/test_benchmarks.py",
    "objectives/test_tw_grpo.py",
    "run/test_online_training.py",
    "golden/test_golden.py",
    "house/test_device_border.py",
    "benchmarks/test_gpu_suite.py",
    "step/test_levers.py",
    "evaluation/test_verify_checkpoint.py",
    "models/test_lora.py",
    "accounting/test_accounting.py",
    "models/test_vision.py",
    "distributed/test_parameter_groups.py",
    "step/test_batching.py",
    "distributed/test_megatron_traps.py",
    "step/test_reference_kl.py",
    "models/test_hf_parity.py",
    "rollout/test_second_prompt.py",
    "files/test_dist_checkpoint.py",
    "run/test_launch.py",
    "evaluation/test_in_training.py",
    "ops/test_token_statistics_triton_device.py",
    "step/test_ktr_update_against_hf.py",
    "distributed/test_platform.py",
    "ops/test_token_statistics_parallel.py",
    "run/test_every_objective.py",
    "rewards/test_reward_cost.py",
    "data/test_store.py",
    "accounting/test_planner.py",
    "doctor/test_doctor.py",
    "ops/test_token_statistics_triton.py",
    "models/test_conversion.py",
    "house/test_borders.py",
    "rollout/test_server_pool.py",
    "rollout/test_filtering.py",
    "accounting/test_scaling.py",
    "run/test_supervised.py",
    "data/test_workers.py",
    "objectives/test_importance.py",
)

_PLACES = {name: place for place, name in enumerate(DEAREST_FIRST)}


def place_of(path: PurePath) -> int:
    """Where a test file stands in the order; all that are not named come last, as they were."""
    return _PLACES.get("/".join(path.parts[-2:]), len(_PLACES))
