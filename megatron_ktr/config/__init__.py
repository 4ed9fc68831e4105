"""The options of a run: what there is (``sections.py``), what goes together (``checks.py``), how it is read
(``load.py``: defaults, then a YAML file, then flags).

``Config`` holds every section. It stops at the door: entry points and builders take it apart, and what they build
receives its own section, or facts worked out once.
"""

from megatron_ktr.config.load import (
    OPTIONS,
    Config,
    config_from_values,
    configuration_page,
    load_config,
    read_saved,
    resolved_text,
    save_resolved,
)

__all__ = [
    "OPTIONS",
    "Config",
    "config_from_values",
    "configuration_page",
    "load_config",
    "read_saved",
    "resolved_text",
    "save_resolved",
]
