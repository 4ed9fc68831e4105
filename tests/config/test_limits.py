"""Numbers of any size: each option has limits, and beyond them costs one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_ktr.config import OPTIONS, config_from_values, load_config
from megatron_ktr.config.checks import check
from megatron_ktr.config.cli import Option, convert
from megatron_ktr.errors import UserError, one_line

NUMBERS = [option for option in OPTIONS.values() if option.kind in (int, float)]
BASES: tuple[dict[str, Any], ...] = (
    {"engine": "hf", "data_path": "d.json", "eval_data": ("e.json",), "eval_interval": 5, "filter_groups": "range"},
    {"objective": "sft", "data_path": "d.json", "eval_loss_data": ("e.json",), "eval_interval": 5},
)
"""Between them, they read nearly every option."""


def limits(option: Option) -> tuple[float, float]:
    low = option.above if option.low is None else option.low
    assert option.high is not None, f"{option.key} needs an upper limit (high=...)"
    return (-math.inf if low is None else low), option.high


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_a_number_of_any_size_is_a_configuration_or_one_line(option: Option) -> None:
    low, high = limits(option)
    step = 1 if option.kind is int else abs(high) * 1e-3 + 1e-3
    beyond: list[Any] = [high + step, 10**18, 10**400, 1e39, "inf", "-inf", "nan", math.inf, math.nan]
    beyond += [low - step] if low > -math.inf else []
    for value in beyond:
        with pytest.raises(UserError) as refused:
            convert(option, value, source="here")
        assert option.flag in one_line(refused.value) and len(one_line(refused.value)) < 500
    for value in (high, low, 0, -1, 1, 2, "1e-45"):
        try:
            converted = convert(option, value, source="here")
        except UserError as error:
            assert option.flag in one_line(error)
            continue
        for base in BASES:
            try:
                check(config_from_values({"model": "m", **base, option.name: converted}))
            except UserError as error:
                assert one_line(error)


def test_a_number_beyond_every_limit_is_told_the_limit_of_its_option_alone() -> None:
    option = OPTIONS["prompts_per_step"]
    for value in (10**18, 10**400):
        with pytest.raises(UserError, match=f"<= {option.high}, got") as refused:
            convert(option, value, source="here")
        assert str(2**31 - 1) not in one_line(refused.value)


def test_a_negative_number_is_a_value_in_every_form_that_a_run_file_may_have() -> None:
    rule = ("--filter-groups", "range")
    for text in ("-1", "-0.5", "-1e-3", "-.5E+1", "-2.e0"):
        config = load_config(["--model", "m", "--engine", "hf", "--data-path", "d.json", *rule, "--filter-low", text])
        assert config.rollout.filter_low == float(text)
