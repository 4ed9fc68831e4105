"""Configuration: precedence, types, ranges, rules between options, and errors that name the nearest valid option."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ktr.config import OPTIONS, Config, configuration_page, load_config, save_resolved
from megatron_ktr.config.cli import convert
from megatron_ktr.errors import UserError
from tests.support.paths import REPOSITORY

MINIMAL = ["--model", "some/model", "--replay-path", "rollouts.jsonl"]
ONLINE = ["--replay-path", "none", "--data-path", "questions.json", "--engine", "hf"]
SFT = ["--replay-path", "none", "--data-path", "questions.json", "--objective", "sft"]
EVALUATED = ["--eval-data", "held_out.json", "--eval-interval", "5"]


def write(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_config(argv)
    message = str(caught.value)
    assert "\n" not in " ".join(message.split()), "the command line prints one line"
    return message


def test_defaults_are_the_settings_of_the_papers_run():
    config = load_config(MINIMAL)
    assert (config.rollout.num_generations, config.rollout.temperature, config.rollout.top_p) == (8, 1.0, 0.95)
    assert (config.data.max_prompt_length, config.rollout.max_response_length) == (16384, 768)
    assert (config.data.video_max_frames, config.data.video_max_pixels) == (16, 128 * 28 * 28)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.weight_decay, optimizer.clip_grad) == (
        2e-6,
        "cosine",
        0.01,
        5.0,
    )
    assert config.objective.kl_beta == 0.04
    assert config.objective.ratio_of_signal == {"entropy": 0.2, "visual": 0.2, "temporal": 0.2}
    reward = config.reward
    assert (reward.length_bonus, reward.length_bonus_min, reward.length_bonus_max) == (0.2, 320, 512)
    assert config.model.freeze == ()
    assert config.objective.original_compat is False


def test_flags_win_over_file_and_file_over_defaults(tmp_path):
    argv = write(tmp_path / "run.yaml", "optimizer: {lr: 1.0e-5, weight_decay: 0.1}\nmodel: {model: from_file}\n")
    config = load_config([*argv, "--lr", "3e-4", "--replay-path", "r"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.model.model) == (3e-4, 0.1, "from_file")
    assert config.optimizer.clip_grad == 5.0


def test_model_directory_may_be_given_directly_and_keys_at_the_top_level(tmp_path):
    argv = write(tmp_path / "run.yaml", "model: dir\nreplay_path: r\nfreeze: [vision, merger]\nobjective: grpo\n")
    config = load_config(argv)
    assert (config.model.model, config.rollout.replay_path) == ("dir", "r")
    assert (config.model.freeze, config.objective.objective) == (("vision", "merger"), "grpo")


def test_number_without_a_dot_is_a_number_although_yaml_reads_text(tmp_path):
    assert yaml.safe_load("2e-6") == "2e-6", "the trap this test is about"
    config = load_config([*write(tmp_path / "run.yaml", "optimizer: {lr: 2e-7}"), *MINIMAL])
    assert config.optimizer.lr == 2e-7


def test_a_number_that_no_float_holds_is_refused_by_every_option(tmp_path):
    file = tmp_path / "run.yaml"
    for name in OPTIONS:
        file.write_text(f"{name}: {'9' * 400}\n")
        with pytest.raises(UserError, match=name):
            load_config(["--config", str(file)])


def test_a_learning_rate_that_adam_cannot_divide_is_refused():
    for flag in ("--lr", "--vision-lr", "--min-lr"):
        assert flag in error_of([*MINIMAL, flag, "1.7e38"])


def test_lists_are_comma_separated_or_repeated():
    assert load_config([*MINIMAL, "--signals", "visual,temporal"]).objective.signals == ("visual", "temporal")
    assert load_config([*MINIMAL, "--signals", "visual", "--signals", "entropy"]).objective.signals == (
        "visual",
        "entropy",
    )
    assert load_config([*MINIMAL, "--freeze", "vision", "--freeze", ""]).model.freeze == ("vision",)


def test_one_ratio_serves_all_signals_and_several_follow_their_order():
    config = load_config([*MINIMAL, "--signals", "temporal,entropy", "--selection-ratio", "0.1,0.3"])
    assert config.objective.ratio_of_signal == {"temporal": 0.1, "entropy": 0.3}


def test_booleans_have_a_negative_flag_that_overrides_the_file(tmp_path):
    argv = [*write(tmp_path / "run.yaml", "optimizer: {use_distributed_optimizer: true}"), *MINIMAL]
    assert load_config(argv).optimizer.use_distributed_optimizer
    assert not load_config([*argv, "--no-use-distributed-optimizer"]).optimizer.use_distributed_optimizer


def test_optional_values_can_be_unset_by_flag(tmp_path):
    argv = [*write(tmp_path / "run.yaml", "optimizer: {vision_lr: 1.0e-6}"), *MINIMAL]
    assert load_config(argv).optimizer.vision_lr == 1e-6
    assert load_config([*argv, "--vision-lr", "none"]).optimizer.vision_lr is None


def test_short_forms_set_the_precision_and_may_not_contradict(tmp_path):
    argv = [*write(tmp_path / "run.yaml", "model: {params_dtype: fp16}"), *MINIMAL]
    assert load_config([*argv, "--bf16"]).model.params_dtype == "bf16"
    assert "contradict" in error_of([*argv, "--bf16", "--fp16"])
    assert "contradict" in error_of([*argv, "--bf16", "--params-dtype", "fp32"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("objective: {selection_rate: 0.2}", ["objective.selection_rate", "did you mean selection_ratio?"]),
        ("optimiser: {lr: 1.0}", ["unknown key optimiser", "did you mean optimizer?"]),
        ("trainer: {lr: 1.0}", ["trainer.lr", "lr belongs to section optimizer"]),
        ("model: {fp8: hybrid}", ["fp8", "use --fp8-format"]),
        ("objective: {shift: absolut}", ["objective.shift", "signed, absolute, kl", "did you mean absolute?"]),
        ("objective: {signals: [visual, tempral]}", ["objective.signals", "'tempral'", "did you mean temporal?"]),
        ("objective: {signals: [visual, visual]}", ["twice"]),
        ("optimizer: {lr: fast}", ["optimizer.lr", "--lr", "a number > 0", "'fast'"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr"]),
        ("optimizer: {lr: 0}", ["optimizer.lr", "> 0"]),
        ("trainer: {train_steps: 2.5}", ["trainer.train_steps", "an integer >= 1", "2.5"]),
        ("trainer: {train_steps: true}", ["trainer.train_steps", "True"]),
        ("trainer: {resume: 'no thanks'}", ["trainer.resume", "true or false"]),
        ("trainer: {run_dir: 2024}", ["trainer.run_dir", "text", "2024"]),
        ("trainer: {seed: null}", ["trainer.seed", "None"]),
        ("rollout: {top_p: 1.5}", ["rollout.top_p", "<= 1"]),
        ("trainer: 5", ["section trainer", "5"]),
        ("lr: 1.0e-6\noptimizer: {lr: 1.0e-6}", ["optimizer.lr", "twice"]),
        ("optimizer: {lr: 1.0e-6, lr: 1.0e-5}", ["lr is given twice"]),
        ("trainer: {seed: 010}", ["'010' is another number in YAML than as a flag"]),
        ("trainer: {train_steps: 1:30}", ["'1:30' is another number in YAML"]),
        ("optimizer: {lr: 1:30.5}", ["'1:30.5' is another number in YAML"]),
        ("trainer: {seed: -0x1F}", ["'-0x1F' is another number in YAML"]),
        ("[1, 2]", ["expected sections", "list"]),
        ("a: [", ["not a valid YAML file"]),
    ],
)
def test_bad_file_is_fatal_and_the_message_names_file_key_and_remedy(tmp_path, text, parts):
    message = error_of([*write(tmp_path / "run.yaml", text), *MINIMAL])
    for part in ["run.yaml", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learning-rat", "1"], ["unknown flag --learning-rat", "did you mean --"]),
        (["--tensor-parallel-size", "2"], ["did you mean --tensor-model-parallel-size?"]),
        (["--no-sequence-paralel"], ["did you mean --no-sequence-parallel?"]),
        (["--virtual-pipeline-model-parallel-size", "2"], ["--num-layers-per-virtual-pipeline-stage"]),
        (["--fp8-param"], ["unknown flag --fp8-param", "use --fp8-param-gather"]),
        (["--tensor-model-parallel-siz", "2"], ["unknown flag"]),
        (["run.yaml"], ["unexpected argument 'run.yaml'"]),
        (["--lr"], ["--lr"]),
        (["--seed", "1e3"], ["trainer.seed", "an integer >= 0", "'1e3'"]),
        (["--lr", "inf"], ["optimizer.lr"]),
        (["--config", "does/not/exist.yaml"], ["--config", "does/not/exist.yaml"]),
    ],
)
def test_bad_flag_is_fatal_and_the_message_names_the_remedy(argv, parts):
    message = error_of([*MINIMAL, *argv])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--sequence-parallel"], "--tensor-model-parallel-size above 1"),
        (["--num-layers-per-virtual-pipeline-stage", "1"], "--pipeline-model-parallel-size above 1"),
        (["--objective", "tw_grpo", "--loss-aggregation", "sequence"], "leave out --loss-aggregation"),
        (["--objective", "tw_grpo", "--loss-aggregation", "token", "--tw-alpha", "0.5"], "tw_alpha"),
        (["--tw-weight-gradient"], "--tw-weight-gradient is not read by --objective video_ktr"),
        (
            "--objective tw_grpo --loss-aggregation token --tw-weight-gradient --updates-per-rollout 2".split(),
            "--tw-weight-gradient needs --updates-per-rollout 1",
        ),
        (["--scores-dtype", "bf16"], "--scores-dtype bf16 needs --original-compat"),
        (["--scores-dtype", "bf16", "--original-compat", "--objective", "grpo"], "not read by --objective grpo"),
        (["--substitute-video", "other.mp4"], "--substitute-video needs --original-compat"),
        (["--substitute-image", "other.png"], "--substitute-image needs --original-compat"),
        (["--reward-functions", "accuracy"], "not read by --engine replay"),
        (["--engine", "hf"], "needs --data-path"),
        (["--objective", "sft"], "needs --data-path"),
        (["--eval-interval", "5"], "--eval-interval needs --eval-data or --eval-benchmark"),
        (["--eval-at-start"], "--eval-at-start needs --eval-data or --eval-benchmark"),
        (["--eval-data", "a/held_out.json"], "--eval-data is not read without --eval-interval or --eval-at-start"),
        ([*EVALUATED], "--engine replay has none"),
        ([*EVALUATED, *SFT], "needs an engine that answers: choose --engine hf"),
        ([*EVALUATED, *ONLINE, "--eval-benchmark", "mvbench,mvbench=b"], "two sets are called mvbench"),
        ([*EVALUATED, *ONLINE, "--eval-benchmark", "=b"], "expected NAME or NAME=PATH"),
        ([*EVALUATED, *ONLINE, "--eval-frames", "7"], "--eval-frames must be even"),
        ([*EVALUATED, *ONLINE, "--eval-benchmark-root", "b"], "--eval-benchmark, which is not given"),
        ([*ONLINE, "--eval-max-items", "7"], "--eval-max-items needs --eval-data or --eval-benchmark"),
        ([*ONLINE, "--eval-media-root", "a"], "--eval-data, which is not given"),
        ([*ONLINE, "--keep-best", "eval/held_out/accuracy"], "--keep-best needs --eval-interval"),
        (
            [*EVALUATED, *ONLINE, "--engine", "vllm_colocated", "--eval-max-tokens", "769"],
            "--eval-max-tokens 769 exceeds --max-response-length 768",
        ),
        ([*EVALUATED, *ONLINE, "--engine", "vllm_colocated", "--eval-temperature", "3"], "from 0.01 to 2, or 0"),
        (
            [*EVALUATED, *ONLINE, *"--keep-best x --optimizer sgd --no-use-distributed-optimizer --bf16".split()],
            "--keep-best with --optimizer sgd needs --params-dtype fp32",
        ),
        (["--replay-path", "none"], "needs --replay-path"),
        (["--data-path", "questions.json"], "not read by --engine replay"),
        (["--model", ""], "--model is required"),
        (["--run-dir", ""], "--run-dir"),
        (["--signals", ""], "--signals must name at least one"),
        (["--signals", "visual,entropy", "--selection-ratio", "0.1,0.2,0.3"], "1 value or one per signal (2"),
        (["--selection-ratio", ""], "--selection-ratio needs 1 value or one per signal"),
        (["--selection-count", "5,6"], "--selection-count needs 1 value or one per signal (3"),
        (["--selection-count", "5", "--selection-ratio", "0.3"], "give one of them"),
        (["--combine", "weighted", "--selection-ratio", "0.1,0.2,0.3"], "tokens are selected once"),
        (["--combine", "weighted", "--signal-weights", "1,2"], "--signal-weights needs one value per signal (3"),
        (["--signal-weights", "1,2,3"], "add --combine weighted"),
        (["--token-weights", "rank"], "give one signal, or --combine weighted"),
        (["--token-weights", "rank", "--signals", "entropy", "--selection", "random"], "needs --selection signals"),
        (["--weight-temperature", "2"], "is not read with --token-weights hard"),
        (["--dependence", "k3"], "add the signal dependence, or --advantage-shaping dependence"),
        (["--shaping-max", "1.2"], "--shaping-max is not read with --advantage-shaping none"),
        (["--objective", "vppo", "--shaping-max", "0.5"], "--shaping-min 0.9 exceeds --shaping-max 0.5"),
        (["--objective", "vppo", "--shaping-min", "1.5"], "--shaping-min 1.5 is above 1"),
        (["--objective", "vppo", "--original-compat"], "which has no --advantage-shaping"),
        (["--original-compat", "--selection-scope", "batch"], "which has no --selection-scope batch"),
        ([*SFT, "--selection", "random"], "--selection is not read by --objective sft"),
        (["--num-generations", "1"], "--num-generations must be at least 2"),
        (["--video-max-frames", "15"], "even"),
        (["--video-num-frames", "18"], "exceeds --video-max-frames 16"),
        (["--video-min-pixels", "200000"], "exceeds --video-max-pixels"),
        (["--length-bonus-min", "600"], "exceeds --length-bonus-max 512"),
        (["--min-lr", "1"], "exceeds --lr"),
        (["--freeze", "vision,merger,language"], "nothing to train"),
        (["--optimizer", "sgd"], "--no-use-distributed-optimizer"),
        (["--adam-beta2", "1"], "below 1"),
        (["--train-steps", "3", "--lr-warmup-steps", "4"], "exceeds the 3 optimizer steps"),
        (["--overlap-param-gather"], "--overlap-grad-reduce"),
        (["--overlap-param-gather", "--no-use-distributed-optimizer"], "needs --use-distributed-optimizer"),
        (["--recompute-granularity", "full"], "--recompute-method and --recompute-num-layers"),
        (["--recompute-granularity", "selective", "--recompute-num-layers", "1"], "--recompute-granularity full"),
        (["--platform", "cpu", "--transformer-impl", "te"], "needs CUDA"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(argv, part):
    assert part in error_of([*MINIMAL, *argv])


def test_layouts_of_the_proofs_are_accepted():
    parallel = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather", "--num-layers-per-virtual-pipeline-stage", "1"]
    config = load_config([*MINIMAL, *parallel, *recompute, *overlap])
    assert (config.parallel.tensor_model_parallel_size, config.parallel.recompute_method) == (2, "uniform")


def test_resolved_copy_reads_back_as_an_equal_config(tmp_path):
    config = load_config(
        [
            *MINIMAL,
            *("--lr", "1.5e-7", "--min-lr", "1e-9", "--signals", "visual,temporal", "--selection-ratio", "0.3,0.1"),
            *("--freeze", "vision", "--vision-lr", "3e-8", "--no-shuffle-data", "--bf16", "--seed", "7"),
            *("--problem-types", "multiple choice,free-form", "--run-dir", "runs/ünïcode: # odd"),
        ]
    )
    save_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(["--config", str(tmp_path / "resolved.yaml")]) == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["resolved.yaml"], "no partial file stays behind"
    saved = yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))
    assert {name for section in saved.values() for name in section} == set(OPTIONS), "every option is written"


def test_resolved_copy_into_a_missing_directory_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="resolved configuration"):
        save_resolved(Config(), tmp_path / "missing" / "resolved.yaml")


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(MINIMAL).optimizer.lr = 1.0


def test_prompts_are_split_evenly_or_refused():
    config = load_config([*MINIMAL, "--prompts-per-step", "8", "--micro-batch-groups", "2"])
    assert config.trainer.prompts_per_replica(2) == 4
    with pytest.raises(UserError, match="--prompts-per-step 8 must be a multiple"):
        config.trainer.prompts_per_replica(3)


def test_every_option_is_documented_and_its_default_is_valid():
    for option in OPTIONS.values():
        assert len(option.doc) > 10, option.key
        assert convert(option, option.default, source="default") == option.default


def test_help_lists_every_flag_with_its_section(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in OPTIONS.values():
        assert option.flag in text
        assert f"{option.section}:" in text


def test_command_line_prints_one_error_line_and_exits_with_2():
    result = subprocess.run(
        [sys.executable, "-m", "megatron_ktr.config", "--lr", "fast"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_configuration_page_is_up_to_date():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run `make docs`"
