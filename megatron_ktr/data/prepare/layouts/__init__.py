"""The published layouts that ``convert`` reads: one file each, and one line of ``NAMES``.

A file has a ``LAYOUT``, and in its docstring the field names with the repository and path where they were seen, or the
sentence that they were only seen in code that reads them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from megatron_ktr.data.prepare.layout import Layout

NAMES = (
    "video_holmes",
    "video_r1",
    "onethinker",
    "video_rts",
    "tw_grpo",
    "perception_test",
    "activitynet_captions",
    "charades_sta",
    "star",
    "mvbench",
    "videomme",
    "mmvu",
    "tempcompass",
    "video_mmmu",
    "vsibench",
    "nextqa",
    "llava_video",
    "conversations",
    "plain",
)
"""In the order in which ``--from auto`` tries them, so that the more general ones come last."""


def load_layouts() -> Mapping[str, Layout]:
    return {name: importlib.import_module(f"{__name__}.{name}").LAYOUT for name in NAMES}
