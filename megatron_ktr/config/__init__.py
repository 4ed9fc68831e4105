"""The options of a run. ``sections.py`` lists them, ``checks.py`` has the rules between them, and ``load.py`` reads
them (defaults, then a YAML file, then flags).

``Config`` holds every section. Only entry points and builders see the whole of it. They take it apart, so that each
part of the program receives its own section, or facts that are derived once (``part_options.py``).
"""

from megatron_ktr.config.load import (
    OPTIONS,
    Config,
    config_from_values,
    configuration_page,
    load_config,
    read_notes,
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
    "read_notes",
    "read_saved",
    "resolved_text",
    "save_resolved",
]
