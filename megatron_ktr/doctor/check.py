"""The result of a check, the merging of results from several nodes, and their presentation.

Every check is a pure function of facts, and a separate function reads the facts from the machine. So a test can pass
any facts to a check, also those of a machine that is broken in a way that no available machine is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The result of one check. If the check is ok, ``remedy`` is advice on what could be improved."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def merge_nodes(checks_by_node: Mapping[str, Sequence[Check]]) -> list[Check]:
    """Merges the checks of all nodes into one per name, in the first node's order.

    A merged check is ok if it is ok on every node; otherwise it names the hosts where it failed. If nodes are ok with
    different details (other versions, other GPUs), the details are listed by host.
    """
    if len(checks_by_node) == 1:
        return list(*checks_by_node.values())
    names = dict.fromkeys(check.name for checks in checks_by_node.values() for check in checks)
    merged = []
    for name in names:
        found = {host: c for host, checks in checks_by_node.items() for c in checks if c.name == name}
        failed = {host: check for host, check in found.items() if not check.ok}
        shown = failed or found
        first = next(iter(shown.values()))
        details = dict.fromkeys(check.detail for check in shown.values())
        by_detail = {d: [host for host, check in shown.items() if check.detail == d] for d in details}
        text = "; ".join(f"{_hosts(hosts, len(found))}: {detail}" for detail, hosts in by_detail.items())
        merged.append(Check(name, not failed, text, first.remedy))
    return merged


def _hosts(hosts: Sequence[str], num_nodes: int) -> str:
    if len(hosts) == num_nodes:
        return f"all {num_nodes} nodes"
    return ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")


def as_text(checks: Sequence[Check]) -> str:
    """The report as text: one line for each check, below it the remedy if there is one, and a summary at the end."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<{width + 8}}{'-> ' if check.ok else 'to mend: '}{check.remedy}")
    failed = [check.name for check in checks if not check.ok]
    lines += ["", f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}" if failed else "all is well"]
    return "\n".join(lines)


def error_of_import(module: str, *, timeout_seconds: float = 600.0) -> str:
    """The reason why ``module`` cannot be imported; empty if it can. The import runs in a separate process, because a
    broken library may crash it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return f"its import did not end in {timeout_seconds:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"its import ended with code {done.returncode}"
