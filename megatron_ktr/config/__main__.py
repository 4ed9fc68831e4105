"""``python -m megatron_ktr.config``: prints the resolved options of a command line, or the reference page."""

from __future__ import annotations

import dataclasses
import sys

import yaml

from megatron_ktr.config import configuration_page, load_config
from megatron_ktr.errors import run_cli


def main() -> int:
    if sys.argv[1:] == ["--markdown"]:
        print(configuration_page(), end="")
        return 0
    config = load_config(sys.argv[1:], prog="python -m megatron_ktr.config")
    print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    run_cli(main)
