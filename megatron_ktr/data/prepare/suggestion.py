"""The report of a conversion, and the options to train with the file it wrote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.data.prepare.embedded import EmbeddedMedia
from megatron_ktr.data.prepare.layout import Layout
from megatron_ktr.data.prepare.tally import Tally
from megatron_ktr.data.prepare.unique_ids import UniqueIds
from megatron_ktr.errors import printable
from megatron_ktr.rewards import grounding
from megatron_ktr.rewards.accuracy import known_types

_FOLDER = "MEDIA_ROOT"
"""Stands in the suggested command for a folder that only the user knows."""


def report_of(
    *,
    out: Path,
    inputs: Sequence[Path],
    layouts: Sequence[Layout],
    tally: Tally,
    ids: UniqueIds,
    media: EmbeddedMedia,
) -> dict[str, Any]:
    """What a conversion did, as ``NAME.report.json`` has it."""
    unjudged = [] if layouts[0].is_supervised else [t for t in tally.by_problem_type if t not in known_types()]
    return {
        "out": str(out),
        "inputs": [str(path) for path in inputs],
        "layouts": sorted({layout.name for layout in layouts}),
        "num_read": tally.num_read,
        "num_records": tally.num_written,
        "by_problem_type": dict(tally.by_problem_type.most_common()),
        "by_media": dict(tally.by_media.most_common()),
        "num_clips": tally.num_clips,
        "num_with_reasoning": tally.num_with_reasoning,
        "num_several_right": tally.num_several_right,
        "num_ids_changed": ids.num_changed,
        "unjudged_problem_types": unjudged,
        "num_skipped": tally.skipped.num,
        "skipped": tally.skipped.as_json(),
        "media_root": str(out.parent) if media.is_used else " / ".join({layout.media_root: None for layout in layouts}),
        "num_media_files": media.num_files,
        "num_media_bytes": media.num_bytes,
        "options": _options(out, layouts=layouts, tally=tally, unjudged=unjudged, is_embedded=media.is_used),
    }


def _options(
    out: Path, *, layouts: Sequence[Layout], tally: Tally, unjudged: Sequence[str], is_embedded: bool
) -> list[str]:
    """The options of ``megatron_ktr.train`` for this file."""
    options = ["--data-path", str(out)]
    if set(tally.by_media) != {"text"}:
        options += ["--media-root", str(out.parent) if is_embedded else _FOLDER]
    if layouts[0].is_supervised:
        return [*options, "--objective", "sft"]
    judged = [problem_type for problem_type in tally.by_problem_type if problem_type in known_types()]
    if not judged:
        return [*options, "--reward-functions", "format,YOUR_MODULE:YOUR_REWARD", "--length-bonus", "0"]
    if unjudged:
        options += ["--problem-types", ",".join(sorted(judged))]
    if {"math", grounding.TEMPORAL, grounding.SPATIAL} & set(judged):
        options += ["--prompt-template", "grounding"]
    if tally.num_several_right:
        options += ["--reward-functions", "soft_choice,format", "--length-bonus", "0"]
    return options


def text_of(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{', '.join(report['inputs'])} ({', '.join(report['layouts'])}) -> {report['out']}",
        f"  {report['num_records']} of {report['num_read']} records; {_counts(report['by_problem_type'])}; "
        f"{_counts(report['by_media'])}",
    ]
    facts = {
        "ask about a clip": report["num_clips"],
        "have reasoning in 'process', which --objective sft imitates": report["num_with_reasoning"],
        "have several right letters, for which soft_choice pays in parts": report["num_several_right"],
        "have an id that an earlier record has, and got '#' with their number behind it": report["num_ids_changed"],
    }
    lines += [f"  {num} {fact}" for fact, num in facts.items() if num]
    if report["unjudged_problem_types"]:
        lines.append(
            f"  no built-in reward judges {', '.join(report['unjudged_problem_types'])}: leave them out with "
            "--problem-types, or name your own reward (docs/rewards.md)"
        )
    if report["num_skipped"]:
        lines.append(f"  skipped {report['num_skipped']}:")
        lines += [f"    {kind['num_records']} x {kind['examples'][0]}" for kind in report["skipped"][:8]]
    if report["num_media_files"]:
        lines.append(f"  {report['num_media_files']} media unpacked, {report['num_media_bytes'] / 1e6:.1f} MB")
    lines.append(f"  media root: {report['media_root']}")
    lines.append(f"  train with: {shlex.join(report['options'])}")
    return "\n".join(map(printable, lines))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
