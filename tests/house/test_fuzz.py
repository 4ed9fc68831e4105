"""Whatever stands on the command line or in the YAML file ends in a configuration or in one ``UserError``; likewise
everything that runs before the model is built. Examples are the same in every run (``derandomize``)."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ktr.config import OPTIONS, Config, config_from_values, load_config
from megatron_ktr.config.checks import ABSENT_OPTIONS, check
from megatron_ktr.config.cli import Option
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.run.preflight import check_run
from tests.support.fuzzing import fuzzed
from tests.support.paths import REPOSITORY

NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, NUM_VISION_HEADS = 8, 2, 4, 4
SECTIONS = sorted({option.section for option in OPTIONS.values()})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_ktr.distributed.platform import start

    start("cpu")
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save_tiny_model(
        folder,
        corpus=corpus(),
        hidden_size=64,
        ffn_size=96,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
    )
    return folder


# What users may write

ODD_TEXT = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            ",",
            ",,",
            "none",
            "null",
            "nan",
            "inf",
            "-inf",
            "1e999",
            "1e-999",
            "-1",
            "0",
            "0x10",
            "1_0",
            "yes",
            "~",
        ]
        + ["9" * 5000, "１", "\u2028", "\udcff", "a\0b", "/", "..", "x" * 5000, "--lr", "*a", "&a", "!!int x", "[", "{"]
    ),
    st.text(max_size=8),
)
ODD_NUMBERS = st.one_of(
    st.integers(min_value=-(10**40), max_value=10**40),
    st.integers(min_value=-4, max_value=64),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([10**400, 2**31, 2**31 - 1, 5e-324, 1.7e308, 0.5, 1.0]),
)
ODD_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT, st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=2)),
    max_leaves=4,
)


def fitting_value(option: Option) -> st.SearchStrategy[Any]:
    """Values as the option's own description wants them."""
    if option.choices:
        one: st.SearchStrategy[Any] = st.sampled_from(option.choices)
    elif option.kind is bool:
        one = st.booleans()
    elif option.kind is str:
        one = st.sampled_from(["a", "b", "accuracy", "no/such/file"])
    else:
        low = option.low if option.low is not None else 0
        high = option.high if option.high is not None else low + 8
        one = st.integers(int(low), max(int(low), int(high))) if option.kind is int else st.floats(low, high)
    one = st.lists(one, max_size=3) if option.is_list else one
    return st.one_of(st.none(), one) if option.is_optional else one


NAMES = st.one_of(
    st.sampled_from(sorted(OPTIONS)), st.sampled_from(sorted(ABSENT_OPTIONS)), st.sampled_from(SECTIONS), ODD_TEXT
)


@st.composite
def entries(draw: st.DrawFn) -> tuple[Any, Any]:
    name = draw(NAMES)
    fits = name in OPTIONS and draw(st.booleans())
    return name, draw(fitting_value(OPTIONS[name]) if fits else ODD_VALUES)


DOCUMENTS = st.one_of(
    st.lists(entries(), max_size=6).map(dict),
    st.dictionaries(st.sampled_from(SECTIONS), st.lists(entries(), max_size=3).map(dict), max_size=3),
    ODD_VALUES,
)
RAW_YAML = st.text(alphabet=string.ascii_lowercase[:4] + " \n\t:-[]{}&*!|>'\"%#?,.0123456789e_~<=@`", max_size=60)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    arguments = []
    for name, value in draw(st.lists(entries(), max_size=5)):
        flag = f"--{str(name).replace('_', '-')}"
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        arguments += draw(
            st.sampled_from([[flag, text], [f"{flag}={text}"], [flag], [text], [flag.replace("--", "--no-", 1)]])
        )
    return [argument for argument in arguments if not {"-h", "--help", "--config"} & {argument.partition("=")[0]}]


def outcome(argv: list[str]) -> Config | str:
    """The configuration, or the one line that a user reads."""
    try:
        return load_config(argv)
    except UserError as error:
        return told(error)


def told(error: UserError) -> str:
    line = one_line(error)
    assert line
    return line


@fuzzed(200)
@given(document=DOCUMENTS)
@example(document={"seed": 10**400})
@example(document={"lr": [float("nan")]})
def test_any_yaml_values_end_in_a_configuration_or_one_line(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    # As PyYAML writes them: surrogates and the like come back as escapes.
    path.write_text(yaml.dump(document, Dumper=yaml.SafeDumper) if _is_short(document) else "a: 1")
    outcome(["--config", str(path)])


def _is_short(document: Any) -> bool:
    """PyYAML cannot write integers that Python does not print; ``RAW`` has one as text."""
    try:
        str(document)
    except ValueError:
        return False
    return True


RAW = [
    "seed: " + "9" * 5000,
    "seed: 0x" + "f" * 5000,
    "lr: 1" + "0" * 400,
    "lr: 2020-99-99",
    "seed: 1:99:99",
    "lr: !!float 'x'",
    "lr: !!int ''",
    "lr: !!bool x",
    "lr: !!timestamp x",
    "model: !!python/object/apply:os.system [ls]",
    "[" * 5000,
    "a: " + "{a: " * 2000,
    "- " * 3000 + "a",
    "a: &a [*a]",
    "signals: &a [*a]",
    "? &a [*a]\n: 1",
    "<<: {lr: 1}\nseed: 1",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\nsignals: [*d, *d]",
    "\tlr: 1",
    "lr: 1\nlr: 2",
    "--- a\n--- b",
    "%YAML 9.9\n---\nlr: 1",
    'model: "\\0"',
    'model: "\\ud800"',
    "\0",
    "\ufefflr: 1",
]


@fuzzed(200)
@given(text=RAW_YAML)
def test_any_text_as_a_yaml_file_ends_in_a_configuration_or_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    outcome(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("text", RAW, ids=lambda text: repr(text[:20]))
def test_yaml_files_that_once_ended_in_a_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert isinstance(outcome(["--config", str(tmp_path / "run.yaml")]), str), "none of them names a model"


def test_a_mapping_taken_in_by_yaml_s_merge_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimizer: {<<: {lr: 1, min_lr: 0.5}, min_lr: 0.25}\nmodel: m\nreplay_path: r")
    config = load_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1.0, 0.25)


@fuzzed(200)
@given(argv=command_lines())
def test_any_command_line_ends_in_a_configuration_or_one_line(argv: list[str]) -> None:
    outcome(argv)


# What runs before the model is built

NEEDED = {"engine": "hf", "data_path": "questions.json", "platform": "cpu"}


@st.composite
def fitting_options(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS.keys() - NEEDED.keys() - {"model"})), max_size=8, unique=True))
    return {name: draw(fitting_value(OPTIONS[name])) for name in names}


@fuzzed(300)
@given(values=fitting_options(), world_size=st.sampled_from([1, 2, 4, 8, 6]))
def test_options_that_fit_one_by_one_pass_together_or_are_refused(model: Path, values: Any, world_size: int) -> None:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    config = config_from_values({**NEEDED, "model": str(model), **values})
    try:
        check(config)
        check_run(config, world_size=world_size)
    except UserError as error:
        told(error)


SIZES = st.sampled_from([1, 1, 2, 2, 3, 4, 8])


@fuzzed(300)
@given(
    world_size=st.sampled_from([1, 2, 4, 8]),
    tensor=SIZES,
    pipeline=SIZES,
    context=SIZES,
    prompts=st.integers(1, 12),
    per_micro_batch=st.integers(1, 3),
    sequence_parallel=st.booleans(),
    chunks=st.sampled_from([None, None, 1, 2, 3, 4]),
    vision_parallel=st.sampled_from(["tensor", "frame"]),
)
def test_a_layout_is_accepted_exactly_where_everything_divides(model: Path, **sizes: Any) -> None:
    tensor, pipeline, context = sizes["tensor"], sizes["pipeline"], sizes["context"]
    config = config_from_values(
        {
            **NEEDED,
            "model": str(model),
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "context_parallel_size": context,
            "prompts_per_step": sizes["prompts"],
            "micro_batch_groups": sizes["per_micro_batch"],
            "sequence_parallel": sizes["sequence_parallel"],
            "num_virtual_stages_per_pipeline_rank": sizes["chunks"],
            "vision_parallel": sizes["vision_parallel"],
        }
    )
    chunks = sizes["chunks"]
    data, rest = divmod(sizes["world_size"], tensor * pipeline * context)
    fits = (
        rest == 0
        and (tensor > 1 or not sizes["sequence_parallel"])
        and (pipeline > 1 or chunks is None)
        and NUM_HEADS % tensor == 0
        and (NUM_KV_HEADS % tensor == 0 or tensor % NUM_KV_HEADS == 0)
        and (sizes["vision_parallel"] == "frame" or NUM_VISION_HEADS % tensor == 0)
        and NUM_LAYERS % (pipeline * (chunks or 1)) == 0
        and sizes["prompts"] % (data * sizes["per_micro_batch"]) == 0
    )
    if fits and (chunks or 1) > 1:
        # The interleaved schedule takes micro-batches by the round.
        fits = sizes["prompts"] // data // sizes["per_micro_batch"] % pipeline == 0
    try:
        check(config)
        check_run(config, world_size=sizes["world_size"])
        accepted, why = True, ""
    except UserError as error:
        accepted, why = False, told(error)
    assert accepted == fits, why or "accepted"


def test_every_test_draws_the_same_inputs_in_every_run() -> None:
    """hypothesis' own settings draw anew in each run, and begin with what failed in the one before."""
    texts = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("*.py")}
    drawing = {path: text for path, text in texts.items() if re.search(r"^ *@given\(", text, re.MULTILINE)}
    assert len(drawing) > 10
    for path, text in drawing.items():
        given_, fuzzed_ = (re.findall(rf"^ *@{name}\(", text, re.MULTILINE) for name in ("given", "fuzzed"))
        assert len(given_) == len(fuzzed_), f"{path}: a test without @fuzzed (tests/support/fuzzing.py)"
